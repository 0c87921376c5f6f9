"""Linear layers that GPTQ or AWQ packed, in safetensors: codes, zero points and scales.

For a linear layer of `out` rows and `in` columns, groups of `group_size` along `in`:

    GPTQ  qweight int32 [in*bits/32, out], packed along `in`, lowest bits first;
          qzeros int32 [groups, out*bits/32], packed along `out`, holding zero - 1 (format "gptq")
          or zero ("gptq_v2"); scales f16 [groups, out]; g_idx int32 [in]: the group of a column
    AWQ   (version "gemm") qweight int32 [in, out/8] and qzeros int32 [groups, out/8], packed along
          `out` in the order 0 2 4 6 1 3 5 7; scales f16 [groups, out]

    w = (code - zero) * scale

(AutoGPTQ's `QuantLinear.pack`, AutoAWQ's `WQLinear_GEMM.from_linear`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, UnsupportedError
from ..quantise import BlockRows, Blocks
from .tensor_files import Tensors

__all__ = ["PackedLinears"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What is added to a stored zero point, by the form; the first form is the default one.
_ZERO_OFFSETS = {"gptq": {"gptq": 1, "gptq_v2": 0}, "awq": {"gemm": 0}}
# Where settings name the form: the older key decides, as in transformers.
_FORM_KEYS = {"gptq": ("checkpoint_format", "format"), "awq": ("version", "format")}
_LARGEST_BLOCK = 128
_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class _Groups:
    """Rows of a layer: codes `[rows, in]`, zeros and scales `[rows, groups]`."""

    codes: npt.NDArray[np.uint8]
    zeros: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float32]


class PackedLinears:
    """The packed layers of one checkpoint.

    Raises:
        UnsupportedError: another method, or a form of these two that cannot be read.
    """

    def __init__(self, files: Tensors, settings: Mapping[str, Any]) -> None:
        self._files = files
        where = files.folder
        self._method = str(settings.get("quant_method"))
        self._bits: Literal[4, 8] = _as_number(settings.get("bits", 4))
        if self._method not in ("gptq", "awq"):
            raise UnsupportedError(
                f"{where}: quantised with {self._method!r}, which is not supported (supported: "
                "gptq, awq); export from the fp16 or bf16 checkpoint"
            )
        if self._bits not in ((4,) if self._method == "awq" else (4, 8)):
            raise UnsupportedError(
                f"{where}: {self._method} with {self._bits} bits is not supported"
            )
        offsets, keys = _ZERO_OFFSETS[self._method], _FORM_KEYS[self._method]
        key = next((key for key in keys if settings.get(key)), None)
        form = str(settings[key]).lower() if key else next(iter(offsets))
        if form not in offsets:
            raise UnsupportedError(
                f"{where}: {self._method} with {key} {form!r} is not supported "
                f"(supported: {', '.join(offsets)})"
            )
        self._zero_offset = offsets[form]

    def holds(self, name: str) -> bool:
        """Whether this weight (`….weight`) is packed."""
        return name.endswith(".weight") and f"{_stem(name)}.qweight" in self._files.table

    def tensors(self, name: str) -> tuple[str, ...]:
        """The stored tensors of a packed weight."""
        fields = ("qweight", "qzeros", "scales", "g_idx")
        return tuple(
            f"{_stem(name)}.{field}"
            for field in fields
            if f"{_stem(name)}.{field}" in self._files.table
        )

    def shape(self, name: str) -> tuple[int, int]:
        """`[out, in]`."""
        rows, columns = self._files.info(f"{_stem(name)}.qweight").shape
        per_word = 32 // self._bits
        shape = (columns * per_word, rows) if self._method == "awq" else (columns, rows * per_word)
        groups, out = self._files.info(f"{_stem(name)}.scales").shape
        if out != shape[0] or shape[1] % groups:
            raise CheckpointError(
                f"{self._files.folder}: {_stem(name)} has {shape[0]} rows of {shape[1]} packed "
                f"values, but scales of shape [{groups}, {out}]; the checkpoint is damaged"
            )
        return shape

    def read(self, name: str, rows: slice) -> npt.NDArray[np.float32]:
        """Rows as float32 `[rows, in]`."""
        found, of_column = self._groups(name, rows), self._group_of_column(name)
        values: npt.NDArray[np.float32] = found.codes - found.zeros[:, of_column]
        values *= found.scales[:, of_column]
        return values

    def blocks(self, name: str) -> Blocks | None:
        """None where columns are in an order of their own (GPTQ's act-order)."""
        group = self._group_size(name)
        size = min(group & -group, _LARGEST_BLOCK)  # the largest power of two that divides it
        in_order = np.arange(self.shape(name)[1]) // group
        if size < _SMALLEST_BLOCK or not np.array_equal(self._group_of_column(name), in_order):
            return None
        zeros = self._zeros(name, slice(0, self.shape(name)[0]))
        shifted = bool((zeros != 2 ** (self._bits - 1)).any())
        return Blocks(self._bits, size, kept=True, shifted=shifted)

    def read_blocks(self, name: str, rows: slice) -> BlockRows:
        """Rows of codes; a group becomes one or several blocks with the same scale."""
        blocks, found = self.blocks(name), self._groups(name, rows)
        assert blocks is not None  # only asked for where there are
        times = self._group_size(name) // blocks.block_size
        scales = np.repeat(found.scales, times, axis=1)
        shifts = None
        if blocks.shifted:
            half = np.float32(2 ** (self._bits - 1))
            shifts = np.repeat((half - found.zeros) * found.scales, times, axis=1)
        codes = found.codes.reshape(*scales.shape, blocks.block_size)
        return BlockRows(codes, scales, shifts)

    def _groups(self, name: str, rows: slice) -> _Groups:
        per_word = 32 // self._bits
        first = rows.start // per_word * per_word
        last = -(-rows.stop // per_word) * per_word
        wanted = slice(rows.start - first, rows.stop - first)
        stem = _stem(name)
        if self._method == "awq":
            words = self._words(f"{stem}.qweight", slice(first // per_word, last // per_word))
            codes = self._unpack(words).T[wanted]
        else:
            words = self._words(f"{stem}.qweight", rows)
            codes = self._unpack(words.T)  # [rows, in]
        scales = self._files.read(f"{stem}.scales", slice(None), rows).float().numpy().T
        zeros = self._zeros(name, slice(first, last))[wanted]
        return _Groups(np.ascontiguousarray(codes), zeros, np.ascontiguousarray(scales))

    def _zeros(self, name: str, rows: slice) -> npt.NDArray[np.float32]:
        """`[rows, groups]`; rows begin and end at whole words."""
        per_word = 32 // self._bits
        part = slice(rows.start // per_word, rows.stop // per_word)
        words = self._words(f"{_stem(name)}.qzeros", part)
        return np.ascontiguousarray(self._unpack(words).T.astype(np.float32) + self._zero_offset)

    def _words(self, name: str, columns: slice) -> npt.NDArray[np.uint32]:
        info = self._files.info(name)
        if info.dtype != "I32":
            raise CheckpointError(
                f"{self._files.folder}: tensor {name} has dtype {info.dtype}, expected I32"
            )
        words: npt.NDArray[np.int32] = self._files.read(name, slice(None), columns).numpy()
        return words.view(np.uint32) if words.flags.c_contiguous else words.copy().view(np.uint32)

    def _unpack(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
        """`[n, words]` to `[n, values]`."""
        per_word = 32 // self._bits
        shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(self._bits)
        values = (words[:, :, None] >> shifts) & np.uint32(2**self._bits - 1)
        if self._method == "awq":
            values = values[:, :, np.argsort(_AWQ_ORDER)]
        return values.reshape(words.shape[0], -1).astype(np.uint8)

    def _group_size(self, name: str) -> int:
        groups = self._files.info(f"{_stem(name)}.scales").shape[0]
        return self.shape(name)[1] // groups

    @lru_cache(maxsize=4)  # noqa: B019 - lives as long as the checkpoint
    def _group_of_column(self, name: str) -> npt.NDArray[np.int64]:
        columns = np.arange(self.shape(name)[1])
        index = f"{_stem(name)}.g_idx"
        if index not in self._files.table:
            return columns // self._group_size(name)
        found: npt.NDArray[np.int64] = self._files.read(index).long().numpy()
        groups = self._files.info(f"{_stem(name)}.scales").shape[0]
        if found.shape != columns.shape or found.min() < 0 or found.max() >= groups:
            raise CheckpointError(
                f"{self._files.folder}: {index} does not name one of {groups} groups for each of "
                f"{len(columns)} columns; the checkpoint is damaged"
            )
        return found


def _as_number(bits: Any) -> Any:
    """Some tools write numbers as texts."""
    return int(bits) if isinstance(bits, str) and bits.isdecimal() else bits


def _stem(name: str) -> str:
    return name.removesuffix(".weight")
