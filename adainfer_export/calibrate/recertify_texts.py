"""Certifies the texts of a folder's exits on a user's own prompts; the graphs are frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, replace_manifest, verify_files
from adainfer_runtime.exit_policy import ClassifierExit
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.output_files import require_writable_folder
from adainfer_runtime.tasks import TaskExample
from adainfer_runtime.text_certificate_spec import TextCertificate

from ..errors import CalibrationError
from ..progress import Reporter
from .adaptive_texts import AdaptiveTexts
from .certify_texts import make_text_certificate
from .fresh_prompts import FreshPrompts, fresh_prompts
from .scored import CONTEXT
from .text_outcome import Texts
from .text_scored import observe_texts, takes_text

__all__ = ["TEXT_MODES", "TextMode", "TextRenewal", "recertify_texts"]

TextMode = Literal["adaptive", "context"]
TEXT_MODES: tuple[TextMode, ...] = ("adaptive", "context")
# Under `deferred`, texts of mode `context` keep what is certified of answers.
_KV_POLICY: Mapping[TextMode, Literal["deferred", "translated"]] = {
    "adaptive": "deferred",
    "context": "translated",
}


@dataclass(frozen=True)
class TextRenewal:
    """The manifest with its new certificates.

    Attributes:
        certificates: by mode.
        prompts: what they were made from, and how many were left out; those of one token, and
            those that the engine does not take with so many new tokens, are `not_taken`.
    """

    manifest: Manifest
    certificates: dict[TextMode, TextCertificate]
    prompts: FreshPrompts


def recertify_texts(
    folder: Path,
    files: Sequence[Path],
    max_new_tokens: int,
    reporter: Reporter,
    modes: Sequence[TextMode] = TEXT_MODES,
    *,
    device: str = "cpu",
) -> TextRenewal:
    """Writes texts with and without exits, and tests the frozen grid of thresholds.

    Args:
        max_new_tokens: of each text, 2 or more.
        modes: whose exits are certified, where the folder has them: the context exit (a text per
            prompt and exit point), and the default answer exits (one per prompt and threshold).
        device: `cpu` or `cuda`: the certificates will be of its class.

    Raises:
        CalibrationError: the engine has no such exits, no prompt is left to certify with, or there
            is no text to speak of.
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
    specs = {mode: spec for mode, spec in _names(manifest).items() if mode in modes}
    if not specs:
        raise CalibrationError(
            f"{folder} has no exits of mode {' or '.join(modes)}, whose texts could be certified: "
            "run `adainfer calibrate DIR`, for mode context with --context-exit"
        )
    engine = Engine.of_manifest(folder, manifest, device=device)
    fresh = fresh_prompts(
        folder, manifest, files, lambda example: takes_text(engine, example, max_new_tokens)
    )
    certificates: dict[TextMode, TextCertificate] = {}
    for mode, name in specs.items():
        grid = np.array(manifest.named_exits[name].thresholds)
        certificates[mode] = make_text_certificate(
            manifest,
            _texts(engine, mode, fresh.usable, max_new_tokens, len(grid), reporter),
            grid,
            [path.name for path in files],
            kv_policy=_KV_POLICY[mode],
            max_new_tokens=max_new_tokens,
            device_class=engine.device_class,
        )
    renewed = manifest.with_exits(
        {
            specs[mode]: manifest.named_exits[specs[mode]].model_copy(
                update={"text_certificate": certificate}
            )
            for mode, certificate in certificates.items()
        }
    )
    replace_manifest(folder, renewed)
    return TextRenewal(renewed, certificates, fresh)


def _names(manifest: Manifest) -> dict[TextMode, str]:
    """Which of `named_exits` each mode has, of those that it has."""
    answers = manifest.exit.classifier if manifest.exit else None
    names: dict[TextMode, str] = {"adaptive": answers.kind} if answers else {}
    return names | ({"context": CONTEXT} if CONTEXT in manifest.named_exits else {})


def _texts(
    engine: Engine,
    mode: TextMode,
    examples: Sequence[TaskExample],
    max_new_tokens: int,
    thresholds: int,
    reporter: Reporter,
) -> Texts:
    if mode == "context":
        return observe_texts(engine, examples, max_new_tokens, reporter)
    policy = engine.policy("adaptive")
    assert isinstance(policy, ClassifierExit)  # it has an exit graph
    return AdaptiveTexts(engine, policy, examples, max_new_tokens, thresholds, reporter)
