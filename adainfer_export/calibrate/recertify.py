"""Renews a certificate on a user's own prompts; nothing of the exit graph is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, replace_manifest, verify_files
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.output_files import require_writable_folder

from ..errors import CalibrationError
from ..progress import Reporter
from .certify import make_certificate
from .combined import combine, path_grid
from .fresh_prompts import FreshPrompts, fresh_prompts
from .length_shares import share_fields
from .scored import CONTEXT, Scored, observe
from .traces import fits

__all__ = ["Renewal", "recertify"]


@dataclass(frozen=True)
class Renewal:
    """The manifest with its new certificate.

    Attributes:
        prompts: what it was made from, and how many were left out.
    """

    manifest: Manifest
    prompts: FreshPrompts


def recertify(
    folder: Path,
    files: Sequence[Path],
    reporter: Reporter,
    against: Literal["model", "gold"] = "model",
    *,
    device: str = "cpu",
) -> Renewal:
    """Runs every exit point on every prompt and tests the frozen grid of thresholds again.

    Args:
        against: what an exit must not differ from: the full model's answer, or the prompts' own
            `answer` where the full model gives it.
        device: `cpu` or `cuda`: the certificate will be of its class.

    Raises:
        CalibrationError: the engine has no exits, or no prompt is left to certify with.
        TaskFileError: a file cannot be read.
        OutputError: the folder cannot be written.
    """
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    require_writable_folder(folder)
    if not manifest.classifiers:
        raise CalibrationError(f"{folder} has no exits to certify: run `adainfer calibrate` first")
    engine = Engine.of_manifest(folder, manifest, device=device)
    fresh = fresh_prompts(folder, manifest, files, lambda example: fits(engine, example))
    usable = fresh.usable
    if against == "gold" and not all(example.answer for example in usable):
        raise CalibrationError("certifying against gold needs an `answer` with every prompt")
    reporter.begin("certifying", len(usable))
    scored = observe(engine, usable, {}, reporter, against)
    data = [path.name for path in files]

    def certificate(seen: Scored, grid: npt.NDArray[np.float64]) -> dict[str, Any]:
        return {
            "certificate": make_certificate(
                manifest, seen, grid, data, against, device_class=engine.device_class
            ),
            **share_fields(seen, grid),
        }

    renewed = manifest.with_exits(
        {
            name: spec.model_copy(update=certificate(scored[name], np.array(spec.thresholds)))
            for name, spec in manifest.named_exits.items()
            if scored[name].tasks
        }
    )
    combined = manifest.combined_exit
    if combined is not None and scored[CONTEXT].tasks:
        both = combine(scored[combined.answer], scored[CONTEXT], combined.path)
        spec = combined.model_copy(update=certificate(both, path_grid(combined.path)))
        renewed = renewed.model_copy(update={"combined_exit": spec})
    replace_manifest(folder, renewed)
    return Renewal(renewed, fresh)
