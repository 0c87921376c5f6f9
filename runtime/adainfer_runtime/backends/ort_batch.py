"""Several sequences on ONNX Runtime's CPU provider, whose decode passes may be put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .base import Float32, ProbeResult
from .host_memory import lazy_zeros
from .layout import SequenceLayout, hidden_buffer
from .ort_sequence import LoadedStages, Memory, OrtSequence, bind, keep

__all__ = ["OrtBatch"]

# Bindings kept, by slots that run together: of eight slots there are 28 neighbourhoods, of
# sixteen 120.
_KEPT_NEIGHBOURHOODS = 128


class OrtBatch:
    """See `base.SequenceBatch`.

    GroupQueryAttention takes a batch of one position each, if the caches lie side by side: slot
    after slot in one block per layer.
    """

    def __init__(self, stages: LoadedStages, slots: int) -> None:
        self._layout = SequenceLayout(stages.manifest, stages.max_rows)
        self._stages = stages
        self._memory: Memory = {
            name: lazy_zeros(spec) for name, spec in self._layout.batch_buffers(slots).items()
        }
        self._sequences = [OrtSequence(stages, self._caches(slot)) for slot in range(slots)]
        self._prepared: tuple[int, ...] = ()
        self._bound: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def sequence(self, slot: int) -> OrtSequence:
        """Of one slot, for passes of its own."""
        return self._sequences[slot]

    def run_stage(self, index: int, first: int, pasts: Sequence[int]) -> None:
        """One position of each slot from `first` on."""
        count = len(pasts)
        if self._prepared != (wanted := tuple(pasts)):
            for name, values in self._layout.batch_inputs(pasts).items():
                self._memory[name].reshape(-1)[: values.size] = values.reshape(-1)
            self._prepared = wanted
        bound = self._bound.get((first, count))
        if bound is None:
            bound = [
                bind(
                    self._stages.stage(i, 1),
                    self._layout.batch_stage(i, first, count),
                    self._memory,
                )
                for i in range(len(self._stages.manifest.layer_stages))
            ]
            keep(self._bound, (first, count), bound, _KEPT_NEIGHBOURHOODS)
        together = self._sequences[first : first + count]
        hidden = self._memory[hidden_buffer(index)]
        for row, sequence in enumerate(together):
            hidden[row] = sequence.hidden(index, 1)[0]
        bound[index]()
        hidden = self._memory[hidden_buffer(index + 1)]
        for row, sequence in enumerate(together):
            sequence.hidden(index + 1, 1)[0] = hidden[row]

    def probe(self, hidden: Float32) -> list[ProbeResult]:
        """`[rows, hidden_size]`, a position of each sequence."""
        return self._stages.probe_rows(hidden)

    def move(self, source: int, target: int, length: int) -> None:
        """The two slots change their sequences; of the caches only the source's first `length`
        positions go along.
        """
        moved, idle = self._sequences[source], self._sequences[target]
        caches = self._caches(target)
        for name, block in self._caches(source).items():
            caches[name][:, :, :length] = block[:, :, :length]
        moved.use_caches(caches)
        idle.use_caches(self._caches(source))
        self._sequences[source], self._sequences[target] = idle, moved

    def _caches(self, slot: int) -> Memory:
        return {name: self._memory[name][slot : slot + 1] for name in self._layout.cache_names}
