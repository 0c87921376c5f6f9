"""Certifies the texts of a folder's context exit on a user's own prompts; the graph is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, replace_manifest, verify_files
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.output_files import require_writable_folder
from adainfer_runtime.text_certificate_spec import TextCertificate

from ..errors import CalibrationError
from ..progress import Reporter
from .certify_texts import make_text_certificate
from .fresh_prompts import FreshPrompts, fresh_prompts
from .scored import CONTEXT
from .text_scored import observe_texts, takes_text

__all__ = ["TextRenewal", "recertify_texts"]


@dataclass(frozen=True)
class TextRenewal:
    """The manifest with its new certificate.

    Attributes:
        prompts: what it was made from, and how many were left out; those of one token, and those
            that the engine does not take with so many new tokens, are `not_taken`.
    """

    manifest: Manifest
    certificate: TextCertificate
    prompts: FreshPrompts


def recertify_texts(
    folder: Path,
    files: Sequence[Path],
    max_new_tokens: int,
    reporter: Reporter,
    *,
    device: str = "cpu",
) -> TextRenewal:
    """Writes a text per prompt, and one per prompt and exit point, and tests the frozen grid of
    thresholds.

    Args:
        max_new_tokens: of each text, 2 or more.
        device: `cpu` or `cuda`: the certificate will be of its class.

    Raises:
        CalibrationError: the engine has no context exit, no prompt is left to certify with, or
            there is no text to speak of.
        TaskFileError: a file cannot be read.
        OutputError: the folder cannot be written.
    """
    if max_new_tokens < 2:
        raise CalibrationError(
            f"a text has 2 tokens or more, found --max-new-tokens {max_new_tokens}: answers of one "
            "are certified by --prompts"
        )
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    require_writable_folder(folder)
    spec = manifest.named_exits.get(CONTEXT)
    if spec is None:
        raise CalibrationError(
            f"{folder} has no context exit, whose texts could be certified: run `adainfer "
            "calibrate DIR --context-exit`"
        )
    engine = Engine.of_manifest(folder, manifest, device=device)
    fresh = fresh_prompts(
        folder, manifest, files, lambda example: takes_text(engine, example, max_new_tokens)
    )
    texts = observe_texts(engine, fresh.usable, max_new_tokens, reporter)
    certificate = make_text_certificate(
        manifest,
        texts,
        np.array(spec.thresholds),
        [path.name for path in files],
        device_class=engine.device_class,
    )
    renewed = manifest.with_exits(
        {CONTEXT: spec.model_copy(update={"text_certificate": certificate})}
    )
    replace_manifest(folder, renewed)
    return TextRenewal(renewed, certificate, fresh)
