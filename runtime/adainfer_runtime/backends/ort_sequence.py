"""One sequence on ONNX Runtime's CPU provider: a layout's buffers, and bindings onto them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..manifest import Manifest
from .base import Float32, ProbeResult
from .host_memory import lazy_zeros
from .kv_scales import KvScales
from .layout import BufferSpec, Region, SequenceLayout, StageRun, hidden_buffer
from .ort_stage import OrtStage, Place

__all__ = ["LoadedStages", "Memory", "OrtSequence", "bind", "keep"]

Memory = dict[str, npt.NDArray[Any]]
# Bindings that a sequence keeps, in row counts: decode, drafts, the usual prompt chunk.
_KEPT_ROW_COUNTS = 8


class LoadedStages(Protocol):
    """What sequences need of their back end: stages (`OrtStage`)."""

    manifest: Manifest
    embed: Any
    positions: Any
    kv_scales: KvScales | None

    @property
    def max_rows(self) -> int:
        """Positions that one pass may carry."""

    def stage(self, index: int, rows: int) -> OrtStage:
        """What runs layer stage `index` over so many positions."""

    def probe_rows(self, hidden: Float32) -> list[ProbeResult]:
        """The probe of every row `[rows, hidden_size]`."""


class OrtSequence:
    """See `base.SequenceBuffers`: a layout's buffers in the process's own memory.

    Args:
        caches: the buffers of K and V, where they are part of somebody's block.
    """

    def __init__(self, stages: LoadedStages, caches: Mapping[str, npt.NDArray[Any]] = {}) -> None:
        manifest = stages.manifest
        self._stages = stages
        self._layout = SequenceLayout(manifest, stages.max_rows)
        self._memory: Memory = {
            name: lazy_zeros(spec)
            for name, spec in self._layout.buffers().items()
            if name not in caches
        }
        waiting = BufferSpec("float32", (manifest.max_seq_len, manifest.model.hidden_size))
        self.pending: Float32 = lazy_zeros(waiting)
        self.use_caches(caches)

    def use_caches(self, caches: Mapping[str, npt.NDArray[Any]]) -> None:
        """Reads and writes K and V there from now on; what they hold is the caller's business."""
        self._memory.update(caches)
        self._hidden = tuple(self._memory[hidden_buffer(index)] for index in range(2))
        self._caches = {
            layer: (self._cache("key", layer), self._cache("value", layer))
            for layer in range(1, self._stages.manifest.model.num_layers + 1)
        }
        self._prepared: tuple[int, int] | None = None
        self._bound: dict[int, list[Callable[[], None]]] = {}
        self._bound_embed: dict[int, Callable[[], None]] = {}

    def embed(self, tokens: npt.NDArray[np.int64], start: int) -> None:
        """`[rows]` token ids into hidden buffer 0."""
        rows = len(tokens)
        for name, values in self._layout.embed_inputs(tokens, start).items():
            self._memory[name][:rows] = values
        run = self._bound_embed.get(rows)
        if run is None:
            run = bind(self._stages.embed, self._layout.embed(rows), self._memory)
            keep(self._bound_embed, rows, run)
        run()

    def run_stage(self, index: int, rows: int, past: int) -> None:
        """One layer stage over `rows` positions."""
        if self._prepared != (rows, past):
            self._prepare(rows, past)
        if self._layout.varies_with_past:
            self._bind_stage(index, rows, past)()
            return
        bound = self._bound.get(rows)
        if bound is None:
            stages = range(len(self._stages.manifest.layer_stages))
            bound = [self._bind_stage(i, rows, past) for i in stages]
            keep(self._bound, rows, bound)
        bound[index]()

    def hidden(self, index: int, rows: int) -> Float32:
        """Rows of the buffer that stage `index` reads."""
        view: Float32 = self._hidden[index % 2][:rows]
        return view

    def write_kv(self, layer: int, start: int, key: Float32, value: Float32) -> None:
        """Into the cache that the layer's stages are bound to."""
        end = start + key.shape[1]
        cached_key, cached_value = self._caches[layer]
        scales = self._stages.kv_scales
        stored = scales.quantise(layer, key, value) if scales else (key, value)
        cached_key[:, start:end], cached_value[:, start:end] = stored

    def kv(self, layer: int, length: int) -> tuple[Float32, Float32]:
        """K and V of a layer, without the batch axis (copies, where they are not float32)."""
        key, value = (cache[:, :length] for cache in self._caches[layer])
        if self._stages.kv_scales:
            return self._stages.kv_scales.dequantise(layer, key, value)
        return key.astype(np.float32, copy=False), value.astype(np.float32, copy=False)

    def _cache(self, part: str, layer: int) -> npt.NDArray[Any]:
        return self._layout.cache_view(layer, self._memory[f"{part}.{layer}"])

    def _prepare(self, rows: int, past: int) -> None:
        numbers = self._layout.host_numbers(rows, past)
        if numbers is not None:
            for name, number in numbers.items():
                self._memory[name].fill(number)
            self._prepared = (rows, past)
            return
        for name, value in self._layout.host_inputs(rows, past).items():
            self._memory[name].reshape(-1)[: value.size] = value.reshape(-1)
        run = self._layout.positions(rows, past)
        if run is not None:
            bind(self._stages.positions, run, self._memory)()
        self._prepared = (rows, past)

    def _bind_stage(self, index: int, rows: int, past: int) -> Callable[[], None]:
        stage = self._stages.stage(index, rows)
        return bind(stage, self._layout.stage(index, rows, past), self._memory)


def bind(
    stage: OrtStage, run: StageRun, memory: Mapping[str, npt.NDArray[Any]]
) -> Callable[[], None]:
    """A run of a stage, bound to the buffers that its regions lie in."""

    def places(regions: Mapping[str, Region]) -> dict[str, Place]:
        return {name: _place(region, memory) for name, region in regions.items()}

    return stage.bind(places(run.inputs), places(run.outputs))


def _place(region: Region, memory: Mapping[str, npt.NDArray[Any]]) -> Place:
    array = memory[region.buffer]
    return array.dtype.type, region.shape, array.ctypes.data + region.offset


def keep(cache: dict[Any, Any], key: Any, value: Any, most: int = _KEPT_ROW_COUNTS) -> None:
    """Puts a binding into a cache of bounded size."""
    if len(cache) >= most:
        oldest = next((known for known in cache if known != 1), 1)  # decode's binding stays
        del cache[oldest]
    cache[key] = value
