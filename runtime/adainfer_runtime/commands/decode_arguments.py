"""Options of commands that generate text: how modes decode."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ..confidence import ConfidenceDecay
from ..decode_options import DecodeOptions
from ..draft_schedule import Fixed

__all__ = [
    "ConfidenceDecayOption",
    "DraftLayerOption",
    "DraftsOption",
    "ExitLooksChoice",
    "ExitLooksOption",
    "KvPolicyChoice",
    "KvPolicyOption",
    "ProbeChoice",
    "ProbeOption",
    "decode_options",
]

_PANEL = "Exits and drafts"


class KvPolicyChoice(str, Enum):
    """Values of --kv-policy."""

    deferred = "deferred"
    propagate = "propagate"
    translated = "translated"


class ProbeChoice(str, Enum):
    """Values of --probe."""

    full = "full"
    shortlist = "shortlist"


class ExitLooksChoice(str, Enum):
    """Values of --exit-looks."""

    paying = "paying"
    always = "always"


KvPolicyOption = Annotated[
    KvPolicyChoice,
    typer.Option(
        help="Keys and values of layers that exits skipped: deferred is exact, the others are "
        "cheaper (modes adaptive, context and combined).",
        rich_help_panel=_PANEL,
    ),
]
ProbeOption = Annotated[
    ProbeChoice,
    typer.Option(
        help="What reads exit points and drafts; shortlist is cheaper and never has the last word "
        "(needs calibrate --shortlist).",
        rich_help_panel=_PANEL,
    ),
]
ExitLooksOption = Annotated[
    ExitLooksChoice,
    typer.Option(
        help="Whether later tokens look at exit points: while that saves time, or always "
        "(mode adaptive).",
        rich_help_panel=_PANEL,
    ),
]
ConfidenceDecayOption = Annotated[
    float | None,
    typer.Option(
        help="The threshold falls over the text, this fast; CALM takes 4 (mode adaptive).",
        min=0.0,
        rich_help_panel=_PANEL,
    ),
]
DraftLayerOption = Annotated[
    int | None,
    typer.Option(
        help="Layer that drafts; default: by expected cost (mode verified).",
        min=1,
        rich_help_panel=_PANEL,
    ),
]
DraftsOption = Annotated[
    int | None,
    typer.Option(
        help="Drafts of every round; default: as many as pay, or none (mode verified).",
        min=0,
        rich_help_panel=_PANEL,
    ),
]


def decode_options(
    *,
    kv_policy: KvPolicyChoice,
    probe: ProbeChoice,
    exit_looks: ExitLooksChoice,
    confidence_decay: float | None,
    draft_layer: int | None,
    drafts: int | None,
    max_new_tokens: int,
) -> DecodeOptions:
    """What these values ask for; a threshold falls over `max_new_tokens`."""
    decay = None
    if confidence_decay is not None:
        decay = ConfidenceDecay(confidence_decay, max_new_tokens)
    return DecodeOptions(
        kv_policy=kv_policy.value,
        confidence=decay,
        probe=probe.value,
        draft_layer=draft_layer,
        draft_schedule=None if drafts is None else Fixed(drafts),
        exit_looks=exit_looks.value,
    )
