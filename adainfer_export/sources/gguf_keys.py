"""A GGUF file's keys about its tokenizer: what they are called, and those that must be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

__all__ = [
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "key_of",
    "named_token",
    "required",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # kinds of tokens; 6: a byte


def key_of(name: str) -> str:
    """The whole name of a key about the tokenizer."""
    return f"tokenizer.ggml.{name}"


def required(keys: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of such a key.

    Raises:
        CheckpointError: it is not there.
    """
    if (value := keys.get(key_of(name))) is None:
        raise CheckpointError(
            f"{where}: key {key_of(name)} is missing; convert the model again, or export from the "
            "Hugging Face folder instead"
        )
    return value


def named_token(keys: Mapping[str, Any], name: str, where: str) -> str | None:
    """The token whose id the file gives under a name (bos, eos, unknown, padding), if it does.

    Raises:
        CheckpointError: there is no such token.
    """
    if (index := keys.get(key_of(f"{name}_token_id"))) is None:
        return None
    tokens: list[str] = required(keys, "tokens", where)
    if not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{where}: {key_of(name)}_token_id is {index}, of {len(tokens)} tokens; the file is "
            "damaged: download it again"
        )
    return tokens[int(index)]
