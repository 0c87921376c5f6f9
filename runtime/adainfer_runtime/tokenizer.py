"""The folder's Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from .chat_template import ChatTemplate, load_chat_template
from .errors import ManifestError, TokenizerMissingError
from .manifest import Manifest
from .values import require_text

__all__ = ["Tokenizer", "load_tokenizer"]


_NO_TEMPLATE = ChatTemplate(None, {})


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, inner: HfTokenizer, chat_template: ChatTemplate = _NO_TEMPLATE) -> None:
        self._inner = inner
        self.chat_template = chat_template
        added = inner.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in added.items() if token.special)

    def require(self) -> None:
        """Raises `TokenizerMissingError` where there is none."""

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the model expects at the start.

        Raises:
            RequestError: no text, such as one with lone surrogates.
        """
        require_text(text)
        return list(self._inner.encode(text).ids)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that follows other text: no special tokens.

        Raises:
            RequestError: see `encode`.
        """
        require_text(text)
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        values: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat under the folder's template (see `ChatTemplate.render`), which
        writes the special tokens itself.

        Raises:
            ChatTemplateError: no template, or it refuses these messages.
        """
        text = self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, values=values
        )
        return self.encode_continuation(text)

    def decode(self, tokens: list[int]) -> str:
        """Text without special tokens."""
        return self._inner.decode(tokens, skip_special_tokens=True)

    def has_text(self, token: int) -> bool:
        """False for special tokens, and for ids that the tokenizer does not know."""
        return token not in self._special and self._inner.id_to_token(token) is not None

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it, special ones too; empty for an unknown id."""
        return self._inner.id_to_token(token) or ""


class _NoTokenizer(Tokenizer):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.chat_template = _NO_TEMPLATE

    def encode(self, text: str) -> list[int]:
        raise self._error()

    def encode_continuation(self, text: str) -> list[int]:
        raise self._error()

    def decode(self, tokens: list[int]) -> str:
        return ""

    def has_text(self, token: int) -> bool:
        return False

    def token_text(self, token: int) -> str:
        return ""

    def require(self) -> None:
        raise self._error()

    def _error(self) -> TokenizerMissingError:
        return TokenizerMissingError(
            f"{self._folder} was exported without a tokenizer: give token ids instead of text, "
            "or export again from a checkpoint that has a tokenizer.json"
        )


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer, or one that refuses text where the folder has none.

    Raises:
        ManifestError: tokenizer.json or a file of the chat template cannot be parsed.
    """
    if manifest.tokenizer is None:
        return _NoTokenizer(folder)
    path = folder / manifest.tokenizer.file
    try:
        inner = HfTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ManifestError(f"{path} is no tokenizer: {error}") from error
    return Tokenizer(inner, load_chat_template(folder, manifest))
