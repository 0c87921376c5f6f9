"""Certificates of answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .record import Count, Record

__all__ = ["Certificate", "CertificateGroup", "CertificateLevel"]


class CertificateGroup(Record):
    """One task at the pooled threshold: its share of disagreement is at most `upper_bound`."""

    prompts: Count
    disagreements: Count
    upper_bound: float


class CertificateLevel(Record):
    """Disagreement of greedy answers is at most `level`, with `confidence`.

    Without a threshold the level could not be certified; `prompts_needed` then says how many
    prompts could at best, where there were fewer.
    """

    level: float
    confidence: float
    prompts: Count
    threshold: float | None = None
    disagreements: Count | None = None
    layers_saved: float | None = None
    prompts_needed: Count | None = None
    groups: dict[str, CertificateGroup] = Field(default_factory=dict)


class Certificate(Record):
    """What is certified, and for what: it does not carry over to another target or device class.

    A disagreement is an answer that is not the full model's; against gold answers, one that is
    wrong where the full model's is right. Where the same prompts decided which of several exit
    graphs is the default one, each was tested at 1 / `tried` of the chance of being wrong.
    """

    target: str
    precision: str
    device_class: str
    data: tuple[str, ...]
    against: Literal["model", "gold"] = "model"
    tried: int = Field(default=1, ge=1)
    levels: tuple[CertificateLevel, ...]
