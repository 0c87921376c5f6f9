"""Adapters of reduced rank, where full ones would be too large beside the model.

The map is cut to the directions in which its *predictions* vary most: reduced-rank regression,
an SVD in the data's metric. Each coordinate of the prediction counts by its own spread, for a few
of the final hidden state's are hundreds of times larger than the rest, and the norm takes that
back.

All adapters of a folder together shall be no more than a twentieth of the model on disk; within
that, held-out prompts decide per exit point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.manifest import Manifest

from ..progress import Reporter
from .affine import AffineMap, reduce_rank
from .distil import predicted_tokens
from .traces import PromptTraces

__all__ = ["AdapterBudget", "choose_ranks"]

Float32 = npt.NDArray[np.float32]

_SHARE = 0.05
_POINTS = 4  # expected of all exit graphs together: a graph has three at most, and they share most
_BYTES_PER_WEIGHT = 2  # float16
_PARTS_OF_WIDTH = (2, 3, 4, 8)
_FEWEST_HELD_OUT = 30  # answers


@dataclass(frozen=True)
class AdapterBudget:
    """How many weights one adapter may have.

    Where exit graphs have more different points than was expected, `takes_all` says which of them
    is one too many.
    """

    weights: int

    @classmethod
    def of(cls, manifest: Manifest) -> AdapterBudget:
        """A twentieth of the stages' files, shared out among exit points."""
        stages = [record for name, record in manifest.files.items() if name.startswith("stages/")]
        stored = sum(record.bytes for record in stages)
        return cls(int(_SHARE * stored / _POINTS / _BYTES_PER_WEIGHT))

    def takes_all(self, adapters: Iterable[AffineMap]) -> bool:
        """Whether so many different ones are within a twentieth together. Those of rank 1 are:
        there is nothing smaller.
        """
        counted = sum(adapter.weights for adapter in adapters if adapter.rank > 1)
        return counted <= _POINTS * self.weights

    def takes_full(self, width: int) -> bool:
        """Whether a square matrix is within it."""
        return width * width <= self.weights

    def ranks(self, width: int) -> tuple[int, ...]:
        """Ranks to try, descending: the largest that fits (half the width at most: two matrices of
        more are dearer than one), and parts of the width below it; 1 if nothing fits.
        """
        largest = max(1, min(self.weights // (2 * width), width // 2))
        parts = {width // part for part in _PARTS_OF_WIDTH}
        return tuple(sorted({largest, *(rank for rank in parts if 0 < rank < largest)})[::-1])


def choose_ranks(
    engine: Engine, adapters: Mapping[int, AffineMap], prompts: PromptTraces, reporter: Reporter
) -> dict[int, AffineMap]:
    """Per layer the form within the budget that agrees most often on held-out prompts, as stored;
    of equal ones the cheapest. With too few prompts to tell, the largest form.
    """
    budget = AdapterBudget.of(engine.manifest)
    traces = prompts.answers
    test = np.flatnonzero(traces.held_out)
    spread = traces.final.std(axis=0) + 1e-6
    chosen = {}
    reporter.begin("choosing ranks", len(adapters))
    for column, layer in enumerate(traces.layers):
        full = adapters[layer]
        forms = [full.as_stored()] if budget.takes_full(len(full.bias)) else []
        if not forms or len(test) >= _FEWEST_HELD_OUT:
            ranks = budget.ranks(len(full.bias))
            reduced = reduce_rank(full, prompts.moments[layer].inputs(), ranks, spread)
            forms += [form.as_stored() for form in reduced]
        if len(test) >= _FEWEST_HELD_OUT:
            hidden, token = traces.hidden[test, column], traces.token[test]
            right = [(predicted_tokens(engine, f.apply(hidden)) == token).sum() for f in forms]
            forms = [f for f, n in zip(forms, right, strict=True) if n == max(right)]
            chosen[layer] = forms[-1]
        else:
            chosen[layer] = forms[0]
        reporter.step(f"layer {layer}: {chosen[layer].rank} of {len(full.bias)} dimensions")
    return chosen
