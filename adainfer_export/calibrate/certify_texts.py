"""Certificates over texts: "a text's share of differing tokens is at most ε in expectation, with
confidence 1 − δ", for one frozen exit graph: a context exit whose texts go on over translated K and
V, or answer exits that every token of a text may take.

Learn-then-Test (arXiv 2110.01052) with fixed-sequence testing, as `certify` does it for answers;
the text is the unit, its loss the share of `text_loss`, bounded but not 0 or 1, and so the p-values
are Hoeffding–Bentkus. Requests may want shorter texts than those that were observed, and the share
of the first few tokens may be the larger one: so a threshold is accepted only where the test
rejects at every length. (An intersection-union test: no correction is due. The largest of the
p-values is that of the largest mean.)

As with answers, a level is given only where something exits, and of context exits only where texts
that exit differ significantly less than all texts would that exit at the same points without being
chosen, unless those alone keep the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from adainfer_runtime.manifest import Manifest
from adainfer_runtime.text_certificate_spec import (
    TextCertificate,
    TextCertificateGroup,
    TextCertificateLevel,
)

from .certify import CONFIDENCE, prompts_needed
from .hoeffding_bentkus import p_value, upper_bound
from .text_outcome import TextOutcome, Texts, largest_sum

__all__ = ["TEXT_LEVELS", "certify_texts", "make_text_certificate"]

Float64 = npt.NDArray[np.float64]

TEXT_LEVELS = (0.01, 0.02, 0.05, 0.10, 0.20)


def certify_texts(
    texts: Texts,
    grid: Float64,
    levels: Sequence[float] = TEXT_LEVELS,
    confidence: float = CONFIDENCE,
) -> tuple[TextCertificateLevel, ...]:
    """One entry per level; without a threshold where nothing could be certified.

    Args:
        grid: thresholds from the safest down, fixed by prompts that certify nothing.
    """
    tested: list[TextOutcome] = []
    for threshold in grid:
        tested.append(texts.at(float(threshold)))
        if p_value(tested[-1].largest, len(texts.tasks), max(levels)) > 1.0 - confidence:
            break  # no level accepts it, nor what is less safe
    return tuple(_certify_level(texts, tested, level, confidence) for level in levels)


def make_text_certificate(
    manifest: Manifest,
    texts: Texts,
    grid: Float64,
    data: Sequence[str],
    *,
    kv_policy: Literal["translated", "deferred"],
    max_new_tokens: int,
    device_class: str,
) -> TextCertificate:
    """The certificate of one frozen exit graph on texts that were used for nothing else.

    Args:
        device_class: of the engine that was observed.
    """
    return TextCertificate(
        target=manifest.target,
        precision=manifest.precision,
        device_class=device_class,
        data=tuple(data),
        kv_policy=kv_policy,
        max_new_tokens=max_new_tokens,
        levels=certify_texts(texts, grid),
    )


def _certify_level(
    texts: Texts, tested: Sequence[TextOutcome], level: float, confidence: float
) -> TextCertificateLevel:
    count = len(texts.tasks)
    passed: TextOutcome | None = None
    for outcome in tested:
        if p_value(outcome.largest, count, level) > 1.0 - confidence:
            break
        passed = outcome
    if passed is None or not texts.means_something(passed, level, confidence):
        # Without any difference the p-value is that of a binomial test.
        needed = prompts_needed(level, confidence)
        return TextCertificateLevel(
            level=level,
            confidence=confidence,
            texts=count,
            texts_needed=needed if count < needed else None,
        )
    return TextCertificateLevel(
        level=level,
        confidence=confidence,
        texts=count,
        threshold=passed.threshold,
        exits=int(passed.exits.sum()),
        differing=round(float(passed.differing[:, -1].mean()), 4),
        largest_differing=round(passed.largest / count, 4),
        teacher_forced=round(float(passed.teacher_forced.mean()), 4),
        layers_saved=round(passed.layers_saved, 4),
        groups=_groups(passed.differing, texts.tasks, confidence),
    )


def _groups(
    differing: Float64, names: Sequence[str], confidence: float
) -> dict[str, TextCertificateGroup]:
    """Per task at the pooled threshold, each with its own upper bound, for every length."""
    tasks = np.array(names)
    groups = {}
    for task in sorted(set(names)):
        here = differing[tasks == task]
        bound = upper_bound(largest_sum(here), len(here), confidence)
        groups[task] = TextCertificateGroup(
            texts=len(here),
            differing=round(float(here[:, -1].mean()), 4),
            upper_bound=round(bound, 4),
        )
    return groups
