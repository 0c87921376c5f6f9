"""AdaInfer's features of a prediction, as plain ONNX operators behind the logits.

`token` is the most probable token, `top_prob` its softmax probability p(first), `gap`
p(first) − p(second); each `[batch, tokens]`.

A TopK over a whole vocabulary is slow on CPUs. The two largest of all logits lie in the two chunks
with the largest maxima, so the vocabulary is cut into chunks, and two small TopKs find them
(SmolLM2's 49,152 tokens: features cost 0.1 ms instead of 0.4, the LM head itself 1.0).
"""

from __future__ import annotations

import onnx_ir as ir

from .lower.graph import add_initializer

__all__ = ["add_features"]


def add_features(graph: ir.Graph) -> None:
    """Appends the features to a graph whose only output is the logits `[batch, tokens, vocab]`."""
    logits = graph.outputs[0]
    logits.name = "logits"
    builder = _Builder(graph)
    values, tokens = builder.top_two(logits)
    first, second = builder.column(values, 0), builder.column(values, 1)
    token = builder.column(tokens, 0)
    probabilities = builder.op("Softmax", [logits], axis=-1)
    top_prob = builder.op("GatherElements", [probabilities, token], axis=-1)
    # p(second) = p(first) · exp(second − first)
    ratio = builder.op("Exp", [builder.op("Sub", [second, first])])
    gap = builder.op("Sub", [top_prob, builder.op("Mul", [top_prob, ratio])])
    builder.output("token", token, ir.DataType.INT64)
    builder.output("top_prob", top_prob, ir.DataType.FLOAT)
    builder.output("gap", gap, ir.DataType.FLOAT)


class _Builder:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def top_two(self, logits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The two largest logits and their tokens, `[batch, tokens, 2]` each.

        Of equal logits the lowest token wins, as in ArgMax: TopK prefers low indices, among the
        chunks and within them.
        """
        assert logits.shape is not None
        vocabulary = int(logits.shape[-1])  # type: ignore[arg-type]
        chunks, width = _chunks(vocabulary)
        if padding := chunks * width - vocabulary:
            pads = self._ints("pads", [0, 0, 0, 0, 0, padding])
            logits = self.op("Pad", [logits, pads, self._lowest()])
        table = self.op("Reshape", [logits, self._ints("chunked", [0, 0, chunks, width])])
        maxima = self.op("ReduceMax", [table, self._last()], keepdims=0)
        _, best = self._top(maxima)
        columns = self.op("Unsqueeze", [best, self._last()])
        candidates = self.op("GatherND", [table, columns], batch_dims=2)
        flat = self.op("Reshape", [candidates, self._ints("candidates", [0, 0, 2 * width])])
        values, places = self._top(flat)
        span = self._ints("width", [width])
        chunk = self.op("GatherElements", [best, self.op("Div", [places, span])], axis=-1)
        start = self.op("Mul", [chunk, span])
        return values, self.op("Add", [start, self.op("Mod", [places, span])])

    def column(self, pair: ir.Value, index: int) -> ir.Value:
        """One of the two, `[batch, tokens, 1]`."""
        return self.op("Gather", [pair, self._ints(f"column_{index}", [index])], axis=-1)

    def op(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        """Appends a node with one output."""
        attrs = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs)
        self._graph.append(node)
        return node.outputs[0]

    def output(self, name: str, source: ir.Value, dtype: ir.DataType) -> None:
        """Drops the last axis of the source and makes it an output."""
        value = self.op("Squeeze", [source, self._last()])
        value.name, value.type = name, ir.TensorType(dtype)
        value.shape = ir.Shape(["batch", "tokens"])
        self._graph.outputs.append(value)

    def _top(self, values: ir.Value) -> tuple[ir.Value, ir.Value]:
        node = ir.Node("", "TopK", [values, self._ints("two", [2])], num_outputs=2)
        self._graph.append(node)
        return node.outputs[0], node.outputs[1]

    def _ints(self, name: str, values: list[int]) -> ir.Value:
        value = add_initializer(self._graph, f"const_{name}", ir.DataType.INT64, [len(values)])
        value.const_value = ir.tensor(values, dtype=ir.DataType.INT64, name=value.name)
        return value

    def _last(self) -> ir.Value:
        return self._ints("last", [-1])

    def _lowest(self) -> ir.Value:
        value = add_initializer(self._graph, "const_lowest", ir.DataType.FLOAT, [])
        value.const_value = ir.tensor(_LOWEST, dtype=ir.DataType.FLOAT, name=value.name)
        return value


_LOWEST = -3.0e38


def _chunks(vocabulary: int) -> tuple[int, int]:
    """(chunks, width): at least two chunks of at least two tokens, without padding if possible.

    The two TopKs look at `chunks + 2 · width` values, least at `chunks = √(2 · vocabulary)`.
    """
    ideal = max(2, round((2 * vocabulary) ** 0.5))
    exact = [n for n in range(2, 4 * ideal) if vocabulary % n == 0 and vocabulary // n >= 2]
    near = [n for n in exact if ideal <= 4 * n]
    chunks = min(near, key=lambda n: n + 2 * vocabulary // n, default=ideal)
    return chunks, max(2, -(-vocabulary // chunks))
