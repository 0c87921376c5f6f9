"""How dialects lower the whole decoder before it is cut: attention, and what layers share."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from adainfer_runtime.backends.kv_scales import KvScales

from .attention import fuse_attention, given_position
from .attention_standard import standardise_attention
from .int8_caches import quantise_caches
from .pass_tensors import PassStage
from .precision import Precision

__all__ = ["DecoderRequest", "contrib", "contrib_alone", "fused", "keep", "plain"]


@dataclass(frozen=True)
class DecoderRequest:
    """What the lowering needs to know.

    Attributes:
        windows: of each layer, tokens that a position attends to, or None for all before it.
        max_seq_len: positions of the cache.
        row_elements: of a row of the cache, in the layout `prefix`.
        kv_scales: of a cache in int8.
    """

    windows: tuple[int | None, ...]
    max_seq_len: int
    precision: Precision
    row_elements: int | None = None
    kv_scales: KvScales | None = None


def keep(model: ir.Model, request: DecoderRequest) -> PassStage | None:
    """Nothing: a source that is ONNX for its target already."""
    del model, request
    return None


def contrib(model: ir.Model, request: DecoderRequest) -> PassStage | None:
    """com.microsoft.GroupQueryAttention: layers share two lengths, which the host knows."""
    fuse_attention(model, windows=request.windows)
    if request.kv_scales is not None:
        quantise_caches(model.graph, request.kv_scales)
    return None


def contrib_alone(model: ir.Model, request: DecoderRequest) -> PassStage | None:
    """`contrib` of one sequence at a time: no position is computed from shapes."""
    fuse_attention(model, windows=request.windows, positions=given_position)
    return None


def fused(model: ir.Model, request: DecoderRequest) -> PassStage | None:
    """TensorScatter and a 4-D Attention."""
    return standardise_attention(
        model,
        windows=request.windows,
        max_seq_len=request.max_seq_len,
        precision=request.precision,
        form="fused",
    )


def plain(model: ir.Model, request: DecoderRequest) -> PassStage | None:
    """MatMul and Softmax over a contiguous prefix."""
    return standardise_attention(
        model,
        windows=request.windows,
        max_seq_len=request.max_seq_len,
        precision=request.precision,
        form="plain",
        row_elements=request.row_elements,
    )
