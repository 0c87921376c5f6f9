"""Text from standard input."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from ..errors import RequestError, one_line

__all__ = ["input_lines", "input_text"]


def input_text() -> str:
    """All of it.

    Raises:
        RequestError: it is no text in the locale's encoding.
    """
    return "".join(input_lines())


def input_lines() -> Iterator[str]:
    """Its lines, as they come.

    Raises:
        RequestError: see `input_text`.
    """
    try:
        yield from typer.get_text_stream("stdin")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is no text: {one_line(error)}") from error
