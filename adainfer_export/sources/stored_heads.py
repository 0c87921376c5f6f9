"""LM heads that a checkpoint stores although its configuration ties them to the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["equal_tensors", "find_embedding", "find_heads"]

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_VALUES_AT_ONCE = 1 << 22  # 16 MB of each in float32

Read = Callable[[str, slice], npt.NDArray[np.float32]]


def find_heads(names: Iterable[str]) -> tuple[str, ...]:
    """LM heads among a checkpoint's tensors, under whatever prefix."""
    return _ending_in(_HEADS, names)


def find_embedding(names: Iterable[str]) -> str | None:
    """The token embedding among a checkpoint's tensors; None unless there is exactly one."""
    found = _ending_in(_EMBEDDINGS, names)
    return found[0] if len(found) == 1 else None


def equal_tensors(read: Read, first: str, second: str, shape: tuple[int, ...]) -> bool:
    """Whether two tensors of this shape hold the same values, read by rows until they differ."""
    step = max(1, _VALUES_AT_ONCE // max(1, int(np.prod(shape[1:]))))
    parts = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    return all(np.array_equal(read(first, rows), read(second, rows)) for rows in parts)


def _ending_in(ends: tuple[str, ...], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        sorted(
            name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)
        )
    )
