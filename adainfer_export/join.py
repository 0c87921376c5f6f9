"""Joins neighbouring stages into one graph each: fewer runs, and seams that can be fused.

Works on written stages: graphs are put end to end, weights stay in the files where they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir

from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.manifest import Manifest, StageSpec

from .folder import save_hashed
from .graph_builder import serialise
from .layout import WIDE
from .lower.targets import Dialect
from .split import pass_inputs

__all__ = ["join_engines"]


def join_engines(folder: Path, manifest: Manifest, dialect: Dialect) -> Manifest:
    """The manifest with one graph between two exit points, or several where one would be too large
    for the board that builds it, and those graphs in the folder.
    """
    joined, written = [], {}
    most = manifest.most_layers_per_engine or manifest.model.num_layers
    for group in _groups(manifest.cut, set(manifest.exit_layers), most):
        if len(group) == 1:
            joined.append(group[0])
            continue
        spec = _join(folder, group, dialect)
        joined.append(spec)
        for name in (spec.file, spec.wide_file):
            if name is not None:
                written[name] = record_file(folder / name)
    return manifest.model_copy(
        update={"joined": tuple(joined), "files": dict(manifest.files) | written}
    )


def _groups(
    stages: Sequence[StageSpec], exits: set[int], most: int
) -> Iterator[Sequence[StageSpec]]:
    """Stages between exits, in parts of nearly one size: equal engines share their build times."""
    group: list[StageSpec] = []
    for stage in stages:
        group.append(stage)
        if stage.last_layer in exits or stage is stages[-1]:
            parts = -(-len(group) // most)
            bounds = [len(group) * number // parts for number in range(parts + 1)]
            yield from (group[first:last] for first, last in pairwise(bounds))
            group = []


def _join(folder: Path, group: Sequence[StageSpec], dialect: Dialect) -> StageSpec:
    first, last = group[0].first_layer, group[-1].last_layer
    name = f"layers_{first:03d}_{last:03d}"
    model = _put_together(folder, name, [stage.file for stage in group], dialect)
    file = save_hashed(folder, f"stages/{name}.onnx", serialise(model))
    wide_file = None
    if any(stage.wide_file for stage in group):
        files = [stage.wide_file or stage.file for stage in group]
        wide = _put_together(folder, name, files, dialect)
        wide_file = save_hashed(folder, f"stages/{name}.{WIDE}.onnx", serialise(wide))
    return StageSpec(
        name=name,
        kind="layers",
        file=file,
        wide_file=wide_file,
        first_layer=first,
        last_layer=last,
        inputs=tuple(str(value.name) for value in model.graph.inputs),
        outputs=tuple(str(value.name) for value in model.graph.outputs),
        multiply_adds=sum(stage.multiply_adds for stage in group),
    )


def _put_together(folder: Path, name: str, files: Sequence[str], dialect: Dialect) -> ir.Model:
    model = _concatenate(name, [ir.load(folder / file) for file in files])
    dialect.fuse_joined(model.graph)
    return model


def _concatenate(name: str, models: Sequence[ir.Model]) -> ir.Model:
    joined = models[0]
    graph = joined.graph
    graph.name = name
    _rename(graph, 0)
    for number, model in enumerate(models[1:], 1):
        _append(graph, model.graph, number)
    return joined


def _append(graph: ir.Graph, stage: ir.Graph, number: int) -> None:
    """Moves a stage behind what is there: its `hidden` is the `next_hidden` so far."""
    _rename(stage, number)
    shared = {value.name: value for value in pass_inputs(graph)}
    for value in list(stage.inputs):
        stage.inputs.remove(value)
        if value.name == "hidden":
            ir.convenience.replace_all_uses_with(value, graph.outputs[0])
        elif value.name in shared:
            ir.convenience.replace_all_uses_with(value, shared[value.name])
        else:
            graph.inputs.append(value)
    for key, value in list(stage.initializers.items()):
        del stage.initializers[key]
        if key in graph.initializers:  # rotary tables and the like: the same place in a file
            ir.convenience.replace_all_uses_with(value, graph.initializers[key])
        else:
            graph.initializers[key] = value
    seam = graph.outputs[0]
    seam.name = f"hidden.{number}"
    outputs = list(stage.outputs)
    stage.outputs.clear()
    graph.outputs[0] = outputs[0]
    graph.outputs.extend(outputs[1:])
    nodes = list(stage)
    stage.remove(nodes)
    graph.extend(nodes)


def _rename(graph: ir.Graph, number: int) -> None:
    """Names of inner values become unique to the stage; constants keep theirs, by content."""
    kept = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in kept and value.name:
                value.name = f"{value.name}.s{number}"
        node.name = f"{node.name}.s{number}" if node.name else None
    for key, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor):
            del graph.initializers[key]
            digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:8]
            value.name = f"{key}.{digest}"
            graph.initializers[value.name] = value
