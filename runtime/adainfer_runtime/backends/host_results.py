"""Results of the probe on the host: AdaInfer's features of logits, computed when asked for.

Between two passes that need the caches for themselves, a decoded token pays for every line of
memory that is touched. So logits stay where the probe writes them, and are copied only if somebody
still holds them when the next probe is about to write there; and of the features mode `off` wants
none but the token. (SmolLM2, int4: logits of their own for each token take 45 µs of its 3 ms, the
features in the graph more than that; here they take 30, where they are wanted.)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Float32, ProbeResult
from .ort_stage import OrtStage, Place
from .rescore import top_features

__all__ = ["BoundProbe", "HostProbe"]


class HostProbe:
    """A `ProbeResult` of logits that stay where they are until `settle`."""

    __slots__ = ("__weakref__", "_features", "_held", "_lock", "_own", "token")

    def __init__(self, held: Float32, lock: threading.Lock) -> None:
        """Of `[vocab_size]`; whoever writes there settles the result before, by the same lock."""
        self.token = int(held.argmax())  # of equal ones the lowest, as in the graphs
        self._held = held
        self._lock = lock
        self._own: Float32 | None = None
        self._features: tuple[float, float] | None = None

    @property
    def top_prob(self) -> float:
        """Softmax probability of the token."""
        return self._shares()[0]

    @property
    def gap(self) -> float:
        """Less that of the second."""
        return self._shares()[1]

    @property
    def logits(self) -> Float32:
        """`[vocab_size]`, the result's own."""
        with self._lock:
            if self._own is None:
                self._own = self._held.copy()
            return self._own

    def settle(self) -> None:
        """Takes a copy: the place is about to be written to."""
        _ = self.logits

    def _shares(self) -> tuple[float, float]:
        with self._lock:
            if self._features is None:
                logits = self._held if self._own is None else self._own
                self._features = top_features(logits, self.token)
            return self._features


class BoundProbe:
    """The probe of one position, bound to memory. For one thread; its results are for all."""

    def __init__(self, stage: OrtStage, hidden_size: int, vocabulary: int) -> None:
        self._hidden = np.zeros((1, 1, hidden_size), np.float32)
        self._logits = np.zeros((1, 1, vocabulary), np.float32)
        self._run: Callable[[], None] = stage.bind(
            {"hidden": _place(self._hidden)}, {"logits": _place(self._logits)}
        )
        self._lock = threading.Lock()
        self._last: Callable[[], HostProbe | None] = lambda: None

    def __call__(self, hidden: Float32) -> ProbeResult:
        """Of `[hidden_size]`."""
        last = self._last()
        if last is not None:
            last.settle()
        self._hidden[0, 0] = hidden
        self._run()
        result: Any = HostProbe(self._logits[0, 0], self._lock)
        self._last = weakref.ref(result)
        return result  # type: ignore[no-any-return]


def _place(array: npt.NDArray[Any]) -> Place:
    return array.dtype.type, array.shape, array.ctypes.data
