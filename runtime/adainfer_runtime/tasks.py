"""Task files: JSON lines `{"prompt", "answer"?, "labels"?, "task"?}`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import TaskFileError

__all__ = ["PlacedExample", "TaskExample", "read_placed", "read_tasks", "write_tasks"]

_LOG = logging.getLogger(__name__)


class TaskExample(BaseModel):
    """One prompt; the model's next token is its answer.

    Attributes:
        answer: as it follows the prompt, with its leading space.
        labels: the closed set of answers, where there is one.
        task: name of the group that results are reported by.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: str = Field(min_length=1)
    answer: str | None = None
    labels: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    task: str = ""


@dataclass(frozen=True)
class PlacedExample:
    """An example, and where it stands: `file:line`, or what else tells a user which it is."""

    where: str
    example: TaskExample


def read_tasks(paths: Iterable[Path]) -> list[TaskExample]:
    """Reads task files; examples without a task take the file's name.

    Of answers that are none of their labels, which count as wrong, a warning is logged.

    Raises:
        TaskFileError: a file cannot be read or a line is malformed, with file and line.
    """
    return [placed.example for placed in read_placed(paths)]


def read_placed(paths: Iterable[Path]) -> list[PlacedExample]:
    """`read_tasks`, with each example's file and line."""
    examples: list[PlacedExample] = []
    for path in paths:
        try:
            # Not `splitlines`: JSON may hold U+2028 and other ends of lines as they are.
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskFileError(f"{path} cannot be read: {error}") from error
        default = path.name.split(".")[0]
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                examples.append(PlacedExample(where, _parse(line, where, default)))
    if not examples:
        raise TaskFileError("the task files hold no examples")
    _warn_of_answers([placed.where for placed in examples if _is_beside_labels(placed.example)])
    return examples


def _is_beside_labels(example: TaskExample) -> bool:
    if example.answer is None or not example.labels:
        return False
    return example.answer.strip() not in {label.strip() for label in example.labels}


def _warn_of_answers(places: list[str]) -> None:
    if places:
        _LOG.warning(
            "the answer is none of the labels in %d examples (the first: %s)",
            len(places),
            places[0],
        )


def write_tasks(path: Path, examples: Iterable[TaskExample]) -> None:
    """Writes a task file, whole or not at all; an existing file is replaced.

    Raises:
        TaskFileError: the file cannot be written.
    """
    # ASCII alone: unescaped, characters such as U+2028 would end a line for some other readers.
    lines = (json.dumps(example.model_dump(exclude_none=True)) + "\n" for example in examples)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.write_text("".join(lines), encoding="ascii")
        temporary.replace(path)
    except OSError as error:
        raise TaskFileError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _parse(line: str, where: str, default_task: str) -> TaskExample:
    try:
        example = TaskExample.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TaskFileError(
            f"{where}: {field + ': ' if field else ''}{first['msg']}; expected one JSON object "
            'per line: {"prompt", "answer"?, "labels"?, "task"?}'
        ) from error
    return example if example.task else example.model_copy(update={"task": default_task})
