"""Prompts that a certificate may be made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adainfer_runtime.fitted_on import FittedOn, asked, hashes_of
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.tasks import TaskExample, read_tasks

from ..errors import CalibrationError
from .data import Parts
from .questions import first_of_each, solved_by

__all__ = ["FreshPrompts", "fitted_on", "fresh_prompts"]


@dataclass(frozen=True)
class FreshPrompts:
    """Prompts of different questions that the exits were not fitted on.

    Attributes:
        fitted_on: prompts left out because the exits were fitted on them, or on what they ask.
        not_taken: prompts left out because the engine does not take them.
        asked_twice: prompts left out because another one asks the same.
    """

    usable: tuple[TaskExample, ...]
    fitted_on: int
    not_taken: int
    asked_twice: int

    @property
    def left_out(self) -> dict[str, int]:
        """How many were left out, by why."""
        return {
            "fitted_on": self.fitted_on,
            "not_taken": self.not_taken,
            "asked_twice": self.asked_twice,
        }


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
        ManifestError: nor can what was fitted on.
    """
    examples = list({example.prompt: example for example in read_tasks(files)}.values())
    fitted = FittedOn.read(folder, manifest)
    unseen = [example for example in examples if example not in fitted]
    taken = tuple(example for example in unseen if takes(example))
    usable = first_of_each(taken)
    if not usable:
        raise CalibrationError(
            "no prompt is left that the exits were not fitted on and the engine takes"
        )
    return FreshPrompts(
        usable,
        fitted_on=len(examples) - len(unseen),
        not_taken=len(unseen) - len(taken),
        asked_twice=len(taken) - len(usable),
    )


def fitted_on(parts: Parts) -> list[str]:
    """Hashes of the prompts that exits are fitted on, of what those ask, and of what the examples
    in them answer: enough to find a prompt or a question again, nothing to read.
    """
    prompts = (*parts.adapters, *parts.classifier, *parts.selection)
    # Examples' answers are fitted on in the first two parts, but for those held out.
    solved = {
        question for part in (parts.adapters, parts.classifier) for question in solved_by(part)
    }
    questions = {asked(example) for example in prompts} | (solved - parts.held_out)
    return hashes_of(prompts, questions)
