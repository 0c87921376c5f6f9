"""The file of `adainfer batch`: a line per prompt, which a later run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ..errors import RequestError

__all__ = ["BatchLine", "check_out", "open_to_add", "read_lines", "write_again"]


@dataclass(frozen=True)
class BatchLine:
    """What stands in the file for a prompt.

    Attributes:
        index: the prompt's place among them.
        failed: whether it is an error, not a text.
        written: the line itself.
    """

    index: int
    failed: bool
    written: bytes


def check_out(out: Path, *, resume: bool) -> None:
    """Raises RequestError where the file is there and is not to be resumed, or the other way."""
    if resume and not out.is_file():
        raise RequestError(f"{out} does not exist: leave --resume out to begin")
    if not resume and out.exists():
        raise RequestError(f"{out} exists: give another file, or --resume to add what is missing")


def read_lines(out: Path, marks: Sequence[str]) -> Iterator[BatchLine]:
    """Of prompts that have theirs; one that a kill cut short is taken off the file.

    Raises:
        RequestError: a line is of another request, or the file cannot be read.
    """
    try:
        *whole, rest = out.read_bytes().split(b"\n")
        complete = [line + b"\n" for line in whole]
        if rest:
            os.truncate(out, sum(map(len, complete)))
    except OSError as error:
        raise _unusable(out, error) from error
    for number, line in enumerate(complete, start=1):
        try:
            content = json.loads(line)
            index, mark = content["index"], content["request"]
            known = index >= 0 and marks[index] == mark
        except (ValueError, KeyError, IndexError, TypeError):
            known = False
        if not known:
            raise RequestError(
                f"{out}:{number} is no text of these prompts by this engine and these options"
            )
        yield BatchLine(index, "error" in content, line)


def write_again(out: Path, lines: Sequence[BatchLine]) -> None:
    """Leaves these lines alone in the file; a kill leaves the old one or the new one.

    Raises:
        RequestError: the file cannot be written.
    """
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        temporary.write_bytes(b"".join(line.written for line in lines))
        temporary.replace(out)
    except OSError as error:
        raise _unusable(out, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def open_to_add(out: Path) -> TextIO:
    """Raises RequestError where the file cannot be written."""
    try:
        return out.open("a", encoding="utf-8")
    except OSError as error:
        raise _unusable(out, error) from error


def _unusable(out: Path, error: OSError) -> RequestError:
    return RequestError(f"{out} cannot be used: {error}")
