"""Texts of more than an answer: what a certificate must know of them."""

from __future__ import annotations

from dataclasses import dataclass

from .kv_fill import KvPolicy

__all__ = ["LongText"]


@dataclass(frozen=True)
class LongText:
    """A text of two tokens or more.

    Attributes:
        tokens: new ones at most.
        kv_policy: what later tokens attend to where positions stopped early; `deferred` is exact.
        own_end: whether the model alone ends it, or its length: no stop strings, no stop tokens of
            the request, and no end-of-text token that is ignored.
    """

    tokens: int
    kv_policy: KvPolicy = "deferred"
    own_end: bool = True
