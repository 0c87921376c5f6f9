"""Feed-forward widths that blocks do not divide, as pruning tools leave them, made wider by zeros.

The rows that a network's first linear layers get more, biases among them, are zeros, and so are the
columns of the last one that read them: the results are the same. Zeros are exact in blocks, and
leave the scale of a block as it is.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from .decoders.builder import Decoder
from .decoders.views import View
from .lower import Precision
from .lower.graph import Linear, find_linears

__all__ = ["pad_inner_widths"]

# Between the linear layers of a feed-forward network. Each is finite for zeros.
_ELEMENTWISE = ("Gelu", "Mul", "Relu", "Sigmoid")


def pad_inner_widths(decoder: Decoder, precision: Precision) -> Decoder:
    """The decoder with feed-forward widths that the precision's blocks divide.

    Other widths (of hidden states, of an attention's heads) stay what they are: lowering refuses
    them. The graph is changed in place.
    """
    views = dict(decoder.views)
    linears = {linear.output: linear for linear in find_linears(decoder.model.graph)}
    for down in linears.values():
        blocks = precision.storage(str(down.weight.name))
        if blocks is None or blocks.kept or down.in_features % blocks.block_size == 0:
            continue
        between = _between(down, linears)
        if between is None:
            continue
        values, firsts = between
        width = down.in_features + -down.in_features % blocks.block_size
        for first in firsts:
            _widen(first.weight, (width, first.in_features), views)
            if first.bias is not None:
                _widen(first.bias, (width,), views)
        _widen(down.weight, (down.out_features, width), views)
        for value in values:
            if value.shape is not None:
                value.shape = ir.Shape([*value.shape[:-1], width])
    return Decoder(decoder.model, views)


def _between(
    down: Linear, linears: dict[ir.Value, Linear]
) -> tuple[list[ir.Value], list[Linear]] | None:
    """The values that a linear layer's input is computed from, back to the linear layers which
    give them; None where something else is in between, or reads them too.
    """
    values: list[ir.Value] = []
    firsts: list[Linear] = []
    waiting = [down.input]
    while waiting:
        value = waiting.pop()
        if value in values:
            continue
        values.append(value)
        if value in linears:
            firsts.append(linears[value])
            values.append(linears[value].matmul.outputs[0])  # before the bias
            continue
        node = value.producer()
        if node is None or node.op_type not in _ELEMENTWISE or node.domain:
            return None
        waiting += [source for source in node.inputs if source is not None]
    readers = {usage.node for value in values for usage in value.uses()}
    known = {value.producer() for value in values} | {down.matmul}
    alone = readers <= known and not any(value.is_graph_output() for value in values)
    return (values, firsts) if alone else None


def _widen(value: ir.Value, shape: tuple[int, ...], views: dict[str, View]) -> None:
    assert value.shape is not None and value.name is not None  # weights have static shapes
    stored = views.get(value.name) or View(value.name, tuple(value.shape.numpy()))
    views[value.name] = replace(stored, padded=shape)
    value.shape = ir.Shape(shape)
