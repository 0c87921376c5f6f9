"""What the manifest keeps of a certificate over texts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["TextCertificate", "TextCertificateGroup", "TextCertificateLevel"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextCertificateGroup(_Record):
    """One task at the pooled threshold: its share of differing tokens is at most `upper_bound`."""

    texts: int
    differing: float
    upper_bound: float


class TextCertificateLevel(_Record):
    """The expected share of a text's tokens that differ is at most `level`, with `confidence`.

    Without a threshold the level could not be certified; `texts_needed` then says how many texts
    could at best, where there were fewer.

    Attributes:
        exits: texts that anything stopped early in; the others are the full model's.
        differing: observed mean share, of texts of the certificate's length.
        largest_differing: the largest of those of all lengths up to it.
        teacher_forced: observed mean share of tokens that the full model, over the same prompt and
            the same tokens before, would not have chosen. Not certified.
        layers_saved: mean share of layers that were not executed: in mode `context` of the
            prompt's, in mode `adaptive` of all.
    """

    level: float
    confidence: float
    texts: int
    threshold: float | None = None
    exits: int | None = None
    differing: float | None = None
    largest_differing: float | None = None
    teacher_forced: float | None = None
    layers_saved: float | None = None
    texts_needed: int | None = None
    groups: dict[str, TextCertificateGroup] = {}


class TextCertificate(_Record):
    """What is certified of the texts of one exit graph, and for what.

    A text is what the model writes greedily after a prompt, until it ends the text itself or
    `max_new_tokens` are reached. Its loss is the share of places at which it differs from the text
    that the full model writes by itself; the end of a text is a token too, and what only one of the
    two has differs. Levels hold for every length from 1 to `max_new_tokens`. Context exits are
    certified with kv_policy `translated` (with `deferred`, a certificate of answers covers texts),
    answer exits with `deferred`, and a look at every exit point at every token.
    """

    target: str
    precision: str
    device_class: str
    data: tuple[str, ...]
    kv_policy: Literal["translated", "deferred"] = "translated"
    max_new_tokens: int = Field(ge=2)
    levels: tuple[TextCertificateLevel, ...]
