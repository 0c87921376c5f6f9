"""What an engine takes on a device: counted before anything is written.

Plans of TensorRT hold their own weights, and share embedding and LM head alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adainfer_runtime.backends.layout import PROBED_ROWS

from .build import BuildRequest
from .build.shared_tables import multiplies_in_place
from .lower.precision import PRECISIONS

__all__ = ["Footprint", "build_bytes", "footprint"]

_INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
_ROWS = BuildRequest("tensorrt").max_rows
# All adapters together (see `calibrate.low_rank`), and one layer's weights for each translator (see
# `calibrate.translate`): stored in 16 bits, in plans as 32.
_ADAPTER_SHARE = 0.05
_TRANSLATORS = 2
_HALF, _FULL = 2, 4  # bytes
# TensorRT-RTX 1.7.1, layers of Llama-2-7B: 0.79, 1.2 and 1.65 GB for plans of one, two and three in
# int4 (0.12 GB each), 2.3 GB for one in fp16 (0.81 GB).
_BUILDER_BYTES = 400_000_000
_BUILD_BYTES_PER_PLAN_BYTE = 3.7


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device.

    Attributes:
        layers: weights of all layers, once for each profile where they have 16 or 8 bits.
        tables: embedding and LM head in 16 bits: one matrix where they are tied, and one more where
            the probe cannot read what the other plans share.
        exits: adapters and translators.
        scratch: activations of the largest pass, and the logits that are probed at once.
        per_position: of the cache, of hidden states that wait, and what attention takes for it.
    """

    layers: int
    tables: int
    exits: int
    scratch: int
    per_position: int

    @property
    def fixed(self) -> int:
        """All but what grows with the cache."""
        return self.layers + self.tables + self.exits + self.scratch


@dataclass(frozen=True)
class _Shape:
    """Sizes of a model; MLPs count as gated ones."""

    layers: int
    hidden: int
    inner: int
    heads: int
    query: int
    kv: int
    vocabulary: int
    tables: int

    @classmethod
    def of(cls, config: Any) -> _Shape:
        hidden, heads = config.hidden_size, config.num_attention_heads
        probes_own = not multiplies_in_place((config.vocab_size, hidden))
        inner = next((int(w) for n in _INNER_WIDTHS if (w := getattr(config, n, None))), 4 * hidden)
        width = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            inner=inner,
            heads=heads,
            query=heads * width,
            kv=(getattr(config, "num_key_value_heads", None) or heads) * width,
            vocabulary=config.vocab_size,
            tables=(1 if config.tie_word_embeddings else 2) + int(probes_own),
        )

    @property
    def layer_weights(self) -> int:
        return self.hidden * (2 * self.query + 2 * self.kv + 3 * self.inner)


def footprint(config: Any, precision: str, target: str, *, context_exit: bool) -> Footprint:
    """Of plans with the profiles that `adainfer build` makes by default.

    Args:
        config: a `transformers.PretrainedConfig`.
        context_exit: whether translators will be fitted.
    """
    shape = _Shape.of(config)
    stored = shape.layers * shape.layer_weights * PRECISIONS[precision].layer_bits / 8
    table = _HALF * shape.vocabulary * shape.hidden
    adapters = int(_ADAPTER_SHARE * (stored + 2 * table)) * _FULL // _HALF
    translators = _TRANSLATORS * _FULL * shape.layer_weights if context_exit else 0
    return Footprint(
        layers=shape.layers * _layer_bytes(shape, precision),
        tables=shape.tables * table,
        exits=adapters + translators,
        scratch=_scratch(shape),
        per_position=_per_position(shape, target),
    )


def build_bytes(config: Any, precision: str, layers: int) -> int:
    """What TensorRT's builder takes for an engine of so many layers."""
    plan = layers * _layer_bytes(_Shape.of(config), precision)
    return _BUILDER_BYTES + int(_BUILD_BYTES_PER_PLAN_BYTE * plan)


def _layer_bytes(shape: _Shape, precision: str) -> int:
    """Of a plan with two profiles: of int4 weights both use one layout."""
    record = PRECISIONS[precision]
    profiles = 1 if record.bits == 4 else 2
    return int(profiles * shape.layer_weights * record.layer_bits / 8)


def _scratch(shape: _Shape) -> int:
    # Residual streams in 32 bits before and behind additions; the MLP's two products and theirs.
    row = 4 * _FULL * shape.hidden + 3 * _HALF * shape.inner + 2 * _HALF * shape.query
    logits = 3 * _FULL * PROBED_ROWS * shape.vocabulary  # as they are, in chunks, and softmax
    return _ROWS * row + logits


def _per_position(shape: _Shape, target: str) -> int:
    cache = shape.layers * 2 * shape.kv * _HALF
    waiting = _FULL * shape.hidden
    mask = _ROWS * _HALF
    # Fused attention keeps no scores; plain operators have them before and behind the softmax.
    scores = 2 * _HALF * _ROWS * shape.heads if target == "tensorrt-basic" else 0
    return cache + waiting + mask + scores
