"""The folder's Hugging Face tokenizer."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from .errors import ManifestError, TokenizerMissingError
from .manifest import Manifest

__all__ = ["Tokenizer", "load_tokenizer"]


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, inner: HfTokenizer) -> None:
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the model expects at the start."""
        return list(self._inner.encode(text).ids)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that follows other text: no special tokens."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Text without special tokens."""
        return self._inner.decode(tokens, skip_special_tokens=True)


class _NoTokenizer(Tokenizer):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, text: str) -> list[int]:
        raise self._error()

    def encode_continuation(self, text: str) -> list[int]:
        raise self._error()

    def decode(self, tokens: list[int]) -> str:
        return ""

    def _error(self) -> TokenizerMissingError:
        return TokenizerMissingError(
            f"{self._folder} was exported without a tokenizer: give token ids instead of text, "
            "or export again from a checkpoint that has a tokenizer.json"
        )


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer, or one that refuses text where the folder has none.

    Raises:
        ManifestError: tokenizer.json cannot be parsed.
    """
    if manifest.tokenizer is None:
        return _NoTokenizer(folder)
    path = folder / manifest.tokenizer.file
    try:
        return Tokenizer(HfTokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises bare Exception
        raise ManifestError(f"{path} is no tokenizer: {error}") from error
