"""What a GGUF file's keys say of its tokenizer."""

from __future__ import annotations

from adainfer_export.sources.gguf_tokenizer import special_tokens


def test_special_tokens_have_the_names_that_templates_use():
    keys = {
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
    }
    assert special_tokens(keys) == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
