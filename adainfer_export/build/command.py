"""`adainfer build`: TensorRT plans of an engine folder."""

from __future__ import annotations

import json
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from adainfer_runtime.engine_folder import load_manifest, verify_files
from adainfer_runtime.plans import DEFAULT_MAX_ROWS, DEFAULT_OPTIMISATION_LEVEL

from ..errors import BuildError
from .builder import BuildReport, BuildRequest, build_plans

__all__ = ["build", "register"]

EXAMPLES = """
Examples:

    adainfer build engines/                                        # on the device

    adainfer build engines/ --backend tensorrt-rtx --sm 86,89,120  # without a GPU

    adainfer build engines/ --backend tensorrt-rtx --stages 'layer_00*'
"""


class BackendChoice(str, Enum):
    """Values of --backend."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


def register(app: typer.Typer) -> None:
    """Adds build to `adainfer`."""
    app.command(name="build", epilog=EXAMPLES)(build)


def build(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    backend: Annotated[
        BackendChoice,
        typer.Option(help="TensorRT builds on the GPU that runs the plans; RTX needs none."),
    ] = BackendChoice.tensorrt,
    sm: Annotated[
        str,
        typer.Option(
            help="Compute capabilities, of tensorrt-rtx; default: this machine's GPU, and "
            "without one 86,89,120 (fp8: 89,120)."
        ),
    ] = "",
    stages: Annotated[
        list[str] | None,
        typer.Option(help="Names of stages to build, with wildcards; repeatable. Default: all."),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(help="Positions that one pass may carry (prompt chunks).", min=1)
    ] = DEFAULT_MAX_ROWS,
    optimisation_level: Annotated[
        int, typer.Option(help="Of TensorRT's builder.", min=0, max=5)
    ] = DEFAULT_OPTIMISATION_LEVEL,
    single_profile: Annotated[
        bool,
        typer.Option(
            "--single-profile",
            help="One profile for decoding and prompts: fp16, bf16 and fp8 plans of half the size.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Build TensorRT plans from an engine folder's ONNX files, one at a time.

    An interrupted build goes on where it stopped; plans that match their stamp are kept.
    """
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    request = BuildRequest(
        backend=backend.value,
        sm=_parse_sm(sm),
        stages=tuple(stages or ()),
        max_rows=max_rows,
        optimisation_level=optimisation_level,
        single_profile=single_profile,
    )
    report = build_plans(folder, manifest, request, _Lines(quiet=quiet or json_output))
    if json_output:
        print(json.dumps(_summary(report)))
        return
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    plans = [report.stamp.plans[file] for file in report.built]
    fused = sum(plan.fused_attention for plan in plans)
    print(
        f"{folder}: plans/{report.stamp.name}: {len(report.built)} built, {len(report.kept)} kept; "
        f"{sum(plan.bytes for plan in plans) / 1e6:,.1f} MB, "
        f"{sum(plan.seconds for plan in plans):,.1f} s, fused attention kernels: {fused}"
    )


class _Lines:
    """A line per plan on standard error: builds run for minutes, often over ssh."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._total, self._done, self._last = 0, 0, time.perf_counter()

    def begin(self, what: str, total: int) -> None:
        self._total, self._last = total, time.perf_counter()

    def step(self, detail: str = "") -> None:
        self._done += 1
        now = time.perf_counter()
        if not self._quiet:
            line = f"[{self._done}/{self._total}] {detail}  {now - self._last:.1f} s"
            print(line, file=sys.stderr, flush=True)
        self._last = now


def _parse_sm(text: str) -> tuple[int, ...]:
    parts = [part.strip().lower().removeprefix("sm") for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise BuildError(f"--sm {text}: give numbers such as 86,89,120")
    return tuple(sorted({int(part) for part in parts}))


def _summary(report: BuildReport) -> dict[str, object]:
    return {
        "stamp": report.stamp.model_dump(mode="json"),
        "built": report.built,
        "kept": report.kept,
        "warnings": report.warnings,
    }
