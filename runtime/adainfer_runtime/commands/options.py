"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["DeviceOption", "LevelOption", "ProfileOption", "ThreadsOption", "ThresholdOption"]

DeviceOption = Annotated[str, typer.Option(help="`cpu`, which runs every target, or `cuda`.")]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Exit threshold, instead of the calibrated one.")
]
LevelOption = Annotated[
    float | None,
    typer.Option(
        help="Certified disagreement, such as 0.02 (see inspect): of answers, choices, and texts "
        "after a context exit; by `certify --texts`, of texts of mode adaptive and of --kv-policy "
        "translated, the share of their tokens."
    ),
]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Measure time by kind of stage, and show it.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads; default: all cores.", min=1)]
