"""What distilling comes to at one exit point: by far the longest work of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .affine import AffineMap

__all__ = ["Distilled", "KeepLayer", "keep_nothing"]

_KEY = "distilled"


@dataclass(frozen=True)
class Distilled:
    """The better one of a map before and after training.

    Attributes:
        before, after: share of held-out prompts on which the map that training began with, and
            this one, agree with the full model.
    """

    affine: AffineMap
    before: float
    after: float

    @classmethod
    def better_of(
        cls, start: AffineMap, trained: AffineMap, before: float, after: float
    ) -> Distilled:
        """The trained map, or the one it began with where held-out prompts prefer that."""
        better = after > before
        return cls(trained if better else start, before, after if better else before)

    def __str__(self) -> str:
        return f"{self.before:.3f} → {self.after:.3f}"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name, to be kept."""
        return {**self.affine.arrays(_KEY), "agreement": np.array([self.before, self.after])}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Distilled:
        """What `arrays` gave."""
        return cls(AffineMap.of_arrays(arrays, _KEY), *arrays["agreement"].tolist())


# Gives the result of an exit layer, which is made where none is kept of it.
KeepLayer = Callable[[int, Callable[[], Distilled]], Distilled]


def keep_nothing(layer: int, make: Callable[[], Distilled]) -> Distilled:
    """Of work that is not kept: it is made."""
    return make()
