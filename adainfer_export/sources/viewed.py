"""A checkpoint through a decoder's views: plain tensors, whatever form they are stored in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.manifest import SourceSpec

from ..decoders.views import View
from ..errors import CheckpointError
from ..quantise import BlockRows, Blocks
from .checkpoint import Checkpoint

__all__ = ["ViewedCheckpoint"]

Float32 = npt.NDArray[np.float32]


class ViewedCheckpoint:
    """A checkpoint under the names that a decoder's graph uses; see `sources.Checkpoint`.

    Rows are read as they are asked for. Of tensors that are stored transposed, which are read in
    one piece, every thread keeps the last one: fused ones are read part by part.

    Args:
        aliases: (prefix, other prefix) pairs: a tensor that is not there under its name is looked
            for under the other one (base models without their head's prefix, former names).
        others: prefixes of tensors that belong to other parts of the model than the decoder.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        views: Mapping[str, View],
        aliases: tuple[tuple[str, str], ...] = (),
        others: tuple[str, ...] = (),
    ) -> None:
        self._checkpoint = checkpoint
        self._views = views
        self._aliases = aliases
        self._others = others
        self._kept = threading.local()

    @property
    def config(self) -> Any:
        """The checkpoint's own."""
        return self._checkpoint.config

    @property
    def source(self) -> SourceSpec:
        """The checkpoint's own."""
        return self._checkpoint.source

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The checkpoint's own."""
        return self._checkpoint.eos_token_ids

    @property
    def tied_head(self) -> bool:
        """The checkpoint's own."""
        return self._checkpoint.tied_head

    @property
    def source_name(self) -> str:
        """What messages call the checkpoint."""
        return self._checkpoint.source_name

    def decoder(self) -> None:
        """None: views belong to graphs that are built."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of the graph's tensors."""
        view = self._views.get(name)
        return self._checkpoint.shape(self.stored_name(name)) if view is None else view.result

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the stored tensor that one of the graph's is made of."""
        return self._checkpoint.shape(self.stored_name(name))

    def unused(self, read: frozenset[str]) -> tuple[str, ...]:
        """Tensors of the checkpoint that none of these is made of."""
        unused = self._checkpoint.unused(frozenset(self.stored_name(name) for name in read))
        return tuple(name for name in unused if not name.startswith(self._others))

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of the tensor that one of the graph's is made of."""
        view = self._views.get(name)
        stored = name if view is None else view.tensor
        others = (
            other + stored.removeprefix(prefix)
            for prefix, other in self._aliases
            if stored.startswith(prefix)
        )
        return next((found for found in (stored, *others) if self._has(found)), stored)

    def expected_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that must be stored, for the graph to get this one."""
        view = self._views.get(name)
        return shape if view is None else view.shape

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """A tensor under the graph's name, or rows of it."""
        view, stored = self._views.get(name), self.stored_name(name)
        if view is None:
            return self._checkpoint.read(stored, rows)
        if view.transposed:
            return view.of(self._whole(stored), rows)
        rows = rows or slice(0, view.result[0])
        pieces = [self._checkpoint.read(stored, part) for part in view.ranges(rows)]
        return view.join(pieces, rows.stop - rows.start)

    def blocks(self, name: str) -> Blocks | None:
        """Those of the stored matrix, where the graph's is rows of it."""
        view = self._views.get(name)
        if view is not None and not view.keeps_values:
            return None
        return self._checkpoint.blocks(self.stored_name(name))

    def read_blocks(self, name: str, rows: slice) -> BlockRows:
        """Rows of a matrix that has `blocks`."""
        view, stored = self._views.get(name), self.stored_name(name)
        ranges = [rows] if view is None else view.ranges(rows)
        return BlockRows.join([self._checkpoint.read_blocks(stored, part) for part in ranges])

    def write_tokenizer(self, folder: Path) -> bool:
        """The checkpoint's own."""
        return self._checkpoint.write_tokenizer(folder)

    def _whole(self, stored: str) -> Float32:
        last: tuple[str, Float32] | None = getattr(self._kept, "last", None)
        if last is None or last[0] != stored:
            last = self._kept.last = (stored, self._checkpoint.read(stored))
        return last[1]

    def _has(self, stored: str) -> bool:
        try:
            self._checkpoint.shape(stored)
        except CheckpointError:
            return False
        return True
