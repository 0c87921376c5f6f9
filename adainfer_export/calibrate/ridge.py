"""Ridge adapters: affine maps from the hidden state after a layer to the final one.

A "tuned lens" (arXiv 2303.08112) in closed form. With weights w, centred x and y,

    A = I + (Xᵀ W X + λ D)⁻¹ Xᵀ W (Y − X),    b = mean(y) − mean(x) A,

where D is the diagonal of Xᵀ W X: the penalty pulls towards the identity, and each coordinate by
its own variance. (A few coordinates of the residual stream are hundreds of times larger than the
rest; a common penalty in proportion to them would leave nothing of the others.)
Only second moments are kept, `[hidden, hidden]` twice per layer, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import linalg

from ..errors import CalibrationError
from .affine import AffineMap

__all__ = ["Moments"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 1024


class Moments:
    """Weighted first and second moments of (x, y) pairs, added up batch by batch.

    Args:
        width: of x.
        outputs: width of y; default: the same.
    """

    def __init__(self, width: int, outputs: int | None = None) -> None:
        outputs = width if outputs is None else outputs
        self._weight = 0.0
        self._x = np.zeros(width)
        self._y = np.zeros(outputs)
        self._xx = np.zeros((width, width))
        self._xy = np.zeros((width, outputs))
        self._waiting: list[tuple[Float32, Float32, Float32]] = []

    @classmethod
    def sum_of(cls, parts: Sequence[Moments]) -> Moments:
        """Of all their rows together; there is one at least, and they are of the same widths."""
        total = cls(*parts[0]._xy.shape)
        for part in parts:
            part._add_waiting()
            total._weight += part._weight
            total._x += part._x
            total._y += part._y
            total._xx += part._xx
            total._xy += part._xy
        return total

    def add(self, x: Float32, y: Float32, weight: Float32) -> None:
        """Adds rows: x `[rows, width]`, y `[rows, outputs]`, weight `[rows]`."""
        self._waiting.append((x, y, weight))
        if sum(len(rows) for _, _, rows in self._waiting) >= _ROWS_AT_ONCE:
            self._add_waiting()

    def _add_waiting(self) -> None:
        # Few large products: small ones would keep BLAS's threads spinning beside the engine's.
        if not self._waiting:
            return
        x, y, weight = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        weighted = x * weight[:, None]
        self._weight += float(weight.sum())
        self._x += weighted.sum(axis=0)
        self._y += weight @ y
        self._xx += weighted.T @ x
        self._xy += weighted.T @ y

    def inputs(self) -> tuple[Float64, Float64]:
        """Mean `[width]` and covariance `[width, width]` of x."""
        self._add_waiting()
        mean = self._x / self._weight
        return mean, self._xx / self._weight - np.outer(mean, mean)

    def solve(self, strength: float) -> AffineMap:
        """The adapter for a ridge strength λ (relative to each coordinate's variance).

        Raises:
            CalibrationError: nothing was added, or it is not finite.
        """
        return self._regress(strength, towards=np.eye(len(self._x)))

    def regress(self, strength: float) -> AffineMap:
        """The affine map `x @ matrix + bias` closest to y, its matrix drawn towards zero.

        Raises:
            CalibrationError: see `solve`.
        """
        return self._regress(strength, towards=np.zeros_like(self._xy))

    def _regress(self, strength: float, towards: Float64) -> AffineMap:
        self._add_waiting()
        if self._weight == 0.0:
            raise CalibrationError("no tokens to fit adapters on")
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        xx = self._xx / self._weight - np.outer(mean_x, mean_x)
        xy = self._xy / self._weight - np.outer(mean_x, mean_y)
        if not (np.isfinite(xx).all() and np.isfinite(xy).all()):
            raise CalibrationError("hidden states are not finite: the adapters cannot be fitted")
        penalty = strength * np.diag(xx) + 1e-12
        delta = linalg.solve(xx + np.diag(penalty), xy - xx @ towards, assume_a="pos")
        matrix: Float64 = towards + delta
        bias = mean_y - mean_x @ matrix
        return AffineMap(matrix.astype(np.float32), bias.astype(np.float32))
