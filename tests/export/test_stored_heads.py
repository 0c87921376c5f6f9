"""LM heads that are stored beside an embedding which the configuration says is the head."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from adainfer_export.sources import huggingface, resolve, stored_heads

from ..checkpoints import edit_config, make_checkpoint

# Of tied variants: where their embedding is, and a name of their head.
HEADS = {
    "llama-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma3": ("model.embed_tokens.weight", "lm_head.weight"),
    "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}


def with_head(folder, variant, change):
    """A tied checkpoint with a stored head, the embedding as `change` makes it."""
    make_checkpoint(folder, variant, tokenizer=False, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding, head = HEADS[variant]
    tensors[head] = change(tensors[embedding]).clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return resolve(str(folder))


def moved(embedding):
    changed = embedding.clone()
    changed[-1, -1] += 0.5
    return changed


@pytest.mark.parametrize("variant", HEADS)
def test_another_head_is_not_tied(tmp_path, variant):
    checkpoint = with_head(tmp_path, variant, moved)
    assert not checkpoint.tied_head
    assert not checkpoint.config.tie_word_embeddings
    assert HEADS[variant][1] in checkpoint.unused(frozenset())


@pytest.mark.parametrize("variant", HEADS)
def test_a_copy_of_the_embedding_is_tied(tmp_path, variant):
    checkpoint = with_head(tmp_path, variant, lambda embedding: embedding)
    assert checkpoint.tied_head
    assert checkpoint.config.tie_word_embeddings
    assert HEADS[variant][1] not in checkpoint.unused(frozenset())


def test_a_head_of_another_shape_is_not_tied(tmp_path):
    assert not with_head(tmp_path, "llama-tied", lambda embedding: embedding[:-1]).tied_head


def test_a_configuration_that_unties_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "equal_tensors", lambda *_: pytest.fail("read"))
    make_checkpoint(tmp_path, "llama", tokenizer=False)
    assert not resolve(str(tmp_path)).tied_head
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(pytest.fail.Exception, match="read"):
        assert resolve(str(tmp_path)).tied_head


def test_tensors_are_compared_piece_by_piece(monkeypatch):
    monkeypatch.setattr(stored_heads, "_VALUES_AT_ONCE", 100)
    tensors = {"a": np.arange(240.0).reshape(30, 8), "b": np.arange(240.0).reshape(30, 8)}
    sizes = []

    def read(name, rows):
        sizes.append(tensors[name][rows].size)
        return tensors[name][rows]

    assert stored_heads.equal_tensors(read, "a", "b", (30, 8))
    assert max(sizes) <= 100
    assert sum(sizes) == 480
    tensors["b"][13, 3] = -1.0
    sizes.clear()
    assert not stored_heads.equal_tensors(read, "a", "b", (30, 8))
    assert sum(sizes) < 480  # not read to the end
