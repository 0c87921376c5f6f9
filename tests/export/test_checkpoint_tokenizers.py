"""Tokenizers of Hugging Face folders that are no tokenizer.json, and those that are damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from adainfer_export import ExportRequest, export
from adainfer_export.errors import CheckpointError
from adainfer_export.sources.huggingface import HuggingFaceFolder
from adainfer_runtime import Engine

from ..checkpoints import make_checkpoint

# Answers `y` to whatever is asked on standard input; prints the error.
WRITE = """
import sys
from pathlib import Path
from adainfer_export.errors import CheckpointError
from adainfer_export.sources.huggingface import HuggingFaceFolder
try:
    HuggingFaceFolder(Path(sys.argv[1])).write_tokenizer(Path(sys.argv[2]))
except CheckpointError as error:
    print(error)
"""


@pytest.fixture
def slow(tmp_path):
    """A checkpoint with vocab.json and merges.txt in place of a tokenizer.json."""
    make_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "h", "i", "hi"]
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)})
    (tmp_path / "checkpoint" / "vocab.json").write_text(vocabulary)
    (tmp_path / "checkpoint" / "merges.txt").write_text("#version: 0.2\nh i\n")
    return tmp_path / "checkpoint"


def test_code_of_a_checkpoint_is_never_run(slow, tmp_path):
    """Not even where somebody at the terminal answers transformers' question with yes."""
    (slow / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass OwnTokenizer: pass\n"
    )
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
    }
    (slow / "tokenizer_config.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(slow), str(tmp_path / "out")],
        input="y\n",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert not (tmp_path / "ran").exists()
    assert "Do you wish to run" not in done.stdout
    assert done.stdout == (
        f"{slow}: the tokenizer cannot be converted to tokenizer.json (it is code of the "
        "checkpoint's own, which is never run); put a tokenizer.json beside it\n"
    )


def test_sentencepiece_models_are_converted(tmp_path):
    """A tokenizer.model alone, as older Llama and Mistral repositories have it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import AutoTokenizer

    folder = tmp_path / "checkpoint"
    make_checkpoint(folder, tokenizer=False)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\nhello world of pieces\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    export(ExportRequest(str(folder), tmp_path / "out", precision="fp32"))
    tokenizer = Engine.load(tmp_path / "out").tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    reference = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for prompt in ("the quick brown fox", "hello wörld", "of"):
        ids = tokenizer.encode(prompt)
        assert ids == reference.encode(prompt)
        assert ids == [pieces.bos_id(), *pieces.encode(prompt)]
        assert tokenizer.decode(ids) == prompt


def refusal(folder, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceFolder(folder).write_tokenizer(tmp_path / "out")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_sentencepiece_is_named(tmp_path, monkeypatch):
    """Not tiktoken, for which transformers then asks."""
    make_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    (tmp_path / "checkpoint" / "tokenizer.model").write_bytes(b"\x0a\x05hello")
    monkeypatch.setattr("adainfer_export.sources.huggingface.find_spec", lambda name: None)
    message = refusal(tmp_path / "checkpoint", tmp_path)
    assert "tokenizer.model needs the `sentencepiece` package: pip install" in message
    assert "tiktoken" not in message


def test_a_damaged_sentencepiece_model_is_named(tmp_path):
    pytest.importorskip("sentencepiece")
    make_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    (tmp_path / "checkpoint" / "tokenizer.model").write_bytes(b"\x0a\x05hello")
    message = refusal(tmp_path / "checkpoint", tmp_path)
    assert "(tokenizer.model is no SentencePiece model); put a tokenizer.json" in message


def test_reasons_for_a_tokenizer_that_is_not_converted_are_one_line(slow, tmp_path):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (slow / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "cannot be converted to tokenizer.json" in refusal(slow, tmp_path)
