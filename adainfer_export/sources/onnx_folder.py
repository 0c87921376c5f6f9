"""A folder for onnxruntime-genai, by its builder or by mobius: the decoder is one ONNX graph.

Its graph is close to what the `ort-cpu` dialect makes: GroupQueryAttention with the cache in place,
skip-norms, products in blocks. It is prepared for the split here, and nothing in it is computed
differently: layer numbers are read off node names, lengths become inputs, and a skip-norm that
lies across a layer boundary is taken apart into the addition and the norm.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.engine_folder import file_sha256
from adainfer_runtime.manifest import SourceFile, SourceSpec

from ..errors import CheckpointError, UnsupportedError
from ..lower.attention import SEQLENS_K, TOTAL_LENGTH
from ..lower.graph import insert_before, remove_dead_nodes
from ..quantise import BlockRows, Blocks
from .checkpoint import end_tokens
from .onnx_files import load_graph, read_rows, require_inside

__all__ = ["GENAI_CONFIG", "OnnxFolder"]

GENAI_CONFIG = "genai_config.json"
_LAYER = re.compile(r"/layers\.(\d+)/")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_INLINE_BYTES = 1024
_SCOPES_KEY = "pkg.onnxscript.name_scopes"  # where the split looks for layer numbers
_SKIP_NORM = "SkipSimplifiedLayerNormalization"


class OnnxFolder:
    """See `Checkpoint`. Tensors have the graph's own names and are stored as they are."""

    tied_head = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def config(self) -> Any:
        """The keys of genai_config.json under the names of a transformers configuration."""
        path = self._folder / GENAI_CONFIG
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            decoder = model["decoder"]
            return SimpleNamespace(
                model_type=str(model["type"]),
                vocab_size=int(model["vocab_size"]),
                max_position_embeddings=int(model["context_length"]),
                eos_token_id=model.get("eos_token_id"),
                hidden_size=int(decoder["hidden_size"]),
                num_hidden_layers=int(decoder["num_hidden_layers"]),
                num_attention_heads=int(decoder["num_attention_heads"]),
                num_key_value_heads=int(decoder["num_key_value_heads"]),
                head_dim=int(decoder["head_size"]),
                filename=str(decoder["filename"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} describes no decoder: {error!r}") from error

    @cached_property
    def source(self) -> SourceSpec:
        """Identity with the sha256 of the graph, its data and its configuration."""
        names = sorted({GENAI_CONFIG, self.config.filename, *self._data_files})
        files = tuple(
            SourceFile(
                name=name,
                bytes=(self._folder / name).stat().st_size,
                sha256=file_sha256(self._folder / name),
            )
            for name in names
        )
        return SourceSpec(kind="onnx", id=self._folder.resolve().name, files=files)

    @property
    def source_name(self) -> str:
        """The folder."""
        return str(self._folder)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From genai_config.json."""
        return end_tokens(self.config.eos_token_id, self._folder / GENAI_CONFIG)

    def decoder(self) -> ir.Model:
        """The graph, ready to be split; weights have no value in it.

        Raises:
            UnsupportedError: it is not of the form described above.
        """
        model = self._load()
        graph = model.graph
        self._require_form(graph)
        _feed_lengths(graph)
        _mark_layers(graph, self.config.num_hidden_layers)
        for node in [node for node in graph if node.op_type == "SimplifiedLayerNormalization"]:
            _replace_norm(node, [node.inputs[0], node.inputs[1]], node.outputs[0])
        remove_dead_nodes(graph)
        _declare_hidden(graph, self.config.hidden_size)
        for name in self._tensors:
            if name in graph.initializers:
                graph.initializers[name].const_value = None
        return model

    def unused(self, read: frozenset[str]) -> tuple[str, ...]:
        """None: a graph holds nothing but what it uses."""
        del read
        return ()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the graph."""
        return tuple(self._tensors[name].shape.numpy())

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """A tensor as it is stored, which need not be float32."""
        rows = rows or slice(None)
        return read_rows(self._folder, name, self._tensors[name], rows)

    def blocks(self, name: str) -> Blocks | None:
        """None: what is in blocks is stored as it is, like everything else."""
        del name
        return None

    def read_blocks(self, name: str, rows: slice) -> BlockRows:
        """Never asked for."""
        raise NotImplementedError(name, rows)

    def write_tokenizer(self, folder: Path) -> bool:
        """Copies the tokenizer."""
        if not (self._folder / "tokenizer.json").is_file():
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for name in _TOKENIZER_FILES:
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)
        return True

    def _load(self) -> ir.Model:
        name = self.config.filename
        path = self._folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{self._folder / GENAI_CONFIG}: {name!r} is no file name")
        return load_graph(path)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        """Weights: initialisers that are more than constants, rotary tables aside."""
        positions = self.config.max_position_embeddings
        found = {}
        for name, value in self._load().graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _INLINE_BYTES or _is_table(tensor, positions):
                continue
            found[str(name)] = tensor
            require_inside(self._folder, tensor)
        return found

    @cached_property
    def _data_files(self) -> frozenset[str]:
        external = (t for t in self._tensors.values() if isinstance(t, ir.ExternalTensor))
        return frozenset(str(tensor.location) for tensor in external)

    def _require_form(self, graph: ir.Graph) -> None:
        layers = self.config.num_hidden_layers
        attention = sum(node.op_type == "GroupQueryAttention" for node in graph)
        if attention != layers:
            raise UnsupportedError(
                f"{self._folder}: found {attention} of operator GroupQueryAttention, expected "
                f"{layers}; split are decoders that onnxruntime-genai's builder, or mobius, wrote "
                "for CPUs: export from the checkpoint instead"
            )
        kinds = {value.dtype for value in graph.inputs if "past_key_values" in str(value.name)}
        if kinds != {ir.DataType.FLOAT}:
            raise UnsupportedError(
                f"{self._folder}: its cache is {', '.join(str(kind) for kind in kinds)}, ort-cpu "
                "takes float32; build it with `-p int4 -e cpu` or `-p fp32 -e cpu`"
            )
        for node in graph:
            if node.op_type == "SkipLayerNormalization":
                raise UnsupportedError(
                    f"{self._folder}: models with LayerNorm are not split as ONNX; export from "
                    "the checkpoint instead"
                )


def _is_table(tensor: Any, positions: int) -> bool:
    return len(tensor.shape) == 2 and tensor.shape[0] == positions


def _feed_lengths(graph: ir.Graph) -> None:
    """Lengths, which the graph computes from its mask, become inputs."""
    lengths = (
        ir.Value(name=SEQLENS_K, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([1])),
        ir.Value(name=TOTAL_LENGTH, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([])),
    )
    graph.inputs.extend(lengths)
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            for index, value in zip((5, 6), lengths, strict=True):
                node.replace_input_with(index, value)


def _mark_layers(graph: ir.Graph, num_layers: int) -> None:
    for node in list(graph):
        layer = _layer(node, num_layers)
        source = (
            node.inputs[1].producer() if node.op_type == _SKIP_NORM and node.inputs[1] else None
        )
        before = _layer(source, num_layers) if source is not None else layer
        if source is not None and before != layer:
            _take_apart(node, before, layer)
        elif layer is not None:
            _mark(node, layer)


def _declare_hidden(graph: ir.Graph, hidden_size: int) -> None:
    """Graphs need not say what lies between nodes; what becomes a stage's input must."""
    for node in graph:
        if node.op_type == "RMSNormalization" and node.inputs[0] is not None:
            node.inputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            node.inputs[0].shape = ir.Shape(["batch", "tokens", hidden_size])


def _mark(node: ir.Node, layer: int) -> None:
    node.metadata_props[_SCOPES_KEY] = f"['layers.{layer}']"


def _layer(node: ir.Node, num_layers: int) -> int | None:
    """0-based; the final norm is counted as one layer more, and belongs to none."""
    found = _LAYER.search(node.name or "")
    return int(found.group(1)) if found and int(found.group(1)) < num_layers else None


def _take_apart(node: ir.Node, before: int | None, layer: int | None) -> None:
    add = ir.Node("", "Add", [node.inputs[0], node.inputs[1]], name=f"{node.name}/Add")
    if before is not None:
        _mark(add, before)
    insert_before(node, [add])
    total = add.outputs[0]
    total.type, total.shape = node.outputs[0].type, node.outputs[0].shape
    if len(node.outputs) > 3:
        total.name = node.outputs[3].name
        ir.convenience.replace_all_uses_with(node.outputs[3], total)
        node.outputs[3].name = f"{total.name}.fused"
    norm = _replace_norm(node, [total, node.inputs[2]], node.outputs[0])
    if layer is not None:
        _mark(norm, layer)


def _replace_norm(node: ir.Node, inputs: list[ir.Value | None], output: ir.Value) -> ir.Node:
    """The standard operator for ONNX Runtime's own."""
    attributes = [
        ir.AttrInt64("axis", -1),
        ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float()),
    ]
    norm = ir.Node("", "RMSNormalization", inputs, attributes, name=node.name)
    norm.metadata_props.update(node.metadata_props)
    insert_before(node, [norm])
    result = norm.outputs[0]
    result.type, result.shape, name = output.type, output.shape, output.name
    ir.convenience.replace_all_uses_with(output, result)
    output.name, result.name = f"{name}.fused", name
    graph = node.graph
    assert graph is not None  # it was found there
    graph.remove(node, safe=False)
    return norm
