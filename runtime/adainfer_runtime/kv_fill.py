"""What later positions find where a position skipped layers: policies for its K and V.

`deferred` (exact): the position waits, and runs through the layers together with the next one that
goes there. `propagate` (CALM, arXiv 2207.07061): each skipped layer's own norm and K, V weights on
the hidden state that the position stopped with. `translated`: affine maps fitted to the skipped
layers' K and V. The latter two fill only when a later position needs the layer, many positions in
one go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from .backends import Backend
from .errors import ExitUnavailableError, RequestError
from .ledger import FillKind
from .manifest import Manifest

__all__ = ["KvFiller", "KvPolicy", "Propagate", "Translate", "find_filler"]

Float32 = npt.NDArray[np.float32]
KeyValue = tuple[Float32, Float32]

KvPolicy = Literal["deferred", "propagate", "translated"]


class KvFiller(Protocol):
    """Gives K and V of skipped layers, approximately."""

    @property
    def kind(self) -> FillKind:
        """What the ledger calls such entries."""

    def serves(self, exit_layer: int) -> bool:
        """Whether positions that stopped there can be filled."""

    def fill(
        self, exit_layer: int, layers: Sequence[int], hidden: Float32, start: int
    ) -> tuple[Mapping[int, KeyValue], int]:
        """K (after rotary) and V `[kv_heads, rows, head_dim]` of some layers above an exit layer,
        from hidden states `[rows, hidden_size]` of positions from `start` on; and the multiply-adds
        that it took.
        """


@dataclass(frozen=True)
class Propagate:
    """Policy `propagate`."""

    backend: Backend
    costs: Mapping[int, int]
    kind: FillKind = "propagated"

    def serves(self, exit_layer: int) -> bool:
        """Every boundary."""
        return True

    def fill(
        self, exit_layer: int, layers: Sequence[int], hidden: Float32, start: int
    ) -> tuple[Mapping[int, KeyValue], int]:
        """See `KvFiller.fill`."""
        found = {layer: self.backend.kv_fill(layer, hidden, start) for layer in layers}
        return found, len(hidden) * sum(self.costs[layer] for layer in layers)


@dataclass(frozen=True)
class Translate:
    """Policy `translated`: by the maps of the folder's context exit."""

    backend: Backend
    costs: Mapping[int, int]
    kind: FillKind = "translated"

    def serves(self, exit_layer: int) -> bool:
        """Exit layers of the context exit."""
        return exit_layer in self.costs

    def fill(
        self, exit_layer: int, layers: Sequence[int], hidden: Float32, start: int
    ) -> tuple[Mapping[int, KeyValue], int]:
        """See `KvFiller.fill`; the maps give all layers above at once."""
        found = self.backend.translate(exit_layer, hidden, start)
        return {n: found[n] for n in layers}, len(hidden) * self.costs[exit_layer]


def find_filler(policy: KvPolicy, backend: Backend, manifest: Manifest) -> KvFiller | None:
    """The policy's filler; None for `deferred`.

    Raises:
        RequestError: no such policy.
        ExitUnavailableError: the folder lacks what it needs.
    """
    if policy == "deferred":
        return None
    if policy == "propagate":
        fills = manifest.kv_fills
        if not fills:
            raise ExitUnavailableError(
                f"target {manifest.target} has no kv_fill stages: use kv_policy deferred"
            )
        return Propagate(backend, {layer: spec.multiply_adds for layer, spec in fills.items()})
    if policy == "translated":
        points = manifest.context_points
        if not points:
            raise ExitUnavailableError(
                "kv_policy translated needs a context exit: run `adainfer calibrate DIR "
                "--context-exit`, or use propagate"
            )
        return Translate(backend, {layer: p.multiply_adds for layer, p in points.items()})
    raise RequestError(f"kv_policy {policy!r} is unknown: {', '.join(get_args(KvPolicy))}")
