"""Streamed text: pieces that are never taken back, and together are the text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from adainfer_runtime.detokenise import Detokeniser
from adainfer_runtime.errors import RequestError
from adainfer_runtime.stop_strings import StopStrings
from adainfer_runtime.tokenizer import Tokenizer

WORDS = ["Ġthe", "Ġa", "the", "Ċ", "âĤ", "âĤ¬", "¬ð", "ðŁĺ", "Â", "Ġâ", "æĹ¥æľ¬"]
SP_WORDS = ["▁", "▁the", "▁a", "the", "日本", "▁▁", "é", "!", ","]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *WORDS]
    inner = HfTokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.add_tokens([AddedToken("[TOOL]", special=False)])
    return Tokenizer(inner)


def sentencepiece() -> Tokenizer:
    """As Llama-2's converted tokenizer is."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *SP_WORDS]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    inner = HfTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner)


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()
SIZE = 2 + 256 + len(WORDS) + 1 + 3  # a few ids that the tokenizer does not know
SP_SIZE = 3 + 256 + len(SP_WORDS)
RANDOM = st.one_of(
    st.lists(st.integers(0, SIZE - 1), max_size=40),
    st.lists(st.integers(2 + 188, SIZE - 1), max_size=40),  # mostly parts of characters
)
SP_TOKENS = st.one_of(
    st.integers(0, SP_SIZE - 1),
    st.integers(3 + 256, SP_SIZE - 1),
    st.sampled_from([3 + 0xE2, 3 + 0x82, 3 + 0xAC]),
)


def streamed(tokenizer, tokens, prompt=()):
    detokeniser = Detokeniser(tokenizer, prompt)
    pieces = [detokeniser.push(token) for token in tokens]
    return [*pieces, detokeniser.flush()]


@settings(max_examples=250, deadline=None)
@given(tokens=RANDOM, prompt=st.lists(st.integers(0, SIZE - 1), max_size=12))
def test_byte_level_pieces_are_the_decoded_text(tokens, prompt):
    assert "".join(streamed(BYTE_LEVEL, tokens)) == BYTE_LEVEL.decode(tokens)
    assert "".join(streamed(BYTE_LEVEL, tokens, prompt)) == BYTE_LEVEL.decode(tokens)


@settings(max_examples=250, deadline=None)
@given(tokens=st.lists(SP_TOKENS, max_size=40))
def test_sentencepiece_pieces_are_the_decoded_text_where_it_is_valid(tokens):
    text, decoded = "".join(streamed(SENTENCEPIECE, tokens)), SENTENCEPIECE.decode(tokens)
    if "\ufffd" not in decoded:
        assert text == decoded


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_characters_come_whole(text):
    tokens = BYTE_LEVEL.encode_continuation(text)  # a token per byte
    pieces = streamed(BYTE_LEVEL, tokens)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert all(len(piece) <= 1 for piece in pieces)  # and as soon as they are complete


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=12).filter(lambda t: "\ufffd" not in t))
def test_fallback_bytes_come_as_characters(text):
    tokens = [3 + byte for byte in text.encode()]
    pieces = streamed(SENTENCEPIECE, [3 + 256 + 3, *tokens])  # behind a word
    assert "".join(pieces) == "the" + text
    assert all(len(piece) <= 1 for piece in pieces[1:])


def test_text_continues_the_prompt():
    word, other, end = 3 + 256 + 1, 3 + 256 + 2, 2
    assert streamed(SENTENCEPIECE, [other], [word]) == [" a", ""]
    assert streamed(SENTENCEPIECE, [other, end, word]) == ["a", "", " the", ""]
    assert streamed(SENTENCEPIECE, [end, 3 + 256, word]) == ["", "", " the", ""]
    assert streamed(SENTENCEPIECE, [other], [end]) == ["a", ""]


def test_wrong_bytes_do_not_hold_the_text_for_ever():
    tokens = [3 + 0x82] * 100
    pieces = streamed(SENTENCEPIECE, tokens)
    assert "".join(pieces) == "\ufffd" * 100
    assert len(pieces[-1]) <= 10
    euro = [3 + 0xE2, 3 + 0x82, 3 + 0xAC]
    assert "".join(streamed(SENTENCEPIECE, [*euro, 3 + 0xFF, 3 + 256 + 3])) == "€\ufffdthe"


@settings(max_examples=250, deadline=None)
@given(
    text=st.text("abc", max_size=20),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_strings_are_found_however_the_text_is_cut(text, strings, cuts):
    expected, found = text, False
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in strings if text[:end].endswith(s)]
        if starts:
            expected, found = text[: min(starts)], True
            break
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stops, out = StopStrings(strings), ""
    for start, end in pairwise(places):
        out += stops.push(text[start:end])
        assert expected.startswith(out)  # nothing of a stop string has been let through
    assert (out + stops.flush(), stops.found) == (expected, found)


def test_what_may_begin_a_stop_string_waits():
    stops = StopStrings(["\n\nUser:"])
    pieces = [stops.push(piece) for piece in ("one\n", "\n", "U", "s two", "\n\nUse", "r: x", "y")]
    assert pieces == ["one", "", "", "\n\nUs two", "", "", ""]
    assert stops.found
    assert stops.flush() == ""


def test_empty_stop_string():
    with pytest.raises(RequestError, match="a stop string is empty"):
        StopStrings(["a", ""])
