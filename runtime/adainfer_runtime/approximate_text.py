"""Texts that a certificate of answers says nothing about."""

from __future__ import annotations

from dataclasses import dataclass

from .kv_fill import KvPolicy

__all__ = ["ApproximateText"]


@dataclass(frozen=True)
class ApproximateText:
    """A text whose tokens after the first attend to K and V that a KV policy made up.

    Attributes:
        tokens: new ones at most, 2 or more.
        kv_policy: the policy; not `deferred`, which is exact.
        own_end: whether the model alone ends it, or its length: no stop strings, no stop tokens of
            the request, and no end-of-text token that is ignored.
    """

    tokens: int
    kv_policy: KvPolicy
    own_end: bool = True
