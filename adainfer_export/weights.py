"""What an initialiser of a stage is made of: expressions over checkpoint tensors.

Graphs are lowered before any weight is read. Lowering only notes, per initialiser, the expression
that will give its value; the writer streams them by rows and writes equal ones once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import UnsupportedError
from .float8 import dequantise_float8, quantise_float8
from .gptq import ErrorFeedback
from .int4 import dequantise_int4, quantise_int4
from .int8 import dequantise_int8, quantise_int8
from .quantise import Blocks, pack, quantise_blocks
from .sources.checkpoint import Checkpoint

__all__ = [
    "FIELDS",
    "AsIs",
    "Blocked",
    "Columns",
    "Dense",
    "ElementName",
    "ErrorSum",
    "Feedbacks",
    "Rows",
    "Stored",
    "WeightExpr",
    "stream",
]

_VALUES_AT_ONCE = 1 << 22  # 16 MB in float32
FIELDS = ("packed", "low", "scales", "shifts")
_Array = npt.NDArray[Any]
ElementName = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_CODES = {"int4": np.uint8, "int8": np.int8, "float8": ml_dtypes.float8_e4m3fn}


@dataclass(frozen=True)
class Dense:
    """Checkpoint tensors concatenated along axis 0, then transposed if asked, as `dtype`."""

    parts: tuple[str, ...]
    transpose: bool = False
    dtype: ElementName = "float32"


@dataclass(frozen=True)
class Blocked:
    """One of the tensors of a matrix `[out, in]` in blocks (see `quantise`).

    `packed` are the codes and `scales` theirs, in `dtype`. Of kept blocks with 8 bits `packed`
    holds the high halves and `low` the low ones; `shifts` what is added to a block.
    """

    parts: tuple[str, ...]
    blocks: Blocks
    field: Literal["packed", "low", "scales", "shifts"]
    dtype: ElementName = "float32"


@dataclass(frozen=True)
class Columns:
    """One of the tensors of a matrix that is stored transposed (see `int4`, `int8` and `float8`).

    Of 8-bit codes a block is a whole column. Codes depend on `dtype`, the scales': both fields
    name the same one.
    """

    parts: tuple[str, ...]
    codes: Literal["int4", "int8", "float8"]
    blocks: Blocks
    field: Literal["packed", "scales"]
    dtype: ElementName = "float32"


@dataclass(frozen=True)
class AsIs:
    """One tensor of a source that is ONNX already, in the type that it has there."""

    parts: tuple[str]


Stored = Dense | Blocked | Columns | AsIs


@dataclass(frozen=True)
class Rows:
    """Rows `start … end-1` of `total` of what is stored already: a reference into it."""

    whole: Dense | Blocked
    start: int
    end: int
    total: int


WeightExpr = Stored | Rows

# By tensor name: how errors of 4-bit rounding are made up for, where they are.
Feedbacks = Mapping[str, ErrorFeedback]
_NO_FEEDBACKS: Feedbacks = {}


@dataclass
class ErrorSum:
    """Squares over the values of a matrix: of what quantisation changed, and of the values."""

    error: float = 0.0
    values: float = 0.0

    @property
    def relative(self) -> float:
        """Relative root-mean-square error."""
        return (self.error / self.values) ** 0.5 if self.values else 0.0


def stream(
    checkpoint: Checkpoint,
    exprs: Sequence[Stored],
    errors: ErrorSum,
    feedbacks: Feedbacks = _NO_FEEDBACKS,
) -> Iterator[tuple[Stored, _Array]]:
    """Values of expressions over the same parts, in their order, each in consecutive pieces.

    Args:
        exprs: one dense, or fields of one matrix in the order of `FIELDS`, `packed` first.
        errors: takes up what quantisation changes.
        feedbacks: of tensors whose rounding errors are made up for; those of others are not.

    Raises:
        CheckpointError: a tensor is missing, damaged or not finite.
        UnsupportedError: a value leaves the range of float16.
    """
    first = exprs[0]
    pieces = list(_pieces(checkpoint, first.parts))
    if isinstance(first, AsIs):
        yield from ((first, checkpoint.read(name, rows)) for name, rows in pieces)
        return
    if isinstance(first, Dense):
        arrays = _dense(checkpoint, first, pieces)
        yield from ((first, _as_type(array, first.dtype)) for array in arrays)
        return
    if isinstance(first, Columns):
        fields = _columns(checkpoint, first, pieces, errors, feedbacks)
        yield from ((expr, fields[expr.field]) for expr in exprs if isinstance(expr, Columns))
        return

    # Gathered in place: pieces kept one by one between larger ones that go fragment the heap.
    later: dict[Stored, _Array] = {}
    total, at = sum(rows.stop - rows.start for _, rows in pieces), 0
    for name, part in pieces:
        rows = _rows(checkpoint, first.blocks, name, part, feedbacks)
        errors.error += rows.error.error
        errors.values += rows.error.values
        packed = rows.fields["packed"]
        yield first, packed
        for expr in exprs[1:]:
            assert isinstance(expr, Blocked)  # fields of one matrix
            array = rows.fields[expr.field]
            if expr.field != "low":
                array = _as_type(array, expr.dtype)
            if expr not in later:
                later[expr] = np.empty((total, *array.shape[1:]), array.dtype)
            later[expr][at : at + len(array)] = array
        at += len(packed)
    yield from later.items()


@dataclass(frozen=True)
class _Rows:
    fields: dict[str, _Array]
    error: ErrorSum


def _rows(
    checkpoint: Checkpoint, blocks: Blocks, name: str, rows: slice, feedbacks: Feedbacks
) -> _Rows:
    if not blocks.kept:
        feedback = feedbacks.get(name) if blocks.bits == 4 else None
        values = checkpoint.read(name, rows)
        made = quantise_blocks(values, blocks.bits, blocks.block_size, feedback)
        error = ErrorSum(made.squared_error, made.squared)
        return _Rows({"packed": made.packed, "scales": made.scales}, error)
    kept = checkpoint.read_blocks(name, rows)
    shifts = np.zeros_like(kept.scales) if kept.shifts is None else kept.shifts
    if blocks.bits == 4:
        fields = {"packed": pack(kept.codes, 4)}
    else:
        fields = {
            "packed": pack(kept.codes >> np.uint8(4), 4),
            "low": pack(kept.codes & np.uint8(15), 4),
        }
        # 16 (high - 8) + (low - 8) is the code less 136, not less 128.
        shifts = shifts + 8 * kept.scales
    return _Rows({**fields, "scales": kept.scales, "shifts": shifts}, ErrorSum())


def _columns(
    checkpoint: Checkpoint,
    expr: Columns,
    pieces: list[tuple[str, slice]],
    errors: ErrorSum,
    feedbacks: Feedbacks,
) -> dict[str, _Array]:
    """Both fields, with rows of the matrix as columns."""
    blocks, width = expr.blocks, checkpoint.shape(expr.parts[0])[1]
    total = sum(rows.stop - rows.start for _, rows in pieces)
    packed = np.empty((width, total * blocks.bits // 8), _CODES[expr.codes])
    scales = np.empty((width // blocks.block_size, total), _DTYPES[expr.dtype])
    at = 0
    for name, rows in pieces:
        values = checkpoint.read(name, rows)
        codes, steps, stored = _encode(expr, values, feedbacks.get(name))
        end = at + len(values)
        packed[:, at * blocks.bits // 8 : end * blocks.bits // 8] = codes
        scales[:, at:end] = steps
        lost = stored - values
        errors.error += float(np.vdot(lost, lost))
        errors.values += float(np.vdot(values, values))
        at = end
    return {"packed": packed, "scales": scales}


def _encode(
    expr: Columns, values: npt.NDArray[np.float32], feedback: ErrorFeedback | None
) -> tuple[_Array, _Array, _Array]:
    """Codes, scales, and the values that they stand for."""
    dtype = _DTYPES[expr.dtype]
    if expr.codes == "float8":
        codes, scales = quantise_float8(values, dtype)
        return codes, scales, dequantise_float8(codes, scales)
    if expr.codes == "int8":
        bytes_, largest = quantise_int8(values)
        return bytes_, largest, dequantise_int8(bytes_, largest)
    packed, steps = quantise_int4(values, expr.blocks.block_size, dtype, feedback)
    return packed, steps, dequantise_int4(packed, steps)


def _as_type(array: _Array, dtype: ElementName) -> _Array:
    with np.errstate(over="ignore"):
        converted = array.astype(_DTYPES[dtype], copy=False)
    if dtype == "float16" and not np.isfinite(converted).all():
        raise UnsupportedError(
            "a weight leaves the range of float16: export with --precision bf16 or fp32"
        )
    return converted


def _dense(
    checkpoint: Checkpoint, expr: Dense, pieces: list[tuple[str, slice]]
) -> Iterator[_Array]:
    if not expr.transpose:
        yield from (checkpoint.read(name, rows) for name, rows in pieces)
        return
    total = sum(rows.stop - rows.start for _, rows in pieces)
    transposed = np.empty((checkpoint.shape(expr.parts[0])[1], total), np.float32)
    at = 0
    for name, rows in pieces:
        count = rows.stop - rows.start
        transposed[:, at : at + count] = checkpoint.read(name, rows).T
        at += count
    yield transposed


def _pieces(checkpoint: Checkpoint, parts: tuple[str, ...]) -> Iterator[tuple[str, slice]]:
    for name in parts:
        rows, *rest = checkpoint.shape(name)
        step = max(8, _VALUES_AT_ONCE // max(1, int(np.prod(rest))) // 8 * 8)
        for start in range(0, rows, step):
            yield name, slice(start, min(start + step, rows))
