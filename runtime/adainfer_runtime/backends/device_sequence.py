"""One sequence in device memory: KV, hidden states and what waits, bound once per pass size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..manifest import Manifest
from .device_blocks import DeviceBlocks
from .device_memory import DeviceDriver, DeviceRows, Float32, Tensor, from_storage, to_storage
from .layout import HOST_BUFFERS, SequenceLayout, StageRun, hidden_buffer

__all__ = ["BoundRun", "DeviceSequence", "LoadedStage", "Stages"]

_KEPT_BINDINGS = 8
_WAITING = "waiting"  # the buffer of positions that stopped early


@dataclass(frozen=True)
class BoundRun:
    """A run of a stage with every tensor's place.

    Attributes:
        host: inputs in host memory.
        aliases: pairs (input, output) that the stage must update in place.
        repeatable: the very same run comes again (decoding): worth a CUDA graph.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    aliases: tuple[tuple[str, str], ...] = ()
    repeatable: bool = False
    host: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


class LoadedStage(Protocol):
    """A stage on the device."""

    def bind(self, run: BoundRun) -> Callable[[], None]:
        """A call that puts one run onto the stream.

        Raises:
            StageError: the stage does not have these tensors, or does not alias where it must.
        """


class Stages(Protocol):
    """The folder's stages, loaded on first use."""

    def load(self, file: str) -> LoadedStage:
        """The stage of an ONNX file (its path in the folder)."""

    def close(self) -> None:
        """Frees what stages share; none can be run afterwards."""


class DeviceSequence:
    """See `base.SequenceBuffers`. Memory goes with it."""

    def __init__(
        self, manifest: Manifest, stages: Stages, driver: DeviceDriver, max_rows: int
    ) -> None:
        """Allocates everything.

        Raises:
            DeviceMemoryError: it does not fit.
        """
        self._manifest = manifest
        self._stages = stages
        self._driver = driver
        self._layout = SequenceLayout(manifest, max_rows)
        specs, width = self._layout.buffers(), manifest.model.hidden_size
        self._host = {
            name: np.zeros(specs[name].shape, specs[name].dtype)
            for name in specs.keys() & HOST_BUFFERS
        }
        sizes = {name: spec.bytes for name, spec in specs.items() if name not in HOST_BUFFERS}
        sizes[_WAITING] = 4 * width * manifest.max_seq_len
        self._base = DeviceBlocks(driver, sizes)
        self.pending = DeviceRows(driver, self._base[_WAITING], manifest.max_seq_len, width)
        self._prepared: tuple[int, int] | None = None
        self._bound: dict[tuple[str, int], Callable[[], None]] = {}

    def embed(self, tokens: npt.NDArray[np.int64], start: int) -> None:
        """`[rows]` token ids into hidden buffer 0."""
        rows = len(tokens)
        file = self._manifest.embed.file
        with self._driver.lock:
            for name, values in self._layout.embed_inputs(tokens, start).items():
                self._driver.upload(self._base[name], values)
            self._call(file, rows, lambda: self._layout.embed(rows), moves=False)()

    def run_stage(self, index: int, rows: int, past: int) -> None:
        """One layer stage over `rows` positions."""
        file = self._manifest.layer_stages[index].file
        moves = self._layout.varies_with_past
        with self._driver.lock:  # stages are shared: nobody else binds one before it has run
            if self._prepared != (rows, past):
                self._prepare(rows, past)
            self._call(file, rows, lambda: self._layout.stage(index, rows, past), moves=moves)()

    def hidden(self, index: int, rows: int) -> Float32:
        """Rows of the buffer that stage `index` reads, on the device."""
        width = self._manifest.model.hidden_size
        view: Any = DeviceRows(self._driver, self._base[hidden_buffer(index)], rows, width)
        return view  # type: ignore[no-any-return]

    def write_kv(self, layer: int, start: int, key: Float32, value: Float32) -> None:
        """Into the cache: those rows alone."""
        at = self._layout.cache_rows(layer, start, key.shape[1])
        for part, new in (("key", key), ("value", value)):
            stored = to_storage(self._layout.to_runs(new), self._manifest.kv.dtype)
            place = self._base[f"{part}.{layer}"] + at.offset
            self._driver.upload_rows(place, at.pitch, stored)

    def kv(self, layer: int, length: int) -> tuple[Float32, Float32]:
        """Copies of K and V of a layer."""
        dtype = self._manifest.kv.dtype
        at = self._layout.cache_rows(layer, 0, length)
        found = []
        for part in ("key", "value"):
            stored = np.empty(at.shape, "uint16" if dtype == "bfloat16" else dtype)
            place = self._base[f"{part}.{layer}"] + at.offset
            self._driver.download_rows(stored, place, at.pitch)
            found.append(self._layout.from_runs(from_storage(stored, dtype)))
        return found[0], found[1]

    def _prepare(self, rows: int, past: int) -> None:
        """What the layers of a pass share: computed once, before the first of them."""
        for name, value in self._layout.host_inputs(rows, past).items():
            if name in self._host:
                self._host[name][...] = value
            else:
                self._driver.upload(self._base[name], value)
        positions = self._manifest.positions
        if positions is not None:

            def run() -> StageRun:
                found = self._layout.positions(rows, past)
                assert found is not None  # the manifest has the stage
                return found

            self._call(positions.file, rows, run, moves=self._layout.varies_with_past)()
        self._prepared = (rows, past)

    def _call(
        self, file: str, rows: int, run: Callable[[], StageRun], *, moves: bool
    ) -> Callable[[], None]:
        """Bindings are kept by row count, unless places or shapes move with the past."""
        if moves:
            return self._bind(file, run(), repeatable=False)
        key = (file, rows)
        if key not in self._bound:
            sizes = {rows for _, rows in self._bound}
            if rows not in sizes and len(sizes) >= _KEPT_BINDINGS:
                oldest = next(size for size in sizes if size != 1)  # decode's bindings stay
                self._bound = {k: call for k, call in self._bound.items() if k[1] != oldest}
            self._bound[key] = self._bind(file, run(), repeatable=rows == 1)
        return self._bound[key]

    def _bind(self, file: str, run: StageRun, *, repeatable: bool) -> Callable[[], None]:
        host = {name: self._host[r.buffer] for name, r in run.inputs.items() if name in self._host}
        inputs, outputs = (
            {
                name: Tensor.at(self._base[region.buffer], region)
                for name, region in side.items()
                if name not in host
            }
            for side in (run.inputs, run.outputs)
        )
        bound = BoundRun(inputs, outputs, run.aliases, repeatable, host)
        return self._stages.load(file).bind(bound)
