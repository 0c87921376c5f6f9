"""Options that only some modes take. In another one they would be ignored: they are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .errors import RequestError
from .mode_policies import MODES, Mode
from .values import one_of

__all__ = ["check_mode_options"]

_DRAFTING: tuple[Mode, ...] = ("verified", "auto")

# `auto` may become any of the others. A level is missing here: it bounds what may differ from the
# full model, which modes that run every layer keep.
_TAKEN_BY: Mapping[str, tuple[Mode, ...]] = {
    "threshold": ("adaptive", "context", "auto"),
    "classifier": ("adaptive",),
    "kv_policy": ("adaptive", "context", "combined", "auto"),
    "confidence": ("adaptive", "auto"),
    "probe": ("adaptive", "combined", "verified", "auto"),
    "exit_looks": ("adaptive", "context", "combined", "auto"),  # in two of them it always looks
    "draft_layer": _DRAFTING,
    "draft_schedule": _DRAFTING,
    "acceptance": _DRAFTING,
    "costs": ("adaptive", "verified", "auto"),
}
# Options whose names on the command line are others.
_SAID = {
    "confidence": "confidence (--confidence-decay)",
    "draft_schedule": "draft_schedule (--drafts)",
}


def check_mode_options(mode: Mode, given: Iterable[str]) -> None:
    """Whether a mode takes the options that were given, by name.

    A mode that does not exist takes everything here: whoever looks for its policy says so.

    Raises:
        RequestError: it does not.
    """
    if mode not in MODES:
        return
    for name in given:
        takers = _TAKEN_BY.get(name, MODES)
        if mode not in takers:
            raise RequestError(
                f"{_SAID.get(name, name)} has no effect in mode {mode}: leave it out, or use mode "
                f"{one_of(takers)}"
            )
