"""A `tokenizers` tokenizer from a GGUF file's keys.

There are two kinds: byte-level pair encoding (`gpt2`) and SentencePiece's (`llama`). Of the first,
llama.cpp names a pre-tokeniser (`tokenizer.ggml.pre`) instead of describing it; the table holds
those that are known. An unknown one is refused: a nearly right tokenizer gives wrong answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ..errors import UnsupportedError
from .gguf_keys import CONTROL, UNKNOWN, USER_DEFINED, key_of, named_token, required
from .gguf_sentencepiece import sentencepiece_tokenizer

__all__ = ["build_tokenizer", "special_tokens"]

# What chat templates know by name, and what GGUF calls it.
_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
# The published split patterns of Llama-3 and Qwen-2 (cl100k with other digit groups).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Mistral's tekken: words part where a capital follows a small letter, digits stand alone, and no
# contractions are known.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_bytes() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(pattern: str) -> Callable[[], Any]:
    def build() -> Any:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


@dataclass(frozen=True)
class _PreTokenizer:
    """A pre-tokeniser, and what llama.cpp takes its name to say besides.

    Attributes:
        whole_words: a word that is in the vocabulary is one token, even if no merges lead to it.
        adds_bos: unless the file says otherwise (Llama 3's say nothing).
    """

    build: Callable[[], Any]
    whole_words: bool = False
    adds_bos: bool = False


_LLAMA3 = _PreTokenizer(
    _split(_SPLIT.replace("{DIGITS}", "{1,3}")), whole_words=True, adds_bos=True
)
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_byte_level),
    "smollm": _PreTokenizer(_digits_then_bytes),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    "qwen2": _PreTokenizer(_split(_SPLIT.replace("{DIGITS}", ""))),
    "tekken": _PreTokenizer(_split(_TEKKEN), whole_words=True, adds_bos=True),
}


def build_tokenizer(keys: Mapping[str, Any], where: str) -> Tokenizer:
    """The file's tokenizer with its special tokens, and those that it puts around a text.

    Raises:
        UnsupportedError: another tokenizer model or pre-tokeniser than the known ones.
        CheckpointError: a key is missing, or they do not belong together.
    """
    model, pre = keys.get(key_of("model")), str(keys.get(key_of("pre"), "gpt-2"))
    if model == "llama":
        tokenizer, adds_bos = sentencepiece_tokenizer(keys, where), True
    elif model == "gpt2" and pre in _PRE_TOKENIZERS:
        tokenizer = _byte_pairs(keys, _PRE_TOKENIZERS[pre], where)
        adds_bos = _PRE_TOKENIZERS[pre].adds_bos
    else:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UnsupportedError(
            f"{where}: GGUF tokenizer {model!r} with pre-tokeniser {pre!r} is not supported "
            f"(supported: llama, and gpt2 with {known}); export from the Hugging Face folder "
            "instead"
        )
    _add_tokens(tokenizer, keys)
    first = _around(keys, "bos", adds_bos, where)
    last = _around(keys, "eos", False, where)
    if first or last:
        ids = {token: tokenizer.token_to_id(token) for token in first + last}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last], special_tokens=list(ids.items())
        )
    return tokenizer


def _byte_pairs(keys: Mapping[str, Any], pre: _PreTokenizer, where: str) -> Tokenizer:
    tokens: list[str] = required(keys, "tokens", where)
    merges = [tuple(merge.split(" ", 1)) for merge in required(keys, "merges", where)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words)
    )
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, keys: Mapping[str, Any]) -> None:
    """Tokens that are found whole in a text; special ones are no text."""
    kinds = keys.get(key_of("token_type")) or []
    by_kind = list(zip(keys[key_of("tokens")], kinds, strict=False))
    special = [token for token, kind in by_kind if kind in (CONTROL, UNKNOWN)]
    plain = [token for token, kind in by_kind if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])


def _around(keys: Mapping[str, Any], name: str, default: bool, where: str) -> list[str]:
    """The token that stands before or behind every text, if one does."""
    if not keys.get(key_of(f"add_{name}_token"), default):
        return []
    required(keys, f"{name}_token_id", where)
    token = named_token(keys, name, where)
    return [] if token is None else [token]


def special_tokens(keys: Mapping[str, Any], where: str) -> dict[str, str]:
    """Special tokens by the names that Hugging Face has for them, as far as the file says.

    Raises:
        CheckpointError: one of them is none of the file's tokens.
    """
    found = {name: named_token(keys, called, where) for name, called in _NAMED.items()}
    return {name: token for name, token in found.items() if token is not None}
