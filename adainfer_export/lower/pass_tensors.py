"""What all layers of a pass share, in standard operators: the stage `positions`.

The mask (bool, or to be added) and the rows of the rotary tables depend on the positions of a pass
alone: computed once, read by every layer, and the tables stand in one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from adainfer_runtime.manifest import TensorSpec

from .precision import Precision

__all__ = ["LOWEST", "Form", "PassStage", "PassTensors"]

Form = Literal["fused", "plain"]
LOWEST = -30000.0  # stays finite in float16, and its exponential is 0


@dataclass(frozen=True)
class PassStage:
    """The stage `positions`, and what it computes for all layers."""

    model: ir.Model
    tensors: tuple[TensorSpec, ...]


class PassTensors:
    """Values of a pass, as layers see them, and the graph that computes them."""

    def __init__(self, precision: Precision, max_seq_len: int, form: Form) -> None:
        self.precision = precision
        self.form = form
        self.max_seq_len = max_seq_len
        self.dtype = precision.activation_type
        self._tape = Tape()
        self._position_ids = _value("position_ids", ir.DataType.INT64, [1, "rows"])
        self._key_positions = _value("key_positions", ir.DataType.INT64, [1, "keys"])
        self._outputs: list[ir.Value] = []
        self._constants: dict[str, ir.Value] = {}
        self._seen: dict[ir.Value, ir.Value] = {}
        self.write_indices = _value("write_indices", ir.DataType.INT64, [1])
        self._masks: dict[int | None, ir.Value] = {}

    def inputs(self) -> list[ir.Value]:
        """Inputs of layer stages."""
        return [self.write_indices, *self._masks.values(), *self._seen.values()]

    def mask(self, window: int | None) -> ir.Value:
        """Of layers that see so many positions, or all (None)."""
        if window not in self._masks:
            name = f"mask.{len(self._masks)}" if self._masks else "mask"
            self._masks[window] = self._compute_mask(window, name)
        return self._masks[window]

    def rotary_rows(self, table: ir.Value) -> ir.Value:
        """The table's rows `[1, rows, rotary_dim / 2]` at the positions of the pass."""
        if table in self._seen:
            return self._seen[table]
        kind = "cos" if "cos" in str(table.name) else "sin"
        number = sum(
            value.name.split(".")[0] == kind for value in self._seen.values() if value.name
        )
        name = f"{kind}.{number}" if number else kind
        assert table.const_value is not None and table.shape is not None  # checked by the caller
        rows = table.const_value.numpy()[: self.max_seq_len]
        stored = self._tape.initializer(
            ir.tensor(np.ascontiguousarray(rows), name=str(table.name)), name=str(table.name)
        )
        gathered = self._tape.op("Gather", [stored, self._position_ids], {"axis": 0})
        if self.dtype != ir.DataType.FLOAT:
            gathered = self._tape.op("Cast", [gathered], {"to": self.dtype.value})
        self._give(gathered, name, self.dtype, [1, "rows", int(rows.shape[1])])
        self._seen[table] = _value(name, self.dtype, [1, "rows", int(rows.shape[1])])
        return self._seen[table]

    def stage(self) -> PassStage:
        """The finished stage."""
        inputs = [self._position_ids]
        if self.form == "plain":
            inputs.append(self._key_positions)
        graph = ir.Graph(
            inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": 24},
            name="positions",
        )
        tensors = tuple(_tensor_spec(value) for value in self._outputs)
        return PassStage(ir.Model(graph, ir_version=11, producer_name="adainfer-export"), tensors)

    def _compute_mask(self, window: int | None, name: str) -> ir.Value:
        """Key k is seen from position q where 0 ≤ k ≤ q, and within the window."""
        op = self._tape.op
        query = op("Unsqueeze", [self._position_ids, self._ints("last", [-1])])
        if self.form == "fused":
            keys = self._ints("all_positions", list(range(self.max_seq_len)))
        else:
            keys = op("Unsqueeze", [self._key_positions, self._ints("middle", [1])])
        seen = op("LessOrEqual", [keys, query])
        if self.form == "plain":  # the sink lies at −1
            seen = op("And", [seen, op("GreaterOrEqual", [keys, self._ints("zero", [0])])])
        if window is not None:
            oldest = op("Sub", [query, self._ints(f"window.{window}", [window - 1])])
            seen = op("And", [seen, op("GreaterOrEqual", [keys, oldest])])
        mask = op("Unsqueeze", [seen, self._ints("heads", [1])])
        dtype = ir.DataType.BOOL
        shape: list[int | str] = [1, 1, "rows", self.max_seq_len]
        if self.form == "plain":
            dtype, shape[-1] = self.dtype, "keys"
            zero, lowest = (
                self._constant(key, np.array([value], np.float32))
                for key, value in (("seen", 0.0), ("hidden_key", LOWEST))
            )
            mask = op("Where", [mask, zero, lowest])
            if dtype != ir.DataType.FLOAT:
                mask = op("Cast", [mask], {"to": dtype.value})
        self._give(mask, name, dtype, shape)
        return _value(name, dtype, shape)

    def _ints(self, name: str, values: list[int]) -> ir.Value:
        return self._constant(name, np.array(values, np.int64))

    def _constant(self, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
        """An initialiser; equal names are the same."""
        if name not in self._constants:
            tensor = ir.tensor(values, name=name)
            self._constants[name] = self._tape.initializer(tensor, name=name)
        return self._constants[name]

    def _give(self, value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)


def _value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _tensor_spec(value: ir.Value) -> TensorSpec:
    names = {
        ir.DataType.FLOAT: "float32",
        ir.DataType.FLOAT16: "float16",
        ir.DataType.BFLOAT16: "bfloat16",
        ir.DataType.BOOL: "bool",
    }
    assert value.shape is not None and value.dtype is not None
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return TensorSpec.model_validate(
        {"name": value.name, "dtype": names[value.dtype], "shape": shape}
    )
