"""One capability record per target. A target is added here and nowhere else."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from ..errors import UnsupportedError
from ..weights import WeightExpr
from . import as_is, cuda, decoder, kv_fill, ort, standard
from .decoder import DecoderRequest
from .pass_tensors import PassStage
from .precision import PRECISIONS, Precision, with_half_activations

__all__ = ["AS_IS", "TARGETS", "Dialect", "Target", "find_target", "require_shortlist"]

Weights = dict[str, WeightExpr]


@dataclass(frozen=True)
class KvFill:
    """How a layer's K and V are computed from another hidden state (see `kv_fill`)."""

    project: Callable[[ir.Node, ir.Value], list[ir.Value]]
    lower: Callable[[ir.Graph, Precision], Weights]


@dataclass(frozen=True)
class Dialect:
    """The passes of a target, in the order they are applied.

    `lower_decoder` rewrites every attention and returns the stage `positions`, where layers share
    more than lengths; `kv_layout` is the cache's geometry; `precision` says what the target makes
    of a precision; `opset` and `ir_version` are what stages are stamped with.
    `widen` turns a lowered stage into its form for many positions and says what its new
    initialisers hold (None: there is no such form);
    `fuse_joined` mends the seams of lowered stages that were put into one graph; `kv_fill` is None
    where a target has no such stages; `batched` layers may be given a position of each of several
    sequences, whose lengths alone tell them apart; `host_features` says that its runtime computes
    features from the logits.
    """

    lower_decoder: Callable[[ir.Model, DecoderRequest], PassStage | None]
    lower_embedding: Callable[..., Weights]
    lower_layers: Callable[[ir.Graph, Precision], Weights]
    lower_probe: Callable[[ir.Graph, Precision], Weights]
    lower_candidates: Callable[[ir.Graph, Precision], Weights]
    check_layers: Callable[[ir.Graph, int, Precision], None]
    widen: Callable[[ir.Graph, Precision, Weights], Weights | None]
    fuse_joined: Callable[[ir.Graph], None]
    kv_fill: KvFill | None = None
    kv_layout: Literal["bnsh", "prefix"] = "bnsh"
    batched: bool = False
    host_features: bool = False
    precision: Callable[[Precision], Precision] = lambda precision: precision
    opset: int = 24
    ir_version: int = 11


@dataclass(frozen=True)
class Target:
    """What a target runs.

    Attributes:
        precisions: names of the precisions that it takes.
        block_sizes: values that may share a scale; the first is the default.
        down_block_sizes: those of the products that end feed-forward networks, where they may be
            others.
        int8_layers: whether sensitive layers may have 8 bits beside int4.
        int8_prefill: whether prompts may be read in 8 bits, weights and activations.
        int8_caches: whether K and V may be kept in 8 bits.
        shortlist: whether a low-rank head in its operators can be fitted.
        classifier_domains: domains beside the standard one that a user's own classifier may take
            operators from.
    """

    name: str
    summary: str
    precisions: tuple[str, ...]
    dialect: Dialect
    block_sizes: tuple[int, ...] = (32,)
    down_block_sizes: tuple[int, ...] = ()
    int8_layers: bool = False
    int8_prefill: bool = False
    int8_caches: bool = False
    shortlist: bool = False
    classifier_domains: tuple[str, ...] = ()


_ORT_CPU = Dialect(
    lower_decoder=decoder.contrib,
    lower_embedding=ort.lower_embedding,
    lower_layers=ort.lower_layers,
    lower_probe=ort.lower_probe,
    lower_candidates=ort.lower_candidates,
    check_layers=ort.check_layers,
    widen=ort.widen,
    fuse_joined=ort.fuse_skip_norms,
    kv_fill=KvFill(kv_fill.project_kv, kv_fill.lower_kv_fill),
    batched=True,
    host_features=True,
)

# Of sources that are ONNX for this target already.
AS_IS = Dialect(
    lower_decoder=decoder.keep,
    lower_embedding=as_is.keep_embedding,
    lower_layers=as_is.keep_layers,
    lower_probe=as_is.keep_stage,
    lower_candidates=as_is.keep_candidates,
    check_layers=as_is.check_layers,
    widen=ort.widen,
    fuse_joined=ort.fuse_skip_norms,
    host_features=True,
)

_ORT_CUDA = replace(
    _ORT_CPU,
    lower_decoder=decoder.contrib_alone,
    lower_embedding=standard.lower_embedding,
    lower_layers=cuda.lower_layers,
    lower_probe=cuda.lower_probe,
    lower_candidates=cuda.lower_candidates,
    widen=standard.no_wide_form,
    fuse_joined=cuda.fuse_joined,
    kv_fill=None,
    batched=False,  # its back end runs every sequence alone
    host_features=False,
    precision=with_half_activations,
    opset=cuda.OPSET,
    ir_version=10,
)

_STANDARD = Dialect(
    lower_decoder=decoder.fused,
    lower_embedding=standard.lower_embedding,
    lower_layers=standard.lower_layers,
    lower_probe=standard.lower_probe,
    lower_candidates=standard.lower_candidates,
    check_layers=standard.check_layers,
    widen=standard.no_wide_form,
    fuse_joined=standard.keep_as_joined,
    precision=with_half_activations,
)

_PLAIN = replace(
    _STANDARD,
    lower_decoder=decoder.plain,
    lower_layers=standard.lower_plain_layers,
    lower_probe=standard.lower_plain_probe,
    lower_candidates=standard.lower_plain_candidates,
    check_layers=standard.check_plain_layers,
    kv_layout="prefix",
    opset=21,
    ir_version=10,
)

TARGETS: tuple[Target, ...] = (
    Target(
        "ort-cpu",
        "ONNX Runtime on CPUs",
        ("fp32", "int8", "int4", "keep"),
        _ORT_CPU,
        (32, 16, 64, 128),
        (16, 32, 64, 128, 256),
        int8_layers=True,
        int8_prefill=True,
        int8_caches=True,
        shortlist=True,
        classifier_domains=("ai.onnx.ml", "com.microsoft"),
    ),
    # Its sessions have no CPU provider, which alone has operators of ai.onnx.ml.
    Target("ort-cuda", "ONNX Runtime on NVIDIA GPUs", ("fp16", "bf16", "int4"), _ORT_CUDA),
    Target(
        "tensorrt",
        "TensorRT 10.15 and later, TensorRT-RTX",
        ("fp16", "bf16", "fp8", "int4"),
        _STANDARD,
        (32, 64, 128),
    ),
    Target(
        "tensorrt-basic",
        "TensorRT 10.3 and later (JetPack 6.2), TensorRT-RTX",
        ("fp32", "fp16", "bf16", "fp8", "int4"),
        _PLAIN,
        (32, 64, 128),
    ),
    # The graphs of target tensorrt in float32, for which TensorRT has no fused attention.
    Target("onnx-std", "standard ONNX operators, opset 24", ("fp32",), _STANDARD),
)


def find_target(name: str, precision: str) -> tuple[Target, Dialect, Precision]:
    """The record of a target that takes the precision.

    Raises:
        UnsupportedError: unknown, or not with this precision.
    """
    target = next((entry for entry in TARGETS if entry.name == name), None)
    if target is None:
        names = [entry.name for entry in TARGETS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"targets: {', '.join(names)}"
        raise UnsupportedError(f"target {name!r} is unknown; {hint}")
    if precision not in target.precisions:
        raise UnsupportedError(
            f"target {name} does not take precision {precision!r}; it takes: "
            f"{', '.join(target.precisions)}"
        )
    return target, target.dialect, target.dialect.precision(PRECISIONS[precision])


def require_shortlist(target: Target) -> None:
    """Raises `UnsupportedError` where a target has no shortlist."""
    if not target.shortlist:
        able = ", ".join(entry.name for entry in TARGETS if entry.shortlist)
        raise UnsupportedError(f"target {target.name} has no shortlist; targets that do: {able}")
