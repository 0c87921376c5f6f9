"""Values that callers give, refused in one line where they are of the wrong kind."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real

from .errors import RequestError

__all__ = [
    "is_whole",
    "one_of",
    "require_count",
    "require_methods",
    "require_number",
    "require_one_of",
    "require_text",
    "require_whole",
    "suggestion",
]


def is_whole(value: object) -> bool:
    """Whether it is an integer, NumPy's included; True and False are none here."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def require_whole(name: str, value: object) -> None:
    """Raises RequestError for anything but an integer."""
    if not is_whole(value):
        raise RequestError(f"{name} must be a whole number, found {value!r}")


def require_count(name: str, value: object) -> None:
    """Raises RequestError for anything but an integer of at least 1."""
    require_whole(name, value)
    if value < 1:  # type: ignore[operator]
        raise RequestError(f"{name} must be at least 1, found {value}")


def require_number(name: str, value: object) -> None:
    """Raises RequestError for what is no number, such as a text; NaN and infinities pass."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, found {value!r}")


def require_methods(name: str, value: object, methods: Iterable[str], example: str) -> None:
    """Raises RequestError for an object without these methods, and for a class that has them."""
    has_all = all(callable(getattr(value, method, None)) for method in methods)
    if isinstance(value, type) or not has_all:
        raise RequestError(f"{name} must be an object such as {example}, found {value!r}")


def require_text(text: object) -> None:
    """Raises RequestError for anything but text that has a form in UTF-8."""
    if not isinstance(text, str):
        raise RequestError(f"text is needed, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise RequestError(
            f"the text is no valid Unicode: character {error.start + 1} is {found}, a lone "
            "surrogate (it stands for a byte that was no UTF-8, or for half a character)"
        ) from error


def require_one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Raises RequestError for a value that is not among the known ones."""
    names = tuple(known)
    if value not in names:
        raise RequestError(f"{name} {value!r} is unknown: {', '.join(names)}")


def one_of(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def suggestion(name: str, known: Iterable[str]) -> str:
    """What may have been meant by an unknown name, or else what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
