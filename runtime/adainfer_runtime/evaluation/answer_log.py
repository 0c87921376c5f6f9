"""Answers as JSON lines on disk: a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from ..errors import RequestError
from ..manifest import Manifest
from ..output_files import writing
from .answers import Answer

__all__ = ["AnswerLog"]


class AnswerLog:
    """Keeps every answer; `path` None keeps them in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._answers: dict[tuple[str, str], Answer] = {}

    @classmethod
    def open(cls, path: Path, manifest: Manifest, question: Mapping[str, object]) -> AnswerLog:
        """A log on disk: a new one, or one of the same engine and question, to go on with.

        Args:
            question: what decides on answers beside engine, method and prompt (thresholds, …).

        Raises:
            RequestError: the file is another run's, is damaged, or cannot be written.
        """
        digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
        header = {"engine": digest[:16], **question}
        log = cls(path)
        try:
            if path.exists():
                log._read(path, header)
                path.open("ab").close()  # what cannot be added to is found out now
            else:
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path} cannot be used as a log: {error}") from error
        return log

    def find(self, method: str, prompt: str) -> Answer | None:
        """The answer, if it was given before."""
        return self._answers.get((method, prompt))

    def add(self, answer: Answer) -> None:
        """Keeps an answer.

        Raises:
            OutputError: the file cannot be written any more.
        """
        self._answers[answer.method, answer.prompt] = answer
        if self._path is not None:
            with writing(self._path), self._path.open("a", encoding="utf-8") as stream:
                stream.write(answer.model_dump_json() + "\n")

    def _read(self, path: Path, header: Mapping[str, object]) -> None:
        # Not `splitlines`: names of tasks may hold U+2028 and other ends of lines as they are.
        *lines, rest = path.read_bytes().decode().split("\n")
        try:
            found = json.loads(lines[0]) if lines else None
        except ValueError:
            found = None
        if found != header:
            raise RequestError(
                f"{path} is no log of this engine and question: give another file, or remove it"
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                answer = Answer.model_validate_json(line)
            except ValidationError as error:
                raise RequestError(f"{path}:{number} is no answer of a log: {error}") from error
            self._answers[answer.method, answer.prompt] = answer
        if rest:  # killed in the middle of a line
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
