"""`adainfer certify`: a new certificate from a user's own traffic."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adainfer_runtime.commands.inspect_folder import certificate_tables
from adainfer_runtime.commands.options import DeviceOption

from .progress import terminal_reporter

__all__ = ["EXAMPLES", "certify"]

EXAMPLES = """
Examples:

    adainfer certify engines/ --prompts traffic.jsonl

    adainfer certify engines/ --prompts traffic.jsonl --device cuda

    adainfer run engines/ --mode adaptive --level 0.02 --prompt "…"
"""


class Against(str, Enum):
    """Values of --against."""

    model = "model"
    gold = "gold"


def certify(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    prompts: Annotated[
        list[Path], typer.Option(help="Task file (JSON lines with `prompt`); repeatable.")
    ],
    against: Annotated[
        Against,
        typer.Option(
            help="`model`: exits must give the full model's answer. `gold`: they must not spoil an "
            "answer that the full model has right."
        ),
    ] = Against.model,
    device: DeviceOption = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the certificate.")] = False,
) -> None:
    """Certify the exits of an engine folder on prompts like those that will be asked."""
    from .calibrate.recertify import recertify

    with terminal_reporter(quiet=quiet or json_output) as reporter:
        renewal = recertify(folder, prompts, reporter, against.value, device=device)
    if json_output:
        certificates = {
            name: certificate.model_dump(mode="json")
            for name, certificate in renewal.manifest.certificates.items()
        }
        left_out = {"fitted_on": renewal.fitted_on, "too_long": renewal.too_long}
        print(json.dumps({"certificates": certificates, **left_out}))
        return
    console = Console(stderr=True)
    for count, why in (
        (renewal.fitted_on, "the exits were fitted on them"),
        (renewal.too_long, "the engine does not take such long ones"),
    ):
        if count:
            console.print(f"warning: {count} prompts left out: {why}", style="yellow")
    for table in certificate_tables(renewal.manifest):
        Console().print(table)
