"""Prompts that a certificate may be made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adainfer_runtime.manifest import Manifest
from adainfer_runtime.tasks import TaskExample, read_tasks

from ..errors import CalibrationError
from .data import prompt_hash

__all__ = ["FreshPrompts", "fresh_prompts"]


@dataclass(frozen=True)
class FreshPrompts:
    """Different prompts that the exits were not fitted on.

    Attributes:
        fitted_on: prompts left out because the exits were fitted on them.
        not_taken: prompts left out because the engine does not take them.
    """

    usable: tuple[TaskExample, ...]
    fitted_on: int
    not_taken: int


def fresh_prompts(
    folder: Path,
    manifest: Manifest,
    files: Sequence[Path],
    takes: Callable[[TaskExample], bool],
) -> FreshPrompts:
    """Reads task files.

    Args:
        takes: whether the engine takes a prompt.

    Raises:
        CalibrationError: no prompt is left.
        TaskFileError: a file cannot be read.
    """
    examples = list({example.prompt: example for example in read_tasks(files)}.values())
    unseen = _unseen(folder, manifest, examples)
    usable = tuple(example for example in unseen if takes(example))
    if not usable:
        raise CalibrationError(
            "no prompt is left that the exits were not fitted on and the engine takes"
        )
    return FreshPrompts(usable, len(examples) - len(unseen), len(unseen) - len(usable))


def _unseen(folder: Path, manifest: Manifest, examples: Sequence[TaskExample]) -> list[TaskExample]:
    report = next(
        (name for name in manifest.files if name.startswith("reports/calibration.")), None
    )
    if report is None:
        return list(examples)
    seen = set(json.loads((folder / report).read_text(encoding="utf-8")).get("fitted_on", ()))
    return [example for example in examples if prompt_hash(example.prompt) not in seen]
