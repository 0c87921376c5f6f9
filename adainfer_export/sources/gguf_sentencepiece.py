"""SentencePiece's pair encoding from a GGUF file's keys (Llama 2, TinyLlama, Mistral).

As transformers converts a `tokenizer.model` (`LlamaConverter`), which is also how llama.cpp cuts
text: a space before every text between special tokens, and the pair whose piece has the best score
is merged first. transformers' own reading of GGUF moves from release to release, and puts the space
before the first text alone; it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from ..errors import CheckpointError
from .gguf_keys import NORMAL, UNUSED, USER_DEFINED, key_of, named_token, required

__all__ = ["sentencepiece_tokenizer"]

_SPACE = "▁"
_MERGED = (NORMAL, USER_DEFINED, UNUSED)  # bytes and control tokens are no result of a merge


def sentencepiece_tokenizer(keys: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer, as yet without special tokens.

    Raises:
        CheckpointError: keys are missing, or do not belong together.
    """
    tokens, scores, kinds = (required(keys, n, where) for n in ("tokens", "scores", "token_type"))
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(
            f"{where}: {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} kinds of them; "
            "the file is damaged: download it again"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, scores, kinds),
            unk_token=named_token(keys, "unknown", where),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = bool(keys.get(key_of("add_space_prefix"), True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend(_SPACE)] if prefixed else []),
            normalizers.Replace(" ", _SPACE),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if prefixed else []),
        ]
    )
    return tokenizer


def _merges(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, pieces of the best score first."""
    pieces = {
        token: float(score)
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind in _MERGED
    }
    found = [
        ((-score, -len(left), -len(right)), (left, right))
        for piece, score in pieces.items()
        for left, right in _halves(piece)
        if left in pieces and right in pieces
    ]
    found.sort(key=lambda merge: merge[0])  # of equal scores, transformers' order: long ones first
    return [halves for _, halves in found]


def _halves(piece: str) -> Iterator[tuple[str, str]]:
    return ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
