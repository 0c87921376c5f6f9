"""Rounding that makes up for its own errors: GPTQ (Frantar et al., arXiv 2210.17323).

Of a matrix `W [out, in]` and its inputs x, what a product loses is `|(W - Q) x|²`, whose curvature
along `in` is the inputs' second moment `H = Σ x xᵀ`, for every row alike. Columns are rounded one
after the other; what one lost is taken off those that are still to come, by

    W[:, later] -= (W[:, j] - Q[:, j]) / U[j, j] · U[j, later],    UᵀU = (H + λI)⁻¹, U upper,

the columns whose inputs are largest first (the paper's "act-order"). Scales are those of the
weights as they were, block by block in the order of storage: nothing about the stored form changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import linalg

from .errors import UnsupportedError

__all__ = ["ErrorFeedback", "SecondMoment", "inverse_scales"]

Float32 = npt.NDArray[np.float32]

_DAMPING = 0.01  # of the mean input's square, the paper's
_COLUMNS_AT_ONCE = 128  # whose errors reach all later columns in one product
_ROWS_AT_ONCE = 1024  # of inputs, added up in one product


def inverse_scales(scales: Float32) -> Float32:
    """1 / scales; zeros where they are (next to) nothing and have no finite inverse, so that all
    values of such blocks get code 0.
    """
    usable = np.abs(scales) > np.finfo(np.float32).tiny
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=usable)


class SecondMoment:
    """`Σ x xᵀ` of rows x `[width]`, added up in few large products."""

    def __init__(self, width: int) -> None:
        self._sum: Float32 = np.zeros((width, width), np.float32)
        self._waiting: list[Float32] = []

    def add(self, rows: Float32) -> None:
        """Adds rows `[count, width]`."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self._add_waiting()

    def value(self) -> Float32:
        """`[width, width]`."""
        self._add_waiting()
        return self._sum

    def _add_waiting(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting)
            self._waiting.clear()
            self._sum += rows.T @ rows


@dataclass(frozen=True)
class ErrorFeedback:
    """How the rounding error of a column is made up for by those that are rounded after it.

    Attributes:
        order: int64 `[in]`, the columns in the order in which they are rounded.
        factor: float32 `[in, in]`, U of the module's formula, in that order.
    """

    order: npt.NDArray[np.int64]
    factor: Float32

    @classmethod
    def of(cls, second_moment: Float32) -> ErrorFeedback:
        """From the inputs' second moment `[in, in]`.

        Raises:
            UnsupportedError: it is not finite: the model's activations overflow.
        """
        diagonal = np.diag(second_moment)
        if not np.isfinite(second_moment).all():
            raise UnsupportedError(
                "--rounding gptq: the model's activations are not finite; export with --rounding "
                "nearest"
            )
        order = np.argsort(-diagonal, kind="stable")
        # LAPACK works in place on columns: one matrix in float64, however wide it is.
        last_first = order[::-1]
        matrix = np.asfortranarray(second_moment[np.ix_(last_first, last_first)], np.float64)
        mean = float(diagonal.mean())
        matrix[np.diag_indices_from(matrix)] += _DAMPING * mean if mean > 0 else 1.0
        try:
            # Backwards H + λI is L Lᵀ; forwards L is an upper triangle whose inverse is U.
            lower = linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
        except linalg.LinAlgError as error:
            raise UnsupportedError(
                "--rounding gptq: the second moments of the model's activations cannot be "
                "inverted; export with --rounding nearest"
            ) from error
        inverse, _ = linalg.lapack.dtrtri(lower, lower=1, overwrite_c=1)
        return cls(order, np.ascontiguousarray(inverse[::-1, ::-1], np.float32))

    def round(self, values: Float32, scales: Float32, lowest: int, highest: int) -> Float32:
        """Codes `[rows, in]`, whole numbers from `lowest` to `highest`.

        Args:
            values: `[rows, in]`.
            scales: `[rows, blocks]`, of either sign; where one is (next to) zero so are the codes.
        """
        width = values.shape[1]
        # Transposed: a column of the matrix is then a row in memory.
        rest = np.ascontiguousarray(values.T[self.order])
        steps = np.repeat(scales.T, width // scales.shape[1], axis=0)[self.order]
        inverse = inverse_scales(steps)
        codes = np.empty_like(rest)
        for start in range(0, width, _COLUMNS_AT_ONCE):
            stop = min(start + _COLUMNS_AT_ONCE, width)
            lost = np.empty_like(rest[start:stop])
            for column in range(start, stop):
                code = codes[column]
                np.rint(rest[column] * inverse[column], out=code)
                np.clip(code, lowest, highest, out=code)
                error = lost[column - start]
                np.subtract(rest[column], code * steps[column], out=error)
                error /= self.factor[column, column]
                later = self.factor[column, column + 1 : stop, None]
                rest[column + 1 : stop] -= later * error
            rest[stop:] -= self.factor[start:stop, stop:].T @ lost
        stored = np.empty_like(values)
        stored[:, self.order] = codes.T
        return stored
