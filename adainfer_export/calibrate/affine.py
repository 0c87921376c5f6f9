"""Affine maps: what adapters and translators are, in full or in reduced rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

__all__ = ["AffineMap", "reduce_rank"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AffineMap:
    """`mapped = hidden @ matrix + bias`; matrix `[inputs, outputs]`, bias `[outputs]`.

    In reduced rank `hidden @ matrix @ up + bias`; matrix `[inputs, rank]`, up `[rank, outputs]`.
    """

    matrix: Float32
    bias: Float32
    up: Float32 | None = None

    @property
    def rank(self) -> int:
        """Dimensions that it passes on."""
        return int(self.matrix.shape[1])

    @property
    def factors(self) -> tuple[Float32, ...]:
        """The matrix, or the two that stand for it."""
        return (self.matrix,) if self.up is None else (self.matrix, self.up)

    @property
    def weights(self) -> int:
        """Entries of its matrices: multiply-adds of one row."""
        return sum(factor.size for factor in self.factors)

    def apply(self, hidden: Float32) -> Float32:
        """`[rows, inputs]` to `[rows, outputs]`."""
        mapped: Float32 = hidden
        for factor in self.factors:
            mapped = mapped @ factor
        result: Float32 = mapped + self.bias
        return result

    def as_stored(self) -> AffineMap:
        """With its matrices rounded to float16, in which folders hold them."""
        matrix, *up = (_rounded(factor) for factor in self.factors)
        return AffineMap(matrix, self.bias, *up)

    def arrays(self, key: str) -> dict[str, npt.NDArray[Any]]:
        """By name, to be kept; `of_arrays` takes them back."""
        parts = {"matrix": self.matrix, "bias": self.bias, "up": self.up}
        return {f"{name}_{key}": part for name, part in parts.items() if part is not None}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], key: str) -> AffineMap:
        """What `arrays` gave."""
        return cls(arrays[f"matrix_{key}"], arrays[f"bias_{key}"], arrays.get(f"up_{key}"))


def reduce_rank(
    full: AffineMap,
    inputs: tuple[Float64, Float64],
    ranks: Sequence[int],
    spread: Float32 | None = None,
) -> list[AffineMap]:
    """The map in fewer dimensions, once for each rank: those in which its predictions vary most
    (reduced-rank regression: an SVD in the metric of the data).

    Args:
        inputs: mean `[inputs]` and covariance `[inputs, inputs]` of what it reads.
        spread: `[outputs]`, the scale by which an error of each output counts; default: the
            standard deviation of what the map predicts.
    """
    mean, covariance = inputs
    matrix = full.matrix.astype(np.float64)
    if spread is None:
        spread = np.sqrt(((covariance @ matrix) * matrix).sum(axis=0).clip(0.0)) + 1e-6
    weighted = matrix / spread
    width, most = len(matrix), max(ranks)
    # In the inputs' coordinates: a translator has many times more outputs.
    root = linalg.cholesky(covariance + np.diag(1e-9 * np.diag(covariance) + 1e-12), lower=True)
    predicted = root.T @ weighted
    values, vectors = linalg.eigh(
        predicted @ predicted.T, subset_by_index=(width - most, width - 1)
    )
    right = predicted.T @ (vectors / np.sqrt(values.clip(1e-30)))
    down, up = weighted @ right[:, ::-1], right[:, ::-1].T * spread
    # Only what varies is cut: the prediction for the mean stays.
    at_mean = mean @ matrix + full.bias
    return [
        AffineMap(
            down[:, :rank].astype(np.float32),
            (at_mean - mean @ down[:, :rank] @ up[:rank]).astype(np.float32),
            up[:rank].astype(np.float32),
        )
        for rank in ranks
    ]


def _rounded(matrix: Float32) -> Float32:
    largest = float(np.finfo(np.float16).max)
    return np.clip(matrix, -largest, largest).astype(np.float16).astype(np.float32)
