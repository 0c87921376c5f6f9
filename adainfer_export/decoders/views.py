"""Tensors as the graph wants them, over tensors as a checkpoint stores them.

Families fuse Q, K and V, store weights `[in, out]`, or keep a norm's weight minus one. A decoder
names plain tensors all the same, and says by a `View` what each is made of; everything behind it
(packing, quantisation, writing) sees plain tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Heads", "View"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Heads:
    """Axis 0 is `[count, parts, width]`, interleaved head by head: of each head take one part."""

    count: int
    parts: int
    part: int


@dataclass(frozen=True)
class View:
    """What one tensor of the graph is made of, applied in the order of the attributes.

    Attributes:
        tensor: name in the checkpoint.
        shape: the shape that it has there.
        transposed: stored as `[in, out]`.
        rows: first row and the one behind the last.
        heads: see `Heads`; instead of `rows`.
        add: to every element.
        padded: the shape of the graph's tensor, where zeros follow in rows or columns.
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    rows: tuple[int, int] | None = None
    heads: Heads | None = None
    add: float = 0.0
    padded: tuple[int, ...] | None = None

    @property
    def result(self) -> tuple[int, ...]:
        """The shape of the graph's tensor."""
        return self.padded or self._unpadded

    @property
    def _unpadded(self) -> tuple[int, ...]:
        length, *rest = self.shape[::-1] if self.transposed else self.shape
        if self.rows is not None:
            length = self.rows[1] - self.rows[0]
        if self.heads is not None:
            length //= self.heads.parts
        return (length, *rest)

    @property
    def keeps_values(self) -> bool:
        """Whether it merely chooses rows."""
        return not self.transposed and not self.add and self.padded is None

    def ranges(self, rows: slice) -> list[slice]:
        """Rows of what is stored (columns if `transposed`) that make rows of the graph's tensor.

        None of them where all of these are zeros.
        """
        length = self._unpadded[0]
        rows = slice(min(rows.start, length), min(rows.stop, length))
        if rows.start == rows.stop:
            return []
        if self.heads is None:
            first = 0 if self.rows is None else self.rows[0]
            return [slice(first + rows.start, first + rows.stop)]
        width = length // self.heads.count
        found = []
        for head in range(rows.start // width, -(-rows.stop // width)):
            start, stop = max(rows.start, head * width), min(rows.stop, (head + 1) * width)
            # So many rows of other parts and heads stand before it.
            skipped = (head * (self.heads.parts - 1) + self.heads.part) * width
            found.append(slice(skipped + start, skipped + stop))
        return found

    def join(self, pieces: Sequence[Float32], count: int) -> Float32:
        """So many of the graph's rows, from what `ranges` named."""
        if not pieces:
            return np.zeros((count, *self.result[1:]), np.float32)
        value = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)
        value = value + np.float32(self.add) if self.add else value
        if self.padded is not None:
            shape = (count, *self.padded[1:])
            value = np.pad(value, [(0, n - m) for n, m in zip(shape, value.shape, strict=True)])
        return np.ascontiguousarray(value)

    def of(self, stored: Float32, rows: slice | None = None) -> Float32:
        """The graph's tensor or rows of it, from all that is stored."""
        value = stored.T if self.transposed else stored
        rows = rows or slice(0, self.result[0])
        return self.join([value[part] for part in self.ranges(rows)], rows.stop - rows.start)
