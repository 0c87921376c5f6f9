"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["DeviceOption", "LevelOption", "ThreadsOption", "ThresholdOption"]

DeviceOption = Annotated[str, typer.Option(help="`cpu`, which runs every target, or `cuda`.")]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Exit threshold, instead of the calibrated one.")
]
LevelOption = Annotated[
    float | None,
    typer.Option(
        help="Certified disagreement, such as 0.02 (see inspect): of answers; of texts with "
        "--kv-policy translated, the share of their tokens."
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads; default: all cores.")]
