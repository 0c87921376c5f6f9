"""What an engine folder's exits were fitted on, known again by hashes: the report of a calibration
keeps nothing to read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import ManifestError
from .few_shot import question_of
from .manifest import Manifest
from .tasks import TaskExample

__all__ = ["FittedOn", "Question", "asked", "hashes_of"]

Question = tuple[str, str]  # task, text: the same words ask something else in another task

_REPORT = "reports/calibration."


def asked(example: TaskExample) -> Question:
    """What a prompt asks."""
    return example.task, question_of(example.prompt)


@dataclass(frozen=True)
class FittedOn:
    """Prompts and questions that exits were fitted on; `example in fitted_on` is true of a prompt
    that is among them, and of one that asks what they ask, or what their own examples answer.
    """

    hashes: frozenset[str]

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> FittedOn:
        """Those of a folder; none where it has no report.

        Raises:
            ManifestError: the report cannot be read.
        """
        name = next((name for name in manifest.files if name.startswith(_REPORT)), None)
        if name is None:
            return cls(frozenset())
        try:
            report = json.loads((folder / name).read_text(encoding="utf-8"))
            return cls(frozenset(report.get("fitted_on", ())))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ManifestError(
                f"{folder / name} cannot be read: {error}; run `adainfer calibrate {folder}` again"
            ) from error

    def __contains__(self, example: TaskExample) -> bool:
        return not self.hashes.isdisjoint({_of_prompt(example), _of_question(asked(example))})


def hashes_of(prompts: Iterable[TaskExample], questions: Iterable[Question]) -> list[str]:
    """What a report keeps of them."""
    return sorted({*map(_of_prompt, prompts), *map(_of_question, questions)})


def _of_prompt(example: TaskExample) -> str:
    return _hash(example.prompt)


def _of_question(question: Question) -> str:
    return _hash("\n".join(("question", *question)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
