"""A `tokenizers` tokenizer from a GGUF file's keys.

llama.cpp names a pre-tokeniser (`tokenizer.ggml.pre`) instead of describing it; the table holds
those that are known. An unknown one is refused: a nearly right tokenizer gives wrong answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ..errors import UnsupportedError

__all__ = ["build_tokenizer", "special_tokens"]

_CONTROL, _USER_DEFINED = 3, 4
# What chat templates know by name, and where a file says which token it is.
_NAMED = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# The published split patterns of Llama-3 and Qwen-2 (cl100k with other digit groups).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_bytes() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(digits: str) -> Callable[[], Any]:
    def build() -> Any:
        pattern = Regex(_SPLIT.replace("{DIGITS}", digits))
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _byte_level,
    "smollm": _digits_then_bytes,
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}


def build_tokenizer(keys: Mapping[str, Any], where: str) -> Tokenizer:
    """A byte-level BPE tokenizer with its special tokens and, if the file asks, a leading BOS.

    Raises:
        UnsupportedError: another tokenizer model or pre-tokeniser than the known ones.
    """
    model = keys.get("tokenizer.ggml.model")
    pre = keys.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UnsupportedError(
            f"{where}: GGUF tokenizer {model!r} with pre-tokeniser {pre!r} is not supported "
            f"(supported: gpt2 with {known}); export from the Hugging Face folder instead"
        )
    tokens: list[str] = keys["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = keys.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
    bos = keys.get("tokenizer.ggml.bos_token_id")
    if keys.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def special_tokens(keys: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names that Hugging Face has for them, as far as the file says."""
    tokens: list[str] = keys["tokenizer.ggml.tokens"]
    ids = {name: keys.get(key) for name, key in _NAMED.items()}
    return {name: tokens[int(token)] for name, token in ids.items() if token is not None}
