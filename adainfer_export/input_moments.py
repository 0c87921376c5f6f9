"""Second moments of what the linear layers of a model are given, on the decoder in float32.

Beside what `FloatDecoder` needs, one layer's moments (in x in, float32) are held. Activations are
the float model's own, not those behind layers that are rounded already: on SmolLM2 that gave the
same (KL .30 and .30, blocks of 64), in one pass instead of five.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from .float_decoder import FloatDecoder, FloatStage
from .gptq import ErrorFeedback, SecondMoment
from .lower import Precision
from .lower.graph import find_linears
from .sources import Checkpoint

__all__ = ["InputMoments"]

# By output of a stage, the weights of the linear layers that read it.
_Taps = dict[str, tuple[str, ...]]


class InputMoments:
    """Second moments of the inputs of a model's linear layers, LM head included.

    Args: see `FloatDecoder`.
    """

    def __init__(
        self, checkpoint: Checkpoint, precision: Precision, max_seq_len: int, scratch: Path
    ) -> None:
        self._decoder = FloatDecoder(checkpoint, precision, max_seq_len, scratch, _tap_linears)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the weights whose inputs are seen."""
        taps = (names for stage in self._decoder.stages for names in stage.seen.values())
        return frozenset(name for names in taps for name in names)

    def feedbacks(
        self, prompts: Sequence[Sequence[int]], wanted: Collection[str]
    ) -> Iterator[tuple[tuple[str, ...], ErrorFeedback]]:
        """Weights that read the same, and how they are rounded, in the order of their stages; ends
        behind the last that is wanted.

        Args:
            prompts: token ids.
            wanted: weights whose inputs are of interest; those of others are not added up.

        Raises:
            UnsupportedError: activations are not finite.
        """
        stages = self._decoder.stages
        last = max(
            (
                index
                for index, stage in enumerate(stages)
                for names in stage.seen.values()
                if set(names) & set(wanted)
            ),
            default=-1,
        )
        states = self._decoder.start(prompts)
        for stage in stages[: last + 1]:
            taps = {tap: names for tap, names in stage.seen.items() if set(names) & set(wanted)}
            moments, states = self._run(stage, states, list(taps))
            for tap, names in taps.items():  # none is kept here: they are as large as the layer
                yield names, ErrorFeedback.of(moments.pop(tap).value())

    def _run(
        self, stage: FloatStage[_Taps], states: list[npt.NDArray[Any]], taps: list[str]
    ) -> tuple[dict[str, SecondMoment], list[npt.NDArray[Any]]]:
        """The moments of the taps, and what the next stage is given."""
        moments: dict[str, SecondMoment] = {}

        def add(found: Mapping[str, npt.NDArray[Any]]) -> None:
            for tap in taps:
                rows = found[tap].reshape(-1, found[tap].shape[-1])
                moments.setdefault(tap, SecondMoment(rows.shape[1])).add(rows)

        return moments, self._decoder.run(stage, states, taps, add)


def _tap_linears(graph: ir.Graph) -> _Taps:
    """Makes the inputs of linear layers outputs; by output, the weights that read it."""
    readers: dict[ir.Value, list[str]] = {}
    for linear in find_linears(graph):
        readers.setdefault(linear.input, []).append(str(linear.weight.name))
    taps = {}
    for value, names in readers.items():
        tap = ir.Node("", "Identity", [value])
        graph.append(tap)
        (out,) = tap.outputs
        out.name, out.type, out.shape = f"input_of.{names[0]}", value.type, value.shape
        graph.outputs.append(out)
        taps[out.name] = tuple(names)
    return taps
