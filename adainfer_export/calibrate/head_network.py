"""Norm and LM head as a frozen torch network: what everything distilled is measured through.

The loss is

    (1 − h) · KL(full model ‖ exit) + h · (− log p_exit(full model's token)),

both at a temperature below 1, for what counts is the first token (tuned lenses are trained so too:
arXiv 2303.08112, without temperature and second term). Logits are taken over the few thousand
tokens that the full model considers at all on these prompts, and some random ones: one step then
costs a twelfth of one over SmolLM2's whole vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine

from .head import Head

__all__ = ["HeadNetwork", "considered_tokens"]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

_TEMPERATURE, _HARD = 0.5, 0.5
_CONSIDERED, _RANDOM_TOKENS, _TOP = 3584, 512, 16
_ROWS_FOR_TOKENS = 2000


def considered_tokens(engine: Engine, final: Float32, random: np.random.Generator) -> Int64:
    """Tokens among the full model's best in some rows, the most frequent ones, and random ones."""
    vocabulary = engine.manifest.model.vocab_size
    counts = np.zeros(vocabulary, np.int64)
    rows = random.permutation(len(final))[:_ROWS_FOR_TOKENS]
    for first in range(0, len(rows), 64):
        logits = engine.backend.probe_logits(np.ascontiguousarray(final[rows[first : first + 64]]))
        most = min(_TOP, vocabulary)
        np.add.at(counts, np.argpartition(logits, -most, axis=1)[:, -most:], 1)
    frequent = np.argsort(-counts, kind="stable")[:_CONSIDERED]
    others = random.choice(vocabulary, min(_RANDOM_TOKENS, vocabulary), replace=False)
    return np.union1d(frequent[counts[frequent] > 0], others)


class HeadNetwork:
    """Norm and head over the considered tokens, as torch sees them."""

    def __init__(self, head: Head, tokens: Int64) -> None:
        import torch

        self._torch = torch
        self._head = head
        self._rows = torch.from_numpy(head.rows(tokens).T.copy())
        self._weight = torch.from_numpy(np.array(head.norm_weight, np.float32))
        norm_bias, bias = head.norm_bias, None if head.bias is None else head.bias[tokens]
        self._norm_bias, self._bias = (
            None if values is None else torch.from_numpy(np.array(values, np.float32))
            for values in (norm_bias, bias)
        )

    def teach(self, final: Float32) -> tuple[Any, Any]:
        """Log-probabilities `[rows, tokens]` of final hidden states, and the best columns."""
        with self._torch.no_grad():
            logs = [
                self._log_probs(self._torch.from_numpy(np.ascontiguousarray(part))).half()
                for part in np.array_split(final, max(1, len(final) // 1024))
            ]
        target = self._torch.cat(logs)
        return target, target.argmax(dim=1)

    def loss(self, hidden: Any, target: Any, best: Any) -> Any:
        """Of hidden states `[rows, hidden]` in the place of the final ones, against `teach`'s."""
        log_probs, target = self._log_probs(hidden), target.float()
        divergence = (target.exp() * (target - log_probs)).sum(dim=1).mean()
        miss = self._torch.nn.functional.nll_loss(log_probs, best)
        return (1.0 - _HARD) * divergence + _HARD * miss

    def _log_probs(self, hidden: Any) -> Any:
        if self._head.centred:
            hidden = hidden - hidden.mean(dim=-1, keepdim=True)
        square = hidden.square().mean(dim=-1, keepdim=True)
        normed = hidden * self._torch.rsqrt(square + self._head.epsilon) * self._weight
        if self._norm_bias is not None:
            normed = normed + self._norm_bias
        logits = normed @ self._rows
        if self._bias is not None:
            logits = logits + self._bias
        if self._head.cap is not None:
            logits = self._head.cap * self._torch.tanh(logits / self._head.cap)
        return self._torch.log_softmax(logits / _TEMPERATURE, dim=-1)
