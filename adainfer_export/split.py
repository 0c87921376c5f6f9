"""Cuts the decoder at its residual stream into `embed`, groups of layers, `probe`, `candidates`.

`hidden` `[batch, tokens, hidden_size]` is the only activation that crosses a layer boundary; a
decoder in which more crosses is refused. Layer numbers are 1-based, as in exit layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .errors import UnsupportedError
from .features import add_candidate_features, add_features
from .frontend import layer_of
from .lower.kv_fill import START

__all__ = ["StageGraph", "layer_groups", "pass_inputs", "split_decoder"]

_OPSET = 24
_IR_VERSION = 11
_EMBED_INPUTS = ("input_ids", "position_ids")

# From an attention and the first row's position: its query, key and value, as they are cached.
ProjectKv = Callable[[ir.Node, ir.Value], list[ir.Value]]


@dataclass(frozen=True)
class StageGraph:
    """One stage before lowering: its graph, and the layers (1-based, inclusive) it holds."""

    name: str
    kind: str
    model: ir.Model
    first_layer: int = 0
    last_layer: int = 0


def layer_groups(num_layers: int, per_engine: int) -> list[tuple[int, int]]:
    """Layers of each engine as (first, last); the last engine takes what is left."""
    return [
        (first, min(first + per_engine - 1, num_layers))
        for first in range(1, num_layers + 1, per_engine)
    ]


def split_decoder(
    model: ir.Model, groups: list[tuple[int, int]], project_kv: ProjectKv | None = None
) -> Iterator[StageGraph]:
    """Yields `embed`, one stage per group of layers, `probe` and `candidates`, in that order; with
    `project_kv` also one `kv_fill` per layer, behind the layer's own stage.

    Raises:
        UnsupportedError: another tensor than the residual stream crosses a boundary.
    """
    graph = model.graph
    boundaries = _boundaries(graph, groups[-1][1])
    # Learned positions are added to the embedding; rotary ones are a matter of the attention.
    ids = [value for value in graph.inputs if value.name in _EMBED_INPUTS]
    yield StageGraph("embed", "embed", _extract(graph, "embed", ids, [boundaries[0]]))
    for first, last in groups:
        name = f"layer_{first:03d}" if first == last else f"layers_{first:03d}_{last:03d}"
        yield StageGraph(name, "layers", _layers(graph, name, boundaries, first, last), first, last)
        if project_kv is not None:
            for layer in range(first, last + 1):
                yield _kv_fill(graph, boundaries[layer - 1], layer, project_kv)
    logits = graph.outputs[0]
    few = _extract(graph, "candidates", [boundaries[-1]], [logits])
    add_candidate_features(few.graph)
    probe = _extract(graph, "probe", [boundaries[-1]], [logits])
    add_features(probe.graph)
    yield StageGraph("probe", "probe", probe)
    yield StageGraph("candidates", "candidates", few)


def _boundaries(graph: ir.Graph, num_layers: int) -> list[ir.Value]:
    """Hidden after 0, 1 … L layers: the one value that layer l+1 (or the head) takes from l."""
    crossing: list[set[ir.Value]] = [set() for _ in range(num_layers + 1)]
    for node in graph:
        to_layer = layer_of(node)
        to_layer = _consumer_layer(node, num_layers) if to_layer is None else to_layer
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if value is None or producer is None or to_layer is None:
                continue
            from_layer = layer_of(producer)
            came_from = 0 if from_layer is None else from_layer + 1
            if from_layer is None and to_layer == num_layers:
                continue  # nodes of the head among themselves
            if came_from != to_layer + 1:
                crossing[to_layer].add(value)
    for layer, values in enumerate(crossing):
        if len(values) != 1:
            names = sorted(value.name or "?" for value in values)
            raise UnsupportedError(
                f"{len(values)} tensors cross the boundary after layer {layer}, expected the "
                f"residual stream alone: {', '.join(names)}"
            )
    return [values.pop() for values in crossing]


def _consumer_layer(node: ir.Node, num_layers: int) -> int | None:
    """Nodes outside layers that read a layer's result belong to the head; others to embed."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and layer_of(producer) is not None:
            return num_layers
    return None


def _layers(
    graph: ir.Graph, name: str, boundaries: list[ir.Value], first: int, last: int
) -> ir.Model:
    numbers = range(first, last + 1)
    caches = [
        _graph_input(graph, f"past_key_values.{layer - 1}.{part}")
        for layer in numbers
        for part in ("key", "value")
    ]
    shared = pass_inputs(graph)
    presents = [
        next(out for out in graph.outputs if out.name == f"present.{layer - 1}.{part}")
        for layer in numbers
        for part in ("key", "value")
    ]
    model = _extract(
        graph, name, [boundaries[first - 1], *shared, *caches], [boundaries[last], *presents]
    )
    stage = model.graph
    for value in stage.inputs[1 : 1 + len(shared)]:
        if not value.uses():
            stage.inputs.remove(value)
    stage.outputs[0].name = "next_hidden"
    kinds = [(layer, part) for layer in numbers for part in ("key", "value")]
    for (layer, part), past, present in zip(
        kinds, stage.inputs[-len(kinds) :], stage.outputs[1:], strict=True
    ):
        past.name, present.name = f"past_{part}.{layer}", f"present_{part}.{layer}"
    return model


def _kv_fill(graph: ir.Graph, before: ir.Value, layer: int, project_kv: ProjectKv) -> StageGraph:
    present = next(out for out in graph.outputs if out.name == f"present.{layer - 1}.key")
    attention = present.producer()
    assert attention is not None  # caches are what attention gives
    start = next((value for value in graph.inputs if value.name == START), None)
    if start is None:
        start = ir.Value(name=START, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        graph.inputs.append(start)
    name = f"kv_fill_{layer:03d}"
    outputs = project_kv(attention, start)
    return StageGraph(
        name, "kv_fill", _extract(graph, name, [before, start], outputs), layer, layer
    )


def _extract(
    graph: ir.Graph, name: str, inputs: list[ir.Value], outputs: list[ir.Value]
) -> ir.Model:
    stage = ir.convenience.extract(graph, inputs, outputs)
    stage.name = name
    stage.opset_imports[""] = _OPSET
    (stage.outputs if name == "embed" else stage.inputs)[0].name = "hidden"
    for node in stage:
        node.metadata_props.clear()
    return ir.Model(stage, ir_version=_IR_VERSION, producer_name="adainfer-export")


def pass_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Inputs that all layers share: what depends on the positions of a pass alone."""
    return [
        value
        for value in graph.inputs
        if value.name not in ("hidden", START, *_EMBED_INPUTS)
        and not str(value.name).startswith(("past_key", "past_value"))
    ]


def _graph_input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)
