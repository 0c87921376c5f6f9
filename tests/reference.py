"""What transformers computes on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def reference_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """`[tokens, vocab_size]`."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


def reference_greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """Greedy continuation, without stopping at an end token."""
    ids = torch.tensor([list(tokens)])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(tokens) :].tolist()
