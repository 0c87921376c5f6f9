"""One capability record per target. A target is added here and nowhere else."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ..errors import UnsupportedError
from ..weights import WeightExpr
from . import as_is, attention, kv_fill, ort
from .precision import PRECISIONS, Precision

__all__ = ["AS_IS", "TARGETS", "Dialect", "Target", "find_target"]

Weights = dict[str, WeightExpr]


@dataclass(frozen=True)
class KvFill:
    """How a layer's K and V are computed from another hidden state (see `kv_fill`)."""

    project: Callable[[ir.Node, ir.Value], list[ir.Value]]
    lower: Callable[[ir.Graph, Precision], Weights]


@dataclass(frozen=True)
class Dialect:
    """The passes of a target, in the order they are applied.

    `widen` turns a lowered stage into its form for many positions and says whether there is one;
    `fuse_joined` mends the seams of lowered stages that were put into one graph; `kv_fill` is None
    where a target has no such stages.
    """

    lower_decoder: Callable[..., None]
    lower_embedding: Callable[..., Weights]
    lower_layers: Callable[[ir.Graph, Precision], Weights]
    lower_probe: Callable[[ir.Graph, Precision], Weights]
    lower_candidates: Callable[[ir.Graph, Precision], Weights]
    check_layers: Callable[[ir.Graph, int, Precision], None]
    widen: Callable[[ir.Graph, Precision], bool]
    fuse_joined: Callable[[ir.Graph], None]
    kv_fill: KvFill | None = None


@dataclass(frozen=True)
class Target:
    """What a target runs.

    Attributes:
        precisions: names of the precisions that it takes.
        dialect: None where the target is planned but not built.
    """

    name: str
    summary: str
    precisions: tuple[str, ...]
    dialect: Dialect | None = None


_ORT_CPU = Dialect(
    lower_decoder=attention.fuse_attention,
    lower_embedding=ort.lower_embedding,
    lower_layers=ort.lower_layers,
    lower_probe=ort.lower_probe,
    lower_candidates=ort.lower_candidates,
    check_layers=ort.check_layers,
    widen=ort.widen,
    fuse_joined=ort.fuse_skip_norms,
    kv_fill=KvFill(kv_fill.project_kv, kv_fill.lower_kv_fill),
)

# Of sources that are ONNX for this target already.
AS_IS = Dialect(
    lower_decoder=lambda decoder, *, windows: None,
    lower_embedding=as_is.keep_embedding,
    lower_layers=as_is.keep_layers,
    lower_probe=as_is.keep_stage,
    lower_candidates=as_is.keep_candidates,
    check_layers=as_is.check_layers,
    widen=ort.widen,
    fuse_joined=ort.fuse_skip_norms,
)

TARGETS: tuple[Target, ...] = (
    Target("ort-cpu", "ONNX Runtime on CPUs", ("fp32", "int8", "int4", "keep"), _ORT_CPU),
    Target("ort-cuda", "ONNX Runtime on NVIDIA GPUs", ("fp16", "bf16", "int4")),
    Target("tensorrt", "TensorRT on NVIDIA GPUs and Jetson", ("fp16", "bf16", "int4")),
    Target("onnx-std", "standard ONNX operators only", ("fp32",)),
)


def find_target(name: str, precision: str) -> tuple[Target, Dialect, Precision]:
    """The record of a target that is built and takes the precision.

    Raises:
        UnsupportedError: unknown, not built yet, or not with this precision.
    """
    target = next((entry for entry in TARGETS if entry.name == name), None)
    if target is None:
        names = [entry.name for entry in TARGETS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"targets: {', '.join(names)}"
        raise UnsupportedError(f"target {name!r} is unknown; {hint}")
    if target.dialect is None:
        built = ", ".join(entry.name for entry in TARGETS if entry.dialect)
        raise UnsupportedError(f"target {name} is not built yet; built: {built}")
    if precision not in target.precisions:
        raise UnsupportedError(
            f"target {name} does not take precision {precision!r}; it takes: "
            f"{', '.join(target.precisions)}"
        )
    return target, target.dialect, PRECISIONS[precision]
