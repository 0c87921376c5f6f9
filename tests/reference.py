"""What transformers computes on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from adainfer_export.float8 import dequantise_float8, quantise_float8
from adainfer_export.lower import PRECISIONS
from adainfer_export.quantise import dequantise_blocks, quantise_blocks


def reference_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """`[tokens, vocab_size]`."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


def reference_greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """Greedy continuation, without stopping at an end token.

    Over a cache of all positions: transformers' own choice drops what is out of a `sliding_window`
    in families whose attention knows of none.
    """
    ids = torch.tensor([list(tokens)])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            past_key_values=DynamicCache(),
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(tokens) :].tolist()


def dequantised_reference(made: Any, precision: str) -> Any:
    """The transformers model with the weights that a quantised engine really has."""
    spec = made.engine.manifest.quantisation
    record = replace(
        PRECISIONS[precision], block_size=spec.block_size, down_block_size=spec.down_block_size
    )
    model = copy.deepcopy(made.reference)
    tokens = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is tokens
    with torch.no_grad():
        for place, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                positions = isinstance(module, torch.nn.Embedding) and parameter is not tokens
                if parameter.dim() != 2 or positions:
                    continue
                blocks = record.storage(f"{place}.{name}")
                if parameter is tokens:
                    blocks = record.embedding("", tied=tied)
                conv1d = type(module).__name__ == "Conv1D"  # stored as [in, out]
                weight = parameter.numpy().T if conv1d else parameter.numpy()
                stored = quantise_blocks(weight, blocks.bits, blocks.block_size)
                value = dequantise_blocks(stored.packed, stored.scales, blocks.bits)
                parameter.copy_(torch.from_numpy(value.T.copy() if conv1d else value))
    return model


def float8_reference(made: Any, *, rounded: bool) -> Any:
    """The transformers model with the weights of an fp8 engine's layers, in float32 arithmetic.

    With `rounded` inputs of these layers are rounded to 8-bit floats as well.
    """
    model = copy.deepcopy(made.reference)
    head = model.get_output_embeddings()
    for module in model.modules():
        conv1d = type(module).__name__ == "Conv1D"  # stored as [in, out]
        if module is head or not (conv1d or isinstance(module, torch.nn.Linear)):
            continue
        with torch.no_grad():
            weight = module.weight.numpy().T if conv1d else module.weight.numpy()
            value = dequantise_float8(*quantise_float8(weight))
            module.weight.copy_(torch.from_numpy(value.T.copy() if conv1d else value))
        if rounded:
            module.register_forward_pre_hook(lambda _, inputs: (round_rows(inputs[0]), *inputs[1:]))
    return model


def round_rows(values: torch.Tensor) -> torch.Tensor:
    """Each position to 8-bit floats, the largest magnitude to 256 of their units."""
    largest = values.abs().amax(dim=-1, keepdim=True).clamp_min(6e-5)
    codes = (values / largest * 256).to(torch.float8_e4m3fn)
    return codes.float() / 256 * largest
