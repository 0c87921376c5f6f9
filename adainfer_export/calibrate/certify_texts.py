"""Certificates over texts: "a text's share of differing tokens is at most ε in expectation, with
confidence 1 − δ", for one frozen context exit whose texts go on over translated K and V.

Learn-then-Test (arXiv 2110.01052) with fixed-sequence testing, as `certify` does it for answers;
the text is the unit, its loss the share of `text_loss`, bounded but not 0 or 1, and so the p-values
are Hoeffding–Bentkus. Requests may want shorter texts than those that were observed, and the share
of the first few tokens may be the larger one: so a threshold is accepted only where the test
rejects at every length. (An intersection-union test: no correction is due. The largest of the
p-values is that of the largest mean.)

As with answers, a level is given only where texts that exit differ significantly less than all
texts would that exit at the same points without being chosen, unless those alone keep the level.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from .select import evaluate
from .text_scored import TextScored

__all__ = ["TEXT_LEVELS", "certify_texts", "make_text_certificate"]

Float64 = npt.NDArray[np.float64]

TEXT_LEVELS = (0.01, 0.02, 0.05, 0.10, 0.20)
_CERTAIN = 1.0 - 1e-9


def certify_texts(
    texts: TextScored,
    grid: Float64,
    levels: Sequence[float] = TEXT_LEVELS,
    confidence: float = CONFIDENCE,
) -> tuple[TextCertificateLevel, ...]:
    """One entry per level; without a threshold where nothing could be certified.

    Args:
        grid: thresholds from the safest down, fixed by prompts that certify nothing.
    """
    sums = [_largest(texts.differing_at(float(threshold))) for threshold in grid]
    return tuple(_certify_level(texts, grid, sums, level, confidence) for level in levels)


def make_text_certificate(
    manifest: Manifest, texts: TextScored, grid: Float64, data: Sequence[str], *, device_class: str
) -> TextCertificate:
    """The certificate of one frozen context exit on texts that were used for nothing else.

    Args:
        device_class: of the engine that was observed.
    """
    return TextCertificate(
        target=manifest.target,
        precision=manifest.precision,
        device_class=device_class,
        data=tuple(data),
        max_new_tokens=texts.differing.shape[2],
        levels=certify_texts(texts, grid),
    )


def _certify_level(
    texts: TextScored, grid: Float64, sums: Sequence[float], level: float, confidence: float
) -> TextCertificateLevel:
    count = len(texts.differing)
    passed: tuple[float, float] | None = None
    for threshold, total in zip(grid, sums, strict=True):
        if p_value(total, count, level) > 1.0 - confidence:
            break
        passed = float(threshold), total
    if passed is None or not _means_something(texts, passed[0], level, confidence):
        # Without any difference the p-value is that of a binomial test.
        needed = prompts_needed(level, confidence)
        return TextCertificateLevel(
            level=level,
            confidence=confidence,
            texts=count,
            texts_needed=needed if count < needed else None,
        )
    threshold, total = passed
    leaving, _ = texts.scored.leave(threshold)
    return TextCertificateLevel(
        level=level,
        confidence=confidence,
        texts=count,
        threshold=threshold,
        exits=int(leaving.sum()),
        differing=round(float(texts.differing_at(threshold)[:, -1].mean()), 4),
        largest_differing=round(total / count, 4),
        teacher_forced=round(float(texts.teacher_forced_at(threshold).mean()), 4),
        layers_saved=round(evaluate(texts.scored, threshold).layers_saved, 4),
        groups=_groups(texts, threshold, confidence),
    )


def _means_something(texts: TextScored, threshold: float, level: float, confidence: float) -> bool:
    """By whole texts."""
    leaving, first = texts.scored.leave(threshold)
    if not leaving.any():
        return False
    whole = texts.differing[:, :, -1]
    blind = float(whole.mean(axis=0)[first[leaving]].mean())
    if blind <= level:
        return True
    total = float(whole[leaving, first[leaving]].sum())
    tested = p_value(total, int(leaving.sum()), min(blind, _CERTAIN))
    return bool(tested <= 1.0 - confidence)


def _groups(
    texts: TextScored, threshold: float, confidence: float
) -> dict[str, TextCertificateGroup]:
    """Per task at the pooled threshold, each with its own upper bound, for every length."""
    differing = texts.differing_at(threshold)
    tasks = np.array(texts.scored.tasks)
    groups = {}
    for task in sorted(set(texts.scored.tasks)):
        here = differing[tasks == task]
        bound = upper_bound(_largest(here), len(here), confidence)
        groups[task] = TextCertificateGroup(
            texts=len(here),
            differing=round(float(here[:, -1].mean()), 4),
            upper_bound=round(bound, 4),
        )
    return groups


def _largest(differing: Float64) -> float:
    """Of `[texts, lengths]`, the largest sum over texts among the lengths."""
    return float(differing.sum(axis=0).max())
