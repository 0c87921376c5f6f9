"""Tensors as the graph wants them, over tensors as checkpoints store them."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adainfer_export import ExportRequest, export
from adainfer_export.decoders.views import Heads, View
from adainfer_export.errors import CheckpointError
from adainfer_export.quantise import BlockRows, Blocks
from adainfer_export.sources.huggingface import HuggingFaceFolder
from adainfer_export.sources.viewed import ViewedCheckpoint
from adainfer_runtime import Engine

from ..checkpoints import edit_config, make_checkpoint
from ..reference import reference_logits


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    width=st.integers(1, 4),
    transposed=st.booleans(),
)
def test_rows_of_a_fused_matrix_put_together_are_the_matrix(sizes, width, transposed):
    matrix = np.random.default_rng(0).normal(size=(sum(sizes), width)).astype(np.float32)
    stored = matrix.T.copy() if transposed else matrix
    ends = np.cumsum([0, *sizes]).tolist()
    views = [
        View("w", stored.shape, transposed=transposed, rows=(first, last))
        for first, last in itertools.pairwise(ends)
    ]
    np.testing.assert_array_equal(np.concatenate([view.of(stored) for view in views]), matrix)
    assert [view.result for view in views] == [(size, width) for size in sizes]


@given(count=st.integers(1, 4), parts=st.integers(1, 4), head_dim=st.integers(1, 4))
def test_parts_of_heads_are_those_that_a_model_chunks(count, parts, head_dim):
    stored = np.random.default_rng(0).normal(size=(count * parts * head_dim, 3)).astype(np.float32)
    for part in range(parts):
        view = View("w", stored.shape, heads=Heads(count, parts, part))
        chunk = stored.reshape(count, parts * head_dim, 3)[:, part * head_dim :][:, :head_dim]
        np.testing.assert_array_equal(view.of(stored), chunk.reshape(-1, 3))
        assert view.result == (count * head_dim, 3)
    bias = View("b", (len(stored),), heads=Heads(count, parts, 0)).of(stored[:, 0])
    assert bias.shape == (count * head_dim,)


class Stored:
    """A checkpoint of one matrix, which counts the values that are read."""

    def __init__(self, matrix):
        self.matrix, self.values = matrix, 0

    def shape(self, name):
        return self.matrix.shape

    def read(self, name, rows=None):
        found = self.matrix[rows or slice(None)]
        self.values += found.size
        return found

    def blocks(self, name):
        return Blocks(4, 16, kept=True, shifted=True)

    def read_blocks(self, name, rows):
        scales = self.matrix[rows, :2]
        codes = np.repeat(scales[..., None], 16, axis=2).astype(np.uint8)
        return BlockRows(codes, scales, -scales)


@given(
    kind=st.sampled_from(["rows", "heads", "transposed", "added"]),
    bounds=st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda b: b[0] < b[1]),
)
def test_rows_of_a_view_are_rows_of_what_it_gives(kind, bounds):
    matrix = np.arange(36 * 12, dtype=np.float32).reshape(36, 12)
    view = {
        "rows": View("w", (36, 12), rows=(7, 19)),
        "heads": View("w", (36, 12), heads=Heads(3, 3, 1)),
        "transposed": View("w", (36, 12), transposed=True),
        "added": View("w", (36, 12), rows=(0, 12), add=1.0),
    }[kind]
    stored, rows = Stored(matrix), slice(*bounds)
    seen = ViewedCheckpoint(stored, {"v": view})
    assert seen.shape("v")[0] == 12
    np.testing.assert_array_equal(seen.read("v", rows), view.of(matrix)[rows])
    if kind == "transposed":
        seen.read("v", rows)
        assert stored.values == matrix.size  # read in one piece, once
    else:
        assert stored.values == (rows.stop - rows.start) * 12
    if kind in ("rows", "heads"):
        assert seen.blocks("v") == stored.blocks("w")
        blocks = seen.read_blocks("v", rows)
        np.testing.assert_array_equal(blocks.scales, view.of(matrix)[rows, :2])
        np.testing.assert_array_equal(blocks.shifts, -blocks.scales)
        np.testing.assert_array_equal(blocks.codes[..., 3], blocks.scales.astype(np.uint8))
    else:
        assert seen.blocks("v") is None


def test_what_is_added_is_added_once():
    stored = np.array([0.5, -1.0], np.float32)
    np.testing.assert_array_equal(View("n", (2,), add=1.0).of(stored), [1.5, 0.0])


def test_names_and_shapes_are_the_checkpoints(checkpoint):
    views = {"q": View("model.layers.0.self_attn.q_proj.weight", (64, 64), rows=(0, 16))}
    seen = ViewedCheckpoint(HuggingFaceFolder(checkpoint), views, (("model.", "old."),))
    assert seen.stored_shape("q") == (64, 64)
    assert seen.shape("q") == seen.read("q").shape == (16, 64)
    assert "model.layers.0.self_attn.q_proj.weight" not in seen.unused(frozenset({"q"}))
    assert seen.stored_name("model.nothing") == "model.nothing"
    with pytest.raises(CheckpointError, match=r"tensor model\.nothing is missing"):
        seen.shape("model.nothing")


@pytest.mark.parametrize(
    ("variant", "prefix", "former"),
    [("gpt2", "transformer.", ""), ("gpt_neox", "lm_head.", "embed_out.")],
)
def test_former_names_of_tensors(tmp_path, variant, prefix, former):
    """Names that models on the hub have, and that transformers no longer writes."""
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = {
        former + name.removeprefix(prefix) if name.startswith(prefix) else name: tensor
        for name, tensor in load_file(path).items()
    }
    if former:
        tensors = {name.replace("lm_head.", former): tensor for name, tensor in tensors.items()}
    assert any(name.startswith(former) for name in tensors)
    assert not any(name.startswith(prefix) for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out", precision="fp32"))
    engine = Engine.load(tmp_path / "out")
    session = engine.session()
    session.extend([5, 17, 200, 43])
    session.complete()
    logits = engine.backend.probe_logits(session.hidden())
    np.testing.assert_allclose(logits, reference_logits(model, [5, 17, 200, 43]), atol=1e-3)


def test_short_engines_have_the_short_rotary_factors(tmp_path):
    model = make_checkpoint(tmp_path / "checkpoint", "phi3")  # trained on 16 positions
    prompt = list(range(5, 21))
    for length, equal in ((16, True), (17, False)):
        out = tmp_path / str(length)
        request = ExportRequest(
            str(tmp_path / "checkpoint"), out, precision="fp32", max_seq_len=length
        )
        export(request)
        engine = Engine.load(out)
        session = engine.session()
        session.extend(prompt)
        session.complete()
        logits = engine.backend.probe_logits(session.hidden())
        difference = np.abs(logits - reference_logits(model, prompt)).max()
        assert bool(difference <= 1e-3) is equal


def test_configurations_in_their_former_form(tmp_path):
    """Rotary keys as checkpoints on the hub have them."""
    from adainfer_export.decoders.rotary import rotary_tables

    make_checkpoint(tmp_path / "new", "gpt_neox")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config))
    edit_config(tmp_path / "old", rotary_pct=0.25, rotary_emb_base=1000)
    new, old = (
        rotary_tables(HuggingFaceFolder(tmp_path / name).config, 8) for name in ("new", "old")
    )
    np.testing.assert_array_equal(new.cos, old.cos)


def test_byte_level_tokenizers_in_two_files(tmp_path):
    """OPT's repositories hold vocab.json and merges.txt alone."""
    make_checkpoint(tmp_path / "checkpoint", "opt", tokenizer=False)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "h", "i", "hi", "Ġ"]
    (tmp_path / "checkpoint" / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)})
    )
    (tmp_path / "checkpoint" / "merges.txt").write_text("#version: 0.2\nh i\n")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
    }
    path = tmp_path / "checkpoint" / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out", precision="fp32"))
    tokenizer = Engine.load(tmp_path / "out").tokenizer
    assert tokenizer.encode("hi hi")[-3:] == [6, 7, 6]
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tmp_path / "checkpoint", trust_remote_code=False)
    assert tokenizer.encode("hi hi") == reference.encode("hi hi")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_decoder_of_a_model_that_sees(tmp_path, prefix):
    """Gemma 3 from 4B on: a text model beside a vision tower."""
    make_checkpoint(tmp_path / "text", "gemma3")
    shutil.copytree(tmp_path / "text", tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = {
        prefix + name.removeprefix("model."): tensor for name, tensor in load_file(path).items()
    }
    tensors["vision_tower.vision_model.x"] = tensors[f"{prefix}norm.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": config, "vision_config": {}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    files = [
        export(ExportRequest(str(tmp_path / name), tmp_path / f"{name}.out")).manifest.files
        for name in ("text", "whole")
    ]
    weights = [{name: file for name, file in made.items() if "stages" in name} for made in files]
    assert weights[0] == weights[1]
