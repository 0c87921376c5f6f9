"""Renews a certificate on a user's own prompts; nothing of the exit graph is changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, verify_files, write_manifest
from adainfer_runtime.manifest import ExitSpec, Manifest
from adainfer_runtime.tasks import TaskExample, read_tasks

from ..errors import CalibrationError, OutputError
from ..progress import Reporter
from .certify import make_certificate
from .data import prompt_hash
from .scored import CHOICE, CONTEXT, observe, observe_context
from .traces import fits

__all__ = ["Renewal", "recertify"]


@dataclass(frozen=True)
class Renewal:
    """The manifest with its new certificate.

    Attributes:
        fitted_on: prompts left out because the exit graph was fitted on them.
        too_long: prompts left out because the engine does not take them.
    """

    manifest: Manifest
    fitted_on: int
    too_long: int


def recertify(
    folder: Path,
    files: Sequence[Path],
    reporter: Reporter,
    against: Literal["model", "gold"] = "model",
) -> Renewal:
    """Runs every exit point on every prompt and tests the frozen grid of thresholds again.

    Args:
        against: what an exit must not differ from: the full model's answer, or the prompts' own
            `answer` where the full model gives it.

    Raises:
        CalibrationError: the engine has no exits, or no prompt is left to certify with.
        TaskFileError: a file cannot be read.
        OutputError: the folder cannot be written.
    """
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    if not manifest.classifiers:
        raise CalibrationError(f"{folder} has no exits to certify: run `adainfer calibrate` first")
    engine = Engine.of_manifest(folder, manifest)
    examples = list({example.prompt: example for example in read_tasks(files)}.values())
    unseen = _unseen(folder, manifest, examples)
    usable = [example for example in unseen if fits(engine, example)]
    if against == "gold" and not all(example.answer for example in usable):
        raise CalibrationError("certifying against gold needs an `answer` with every prompt")
    if not usable:
        raise CalibrationError("no prompt is left that the exit graph was not fitted on")
    reporter.begin("certifying", len(usable))
    scored = observe(engine, usable, {}, reporter, against) if manifest.exit_points else {}
    data = [path.name for path in files]

    def renew(name: str, spec: ExitSpec) -> ExitSpec:
        grid = np.array(spec.thresholds)
        certificate = make_certificate(manifest, scored[name], grid, data, against)
        return spec.model_copy(update={"certificate": certificate})

    specs = [renew(kind, spec) for kind, spec in manifest.exit_graphs.items()]
    update: dict[str, Any] = {"exit": specs[0], "other_exits": tuple(specs[1:])} if specs else {}
    choice = manifest.choice_exit
    if choice is not None and choice.classifier is not None and scored[CHOICE].tasks:
        update["choice_exit"] = renew(CHOICE, choice)
    context = manifest.context_exit
    if context is not None:
        reporter.begin("certifying context exits", len(usable))
        scored[CONTEXT] = observe_context(engine, usable, 0.0, reporter, against)
        update["context_exit"] = renew(CONTEXT, context)
    renewed = manifest.model_copy(update=update)
    try:
        write_manifest(folder, renewed)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{folder} cannot be written: {reason}; it was left as it is") from error
    return Renewal(renewed, len(examples) - len(unseen), len(unseen) - len(usable))


def _unseen(folder: Path, manifest: Manifest, examples: Sequence[TaskExample]) -> list[TaskExample]:
    report = next((name for name in manifest.files if name.startswith("reports/")), None)
    if report is None:
        return list(examples)
    seen = set(json.loads((folder / report).read_text(encoding="utf-8")).get("fitted_on", ()))
    return [example for example in examples if prompt_hash(example.prompt) not in seen]
