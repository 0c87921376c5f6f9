"""Where held-out prompts leave, by their length: short prompts leave elsewhere than long ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.manifest import LengthShares

from .scored import Scored

__all__ = ["length_shares", "share_fields"]

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_MOST_BINS = 4
_LEAST_PROMPTS = 50  # of a bin: a share of .2 then is known to about .06
# A bin's shares count as if so many prompts of all lengths were in it. Of 50 prompts alone a share
# is off by .06 for no reason, and whoever plans takes the mode that looks best: the more bins, the
# likelier one that chance has flattered. Shrunk, the error halves where a bin is small, and a
# difference that 200 prompts show keeps four fifths of itself.
_POOLED_PROMPTS = 50.0


def share_fields(scored: Scored, grid: Float64) -> dict[str, Any]:
    """`exit_shares` and `length_shares` of a spec with these thresholds."""
    return {
        "exit_shares": scored.exit_shares(grid),
        "length_shares": length_shares(scored, grid),
    }


def length_shares(scored: Scored, grid: Float64) -> tuple[LengthShares, ...]:
    """By the quantiles of the prompts' lengths; none where these are not known, too few, or alike.

    Args:
        grid: thresholds, from the safest down.
    """
    if scored.lengths is None:
        return ()
    pooled = _rows(scored, grid)
    found = []
    for members in _bins(scored.lengths):
        count = int(members.sum())
        own = _rows(scored.rows(members), grid)
        drawn = (count * own + _POOLED_PROMPTS * pooled) / (count + _POOLED_PROMPTS)
        found.append(
            LengthShares(
                tokens=round(float(np.median(scored.lengths[members]))),
                prompts=count,
                exit_shares=tuple(map(tuple, np.round(drawn, 4).tolist())),
            )
        )
    return tuple(found)


def _rows(scored: Scored, grid: Float64) -> Float64:
    """`[thresholds, points]`, shares of prompts."""
    return np.array(scored.exit_shares(grid), np.float64)


def _bins(lengths: Int64) -> list[npt.NDArray[np.bool_]]:
    """Members of as many bins as have prompts enough each, the shortest first; none for one bin.

    Prompts of the same length stay together: bins need not be of equal size, nor as many as tried.
    """
    for count in range(min(_MOST_BINS, len(lengths) // _LEAST_PROMPTS), 1, -1):
        edges = np.quantile(lengths, np.arange(1, count) / count)
        place = np.searchsorted(edges, lengths)
        members = [place == number for number in np.unique(place)]
        if len(members) > 1 and min(chosen.sum() for chosen in members) >= _LEAST_PROMPTS:
            return members
    return []
