"""Task files: JSON lines `{"prompt", "answer"?, "labels"?, "task"?}`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import TaskFileError

__all__ = ["TaskExample", "read_tasks", "write_tasks"]


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


def read_tasks(paths: Iterable[Path]) -> list[TaskExample]:
    """Reads task files; examples without a task take the file's name.

    Raises:
        TaskFileError: a file cannot be read or a line is malformed, with file and line.
    """
    examples: list[TaskExample] = []
    for path in paths:
        try:
            # Not `splitlines`: JSON may hold U+2028 and other ends of lines as they are.
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskFileError(f"{path} cannot be read: {error}") from error
        default = path.name.split(".")[0]
        for number, line in enumerate(lines, start=1):
            if line.strip():
                examples.append(_parse(line, f"{path}:{number}", default))
    if not examples:
        raise TaskFileError("the task files hold no examples")
    return examples


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
