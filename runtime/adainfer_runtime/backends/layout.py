"""Where every tensor of a sequence lies: the same for all back ends, whatever memory they use.

A layout says which buffers a sequence needs, and for each run of a stage which region of which
buffer each input and output is. A back end allocates the buffers and binds the regions; it knows no
operator and no dialect. What depends on the positions of a pass comes from the manifest: two
lengths (GroupQueryAttention), or the stage `positions` (standard operators).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..manifest import KvGeometry, Manifest, StageSpec, TensorSpec

__all__ = [
    "CANDIDATE_ROWS",
    "FIRST_POSITION",
    "HOST_BUFFERS",
    "ITEM_BYTES",
    "PROBED_ROWS",
    "BufferSpec",
    "CacheRows",
    "Region",
    "SequenceLayout",
    "StageRun",
    "hidden_buffer",
    "kv_geometry",
]

Int64 = npt.NDArray[np.int64]
ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "bool": 1,
    "int8": 1,
    "int32": 4,
    "int64": 8,
}
# Read on the host by whoever launches a kernel (GroupQueryAttention), on a GPU as well.
HOST_BUFFERS = frozenset({"total_sequence_length"})
# Of layers that rotate before the attention and compute no positions themselves.
FIRST_POSITION = "first_position"
PROBED_ROWS = 32  # positions whose logits a device computes at once
CANDIDATE_ROWS = 512  # rows of the head that a plan takes at once
_EMBED_POSITIONS = "embed_position_ids"  # of models with learned positions
_SINKS = 1  # rows of a prefix cache before the first position


@dataclass(frozen=True)
class BufferSpec:
    """A buffer that a sequence owns: `shape` elements of `dtype`, zeros at first."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Region:
    """A tensor: `shape` elements of `dtype` from byte `offset` of a buffer on, contiguous."""

    buffer: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class CacheRows:
    """Where K or V of some positions lie in a layer's buffer: `shape[0]` runs of `shape[1]`
    elements each, from byte `offset` on, `pitch` bytes from one to the next.
    """

    offset: int
    pitch: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class StageRun:
    """What one run of a stage reads and writes, by the names of the graph.

    `aliases` are pairs (input, output) that must be one address: caches written in place.
    """

    inputs: Mapping[str, Region]
    outputs: Mapping[str, Region]
    aliases: tuple[tuple[str, str], ...] = field(default=())


def hidden_buffer(index: int) -> str:
    """The buffer that layer stage `index` reads; it writes the other one."""
    return f"hidden.{index % 2}"


class SequenceLayout:
    """The layout of an engine folder's sequences, passes of at most `max_rows` positions."""

    def __init__(self, manifest: Manifest, max_rows: int) -> None:
        self._manifest = manifest
        self._kv = manifest.kv
        self._width = manifest.model.hidden_size
        self._max_rows = max_rows
        self._learned = "position_ids" in manifest.embed.inputs
        self._prefix = manifest.kv.layout == "prefix"
        self._told = any(FIRST_POSITION in stage.inputs for stage in manifest.layer_stages)

    @property
    def varies_with_past(self) -> bool:
        """Whether regions of layer stages depend on the number of earlier positions."""
        return self._prefix

    def buffers(self) -> dict[str, BufferSpec]:
        """Every buffer of one sequence."""
        kv = self._kv
        found = {
            "input_ids": BufferSpec("int64", (self._max_rows,)),
            "hidden.0": BufferSpec("float32", (self._max_rows, self._width)),
            "hidden.1": BufferSpec("float32", (self._max_rows, self._width)),
        }
        for layer in range(1, self._manifest.model.num_layers + 1):
            for part in ("key", "value"):
                found[f"{part}.{layer}"] = BufferSpec(kv.dtype, self._cache_shape(layer))
        if self._learned:
            found[_EMBED_POSITIONS] = BufferSpec("int64", (self._max_rows,))
        most = self._host_inputs(self._max_rows, max(0, kv.max_length - self._max_rows))
        for name, array in most.items():
            found[name] = BufferSpec(str(array.dtype), array.shape)
        for tensor in self._manifest.pass_tensors:
            largest = _resolve(tensor, self._max_rows, self._keys(kv.max_length))
            found[tensor.name] = BufferSpec(tensor.dtype, largest)
        return found

    def host_inputs(self, rows: int, past: int) -> dict[str, npt.NDArray[np.generic]]:
        """Values that the host gives for a pass, by buffer: lengths, or positions."""
        return self._host_inputs(rows, past)

    def host_numbers(self, rows: int, past: int) -> Mapping[str, int] | None:
        """`host_inputs` where each of them is a single number, which makes no arrays; else None."""
        if self._manifest.positions is not None:
            return None
        last = past + rows - 1
        numbers = {"seqlens_k": last, "total_sequence_length": last + 1}
        return numbers | {FIRST_POSITION: past} if self._told else numbers

    def embed(self, rows: int) -> StageRun:
        """The embedding stage: writes hidden buffer 0."""
        inputs = {"input_ids": Region("input_ids", "int64", (1, rows))}
        if self._learned:
            inputs["position_ids"] = Region(_EMBED_POSITIONS, "int64", (1, rows))
        return StageRun(inputs, {"hidden": self._hidden(0, rows)})

    def embed_inputs(self, tokens: npt.NDArray[np.int64], start: int) -> dict[str, Int64]:
        """Values that the host gives to the embedding of `[rows]` token ids from `start` on, by
        buffer.
        """
        values = {"input_ids": np.ascontiguousarray(tokens, np.int64)}
        if self._learned:
            values[_EMBED_POSITIONS] = np.arange(start, start + len(tokens), dtype=np.int64)
        return values

    def positions(self, rows: int, past: int) -> StageRun | None:
        """The stage `positions`, where there is one: runs once per pass, before layer stages."""
        spec = self._manifest.positions
        if spec is None:
            return None
        values = self._host_inputs(rows, past)
        inputs = {name: _whole(name, values[name]) for name in spec.inputs if name in values}
        keys = self._keys(past + rows)
        outputs = {
            tensor.name: Region(tensor.name, tensor.dtype, _resolve(tensor, rows, keys))
            for tensor in self._manifest.pass_tensors
        }
        return StageRun(inputs, outputs)

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Buffers of K and V, which sequences of a batch have in one block each."""
        layers = range(1, self._manifest.model.num_layers + 1)
        return tuple(f"{part}.{layer}" for layer in layers for part in ("key", "value"))

    def batch_buffers(self, slots: int) -> dict[str, BufferSpec]:
        """What several sequences share: a row of hidden states each, lengths, blocks of caches."""
        own = self.buffers()
        found = {
            name: BufferSpec("float32", (slots, self._width)) for name in ("hidden.0", "hidden.1")
        }
        for name in self.cache_names:
            found[name] = BufferSpec(own[name].dtype, (slots, *own[name].shape[1:]))
        for name, values in self.batch_inputs((0,) * slots).items():
            found[name] = BufferSpec(str(values.dtype), values.shape)
        return found

    def batch_inputs(self, pasts: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
        """`host_inputs` of passes whose last position has `pasts` before it, one per sequence."""
        return {
            "seqlens_k": np.array(pasts, np.int32),
            "total_sequence_length": np.array(max(pasts) + 1, np.int32),
        }

    def batch_stage(self, index: int, first: int, count: int) -> StageRun:
        """Layer stage `index` over a position of each of the sequences in the slots `first` …
        `first + count - 1`.
        """
        run = self.stage(index, 1, 0)
        lengths = self.batch_inputs((0,) * count)
        caches = frozenset(self.cache_names)

        def widened(region: Region) -> Region:
            if region.buffer in lengths:
                return _whole(region.buffer, lengths[region.buffer])
            offset = first * region.bytes if region.buffer in caches else 0
            return Region(region.buffer, region.dtype, (count, *region.shape[1:]), offset)

        return StageRun(
            {name: widened(region) for name, region in run.inputs.items()},
            {name: widened(region) for name, region in run.outputs.items()},
            run.aliases,
        )

    def stage(self, index: int, rows: int, past: int) -> StageRun:
        """Layer stage `index` (0-based) over `rows` positions behind `past` earlier ones."""
        spec = self._manifest.layer_stages[index]
        inputs = {"hidden": self._hidden(index, rows)}
        outputs = {"next_hidden": self._hidden(index + 1, rows)}
        inputs.update(self._pass_inputs(spec, rows, past))
        aliases = []
        for layer in range(spec.first_layer, spec.last_layer + 1):
            for part in ("key", "value"):
                before, after = f"past_{part}.{layer}", f"present_{part}.{layer}"
                inputs[before], outputs[after] = self._cache(part, layer, rows, past)
                if not self._prefix:
                    aliases.append((before, after))
        return StageRun(inputs, outputs, tuple(aliases))

    def cache_view(self, layer: int, buffer: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """View of a layer's cache buffer as `[kv_heads, max_length, head_dim]`."""
        kv = self._kv
        if not self._prefix:
            return np.asarray(buffer[0])
        rows = buffer[0, _SINKS:, : kv.heads(layer) * kv.head_dim]
        by_head = rows.reshape(kv.max_length, kv.heads(layer), kv.head_dim)
        return np.transpose(by_head, (1, 0, 2))

    def cache_rows(self, layer: int, start: int, rows: int) -> CacheRows:
        """Positions from `start` on of a layer's K or V."""
        kv, item = self._kv, ITEM_BYTES[self._kv.dtype]
        heads = kv.heads(layer)
        if kv.row_elements is not None:
            pitch = kv.row_elements * item
            return CacheRows((_SINKS + start) * pitch, pitch, (rows, heads * kv.head_dim))
        row = kv.head_dim * item
        return CacheRows(start * row, kv.max_length * row, (heads, rows * kv.head_dim))

    def to_runs(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`[kv_heads, rows, head_dim]` as `cache_rows` has it in memory."""
        by_run = np.transpose(values, (1, 0, 2)) if self._prefix else values
        return np.ascontiguousarray(by_run).reshape(len(by_run), -1)

    def from_runs(self, runs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of `to_runs`."""
        width = self._kv.head_dim
        by_run = runs.reshape(len(runs), runs.shape[1] // width, width)
        return np.transpose(by_run, (1, 0, 2)) if self._prefix else by_run

    def _pass_inputs(self, spec: StageSpec, rows: int, past: int) -> Iterator[tuple[str, Region]]:
        values = self._host_inputs(rows, past)
        keys = self._keys(past + rows)
        shared = {tensor.name: tensor for tensor in self._manifest.pass_tensors}
        for name in spec.inputs:
            if name in values:
                yield name, _whole(name, values[name])
            elif name in shared:
                tensor = shared[name]
                yield name, Region(name, tensor.dtype, _resolve(tensor, rows, keys))

    def _cache_shape(self, layer: int) -> tuple[int, ...]:
        kv = self._kv
        if kv.row_elements is not None:
            return 1, _SINKS + kv.max_length, kv.row_elements
        return 1, kv.heads(layer), kv.max_length, kv.head_dim

    def _cache(self, part: str, layer: int, rows: int, past: int) -> tuple[Region, Region]:
        kv, buffer = self._kv, f"{part}.{layer}"
        if kv.row_elements is None:
            whole = Region(buffer, kv.dtype, self._cache_shape(layer))
            return whole, whole
        filled = _SINKS + past
        start = filled * kv.row_elements * ITEM_BYTES[kv.dtype]
        return (
            Region(buffer, kv.dtype, (1, filled, kv.row_elements)),
            Region(buffer, kv.dtype, (1, rows, kv.row_elements), start),
        )

    def _hidden(self, index: int, rows: int) -> Region:
        return Region(hidden_buffer(index), "float32", (1, rows, self._width))

    def _keys(self, length: int) -> int:
        return _SINKS + length if self._prefix else self._kv.max_length

    def _host_inputs(self, rows: int, past: int) -> dict[str, npt.NDArray[np.generic]]:
        if self._manifest.positions is None:
            lengths = self.batch_inputs((past + rows - 1,))
            return lengths | ({FIRST_POSITION: np.array([past], np.int64)} if self._told else {})
        values: dict[str, npt.NDArray[np.generic]] = {
            "position_ids": np.arange(past, past + rows, dtype=np.int64)[None]
        }
        if self._prefix:
            values["key_positions"] = np.arange(-_SINKS, past + rows, dtype=np.int64)[None]
        else:
            values["write_indices"] = np.array([past], np.int64)
        return values


def _whole(name: str, array: npt.NDArray[np.generic]) -> Region:
    return Region(name, str(array.dtype), array.shape)


def _resolve(tensor: TensorSpec, rows: int, keys: int) -> tuple[int, ...]:
    sizes = {"rows": rows, "keys": keys}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def _padded(kv_heads: int, head_dim: int, dtype: str, alignment: int = 256) -> int:
    """Elements of a row of a prefix cache: the next multiple of `alignment` bytes."""
    item = ITEM_BYTES[dtype]
    return -(-kv_heads * head_dim * item // alignment) * alignment // item


def kv_geometry(
    layout: str,
    dtype: str,
    layer_heads: Sequence[int],
    head_dim: int,
    max_length: int,
    scales: str | None = None,
) -> KvGeometry:
    """The manifest's record of a cache; `layer_heads` are the heads of K and V of each layer,
    `scales` is the file of those of int8.
    """
    kv_heads = max(layer_heads)
    padded = _padded(kv_heads, head_dim, dtype) if layout == "prefix" else None
    return KvGeometry.model_validate(
        {
            "layout": layout,
            "dtype": dtype,
            "num_heads": kv_heads,
            "layer_heads": tuple(layer_heads) if len(set(layer_heads)) > 1 else (),
            "head_dim": head_dim,
            "max_length": max_length,
            "row_elements": padded,
            "scales": scales,
        }
    )
