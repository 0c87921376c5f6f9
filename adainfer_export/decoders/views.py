"""Tensors as the graph wants them, over tensors as a checkpoint stores them.

Families fuse Q, K and V, store weights `[in, out]`, or keep a norm's weight minus one. A decoder
names plain tensors all the same, and says by a `View` what each is made of; everything behind it
(packing, quantisation, writing) sees plain tensors alone.
"""

from __future__ import annotations

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
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    rows: tuple[int, int] | None = None
    heads: Heads | None = None
    add: float = 0.0

    @property
    def result(self) -> tuple[int, ...]:
        """The shape of the graph's tensor."""
        first, *rest = self.shape[::-1] if self.transposed else self.shape
        if self.rows is not None:
            first = self.rows[1] - self.rows[0]
        if self.heads is not None:
            first //= self.heads.parts
        return (first, *rest)

    def of(self, stored: Float32) -> Float32:
        """The graph's tensor, from the stored one."""
        value = stored.T if self.transposed else stored
        if self.rows is not None:
            value = value[slice(*self.rows)]
        if self.heads is not None:
            split = value.reshape(self.heads.count, self.heads.parts, -1, *value.shape[1:])
            value = split[:, self.heads.part].reshape(-1, *value.shape[1:])
        if self.add:
            value = value + np.float32(self.add)
        return np.ascontiguousarray(value)
