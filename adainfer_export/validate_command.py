"""`adainfer validate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .errors import ValidationFailedError
from .validate import ValidationReport, validate_folder

__all__ = ["EXAMPLES", "validate"]

EXAMPLES = """
Examples:

    adainfer validate engines/

    adainfer validate engines/ --reference ./my-llama

    adainfer validate engines/ --reference model.gguf --json
"""


def validate(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    reference: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to compare with: folder, .gguf file, alias or Hugging Face id. "
            "Default: the alias or id it was exported from; local checkpoints must be given."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare an engine folder with transformers: per stage and end to end.

    fp32 must stay within 1e-3 on the logits; fp8, int8 and int4 are reported without a limit.
    """
    report = validate_folder(folder, reference)
    if json_output:
        print(json.dumps(asdict(report) | {"passed": report.passed}))
    else:
        _print(report)
    if not report.passed:
        raise ValidationFailedError(
            f"{folder} differs from {report.reference}: logits by {report.logits:.2g} "
            f"(allowed {report.tolerance}), {report.same_tokens:.1%} equal tokens"
        )


def _print(report: ValidationReport) -> None:
    console = Console()
    table = Table("after layer", "largest difference", "relative", title=report.reference)
    for stage in report.stages:
        table.add_row(str(stage.layer), f"{stage.largest:.2e}", f"{stage.relative:.2e}")
    console.print(table)
    limit = "no limit" if report.tolerance is None else f"allowed {report.tolerance:.0e}"
    console.print(f"logits: {report.logits:.2e} ({limit}); equal tokens: {report.same_tokens:.1%}")
