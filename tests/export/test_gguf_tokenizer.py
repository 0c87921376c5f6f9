"""What a GGUF file's keys say of its tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from gguf import GGMLQuantizationType as Type
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import LlamaConverter, generate_merges

from adainfer_export import ExportRequest, export
from adainfer_export.errors import CheckpointError, UnsupportedError
from adainfer_export.sources.gguf_tokenizer import build_tokenizer, special_tokens
from adainfer_export.writer import DataWriter
from adainfer_runtime import Engine

from ..checkpoints import make_checkpoint
from ..gguf_files import sentencepiece_keys, write_gguf

PLAIN = [
    "The there, in a hen.",
    "a  b    c     d",
    "café 日本 🤖",
    "tab\tand\nline\x00",
    "ends in  ",
    "",
]
TEXTS = [*PLAIN, "  there", " ", "▁the", "<s>the</s> <tool>in", "a<unk>b", "<0x41> [PAD319]"]


def by_transformers(keys, prefix):
    """The parts of `LlamaConverter`, which wants a tokenizer.model, on the file's vocabulary."""
    tokens = keys["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges(
        vocabulary, dict(zip(tokens, keys["tokenizer.ggml.scores"], strict=True))
    )
    made = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    converter = SimpleNamespace(
        original_tokenizer=SimpleNamespace(legacy=True, add_prefix_space=prefix)
    )
    made.normalizer = LlamaConverter.normalizer(converter, None)
    made.decoder = LlamaConverter.decoder(converter, "▁", prefix)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return made


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_is_converted_as_by_transformers(text, prefix):
    keys = sentencepiece_keys(add_space_prefix=prefix, add_bos_token=False)
    built, expected = build_tokenizer(keys, "x"), by_transformers(keys, prefix is not False)
    ids = built.encode(text).ids
    assert ids == expected.encode(text).ids
    for skip in (True, False):
        assert built.decode(ids, skip_special_tokens=skip) == (
            expected.decode(ids, skip_special_tokens=skip)
        )
    if "<" not in text and not (prefix is False and text.startswith(" ")):
        assert built.decode(ids) == text.replace("▁", " ")


def test_pieces_of_better_scores_are_merged_first():
    built = build_tokenizer(sentencepiece_keys(), "x")
    assert built.encode("there 日🤖").tokens == [
        "<s>", "▁there", "▁", "日", "<0xF0>", "<0x9F>", "<0xA4>", "<0x96>"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, [1], []),  # as llama.cpp does where the file says nothing
        ({"add_bos_token": True, "add_eos_token": False}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"add_eos_token": True, "bos_token_id": 2}, [2], [2]),
    ],
)
def test_what_stands_around_a_text(changes, first, last):
    built = build_tokenizer(sentencepiece_keys(**changes), "x")
    plain = built.encode("the", add_special_tokens=False).ids
    assert built.encode("the").ids == first + plain + last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "^x: key tokenizer.ggml.scores is missing; convert the model again, or"),
        ({"token_type": None}, "key tokenizer.ggml.token_type is missing"),
        ({"scores": [0.0]}, "^x: 320 tokens, 1 scores and 320 kinds of them; the file is damaged"),
        ({"bos_token_id": None}, "key tokenizer.ggml.bos_token_id is missing"),
        ({"bos_token_id": 320}, "tokenizer.ggml.bos_token_id is 320, of 320 tokens"),
        ({"unknown_token_id": 999}, "tokenizer.ggml.unknown_token_id is 999, of 320 tokens"),
        ({"model": "gpt2"}, "key tokenizer.ggml.merges is missing"),
    ],
)
def test_keys_that_do_not_belong_together(changes, message):
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(sentencepiece_keys(**changes), "x")


@pytest.mark.parametrize("changes", [{"model": "bert"}, {"model": "gpt2", "pre": "exaone"}])
def test_other_tokenizers_are_refused_before_weights_are_written(tmp_path, monkeypatch, changes):
    model = make_checkpoint(tmp_path / "c", tokenizer=False)
    write_gguf(tmp_path / "m.gguf", model, {}, Type.F16, keys=sentencepiece_keys(**changes))
    monkeypatch.delattr(DataWriter, "write_all")
    with pytest.raises(UnsupportedError, match=r"is not supported \(supported: llama, and gpt2 w"):
        export(ExportRequest(str(tmp_path / "m.gguf"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_engine_from_a_file_with_sentencepiece(tmp_path):
    model = make_checkpoint(tmp_path / "c", tokenizer=False)
    keys = sentencepiece_keys()
    write_gguf(tmp_path / "m.gguf", model, {}, Type.F16, keys=keys)
    export(ExportRequest(str(tmp_path / "m.gguf"), tmp_path / "out", precision="fp32"))
    engine = Engine.load(tmp_path / "out", verify=True)
    assert engine.manifest.model.eos_token_ids == (2,)
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf", trust_remote_code=False)
    for text in PLAIN:
        ids = engine.tokenizer.encode(text)
        assert list(ids) == other(text).input_ids
        assert engine.tokenizer.decode(list(ids)) == text
    assert engine.generate("the hen", max_new_tokens=4, ignore_eos=True).text is not None


def byte_level_keys(pre, **changes):
    """ "ab" is a token that no merge leads to."""
    found = {"model": "gpt2", "pre": pre, "tokens": ["<s>", "a", "b", "ab", "</s>"], "merges": [],
             "token_type": [3, 1, 1, 1, 3], "bos_token_id": 0, "eos_token_id": 4}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (found | changes).items()}


@pytest.mark.parametrize(
    ("pre", "changes", "expected"),
    [
        ("llama-bpe", {}, [0, 3]),
        ("llama-bpe", {"add_bos_token": False}, [3]),
        ("llama3", {}, [0, 3]),
        ("llama-v3", {}, [0, 3]),
        ("tekken", {}, [0, 3]),
        ("gpt-2", {}, [1, 2]),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [0, 1, 2, 4]),
    ],
)
def test_what_a_pre_tokeniser_s_name_says_besides(pre, changes, expected):
    assert build_tokenizer(byte_level_keys(pre, **changes), "x").encode("ab").ids == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't stop", ["don", "'t", "Ġstop"]),
        ("HelloWorld HTTPServer", ["Hello", "World", "ĠHTTPServer"]),
        ("in 2024, a/b//\n c", ["in", "Ġ", "2", "0", "2", "4", ",", "Ġa", "/b", "//Ċ", "Ġc"]),
        ("  x\n\ny", ["Ġ", "Ġx", "ĊĊ", "y"]),
    ],
)
def test_words_of_tekken(text, words):
    """Its pattern as Mistral's `tekken.json` has it."""
    found = build_tokenizer(byte_level_keys("tekken"), "x").pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in found] == words


def test_special_tokens_have_the_names_that_templates_use():
    keys = {
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert special_tokens(keys, "x") == named
