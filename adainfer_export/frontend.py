"""The decoder as a graph without weights, in standard ONNX operators.

Model definitions come from mobius (`mobius-onnx`, the ONNX Runtime organisation's declarative
builder on onnx_ir), or from `decoders` where that lacks or misbuilds a family. This is the only
module that imports mobius, and the only place that knows its conventions: module paths in
`pkg.onnxscript.name_scopes`, initialisers under their Hugging Face names without a value, rotary
tables as initialisers with one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from .architectures import Architecture
from .decoders.builder import SCOPES_KEY, Decoder
from .decoders.rotary import head_dim_of, rotary_tables
from .errors import UnsupportedError, one_line
from .widths import LayerWidths, Shape, layer_configs, layer_widths

__all__ = ["build_decoder", "layer_of"]

# mobius counts as "default" an execution provider that fuses skip-norms across layer boundaries,
# which the split would have to undo. This one keeps residual additions and norms apart.
_PROVIDER = "adainfer-decoder"
_SCOPE = re.compile(r"^(?:layers|h|blocks)\.(\d+)$")
# Of the library's, those that were compared with transformers.
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# What values that no checkpoint of a family has make of its definition.
_UNBUILT = (
    ArithmeticError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build_decoder(
    config: Any,
    architecture: Architecture,
    max_seq_len: int,
    shape: Shape,
) -> Decoder:
    """Builds the weightless decoder of a transformers configuration.

    Args:
        config: a `transformers.PretrainedConfig` of a decoder-only model.
        architecture: the entry of the architecture table.
        max_seq_len: positions that learned positions and rotary tables must cover.
        shape: of a stored tensor; layers may differ in width.

    Returns:
        Opset 24 graph with inputs `input_ids`, `position_ids`,
        `past_key_values.{i}.{key,value}` and outputs `logits`, `present.{i}.{key,value}`.

    Raises:
        UnsupportedError: the configuration asks for something that cannot be expressed.
    """
    try:
        widths = layer_widths(config, shape) if architecture.prunable else None
        if architecture.build is not None:
            return architecture.build(config, max_seq_len, layer_configs(config, widths))
        return Decoder(_from_library(config, architecture, max_seq_len, widths))
    except UnsupportedError as error:
        raise UnsupportedError(f"architecture {architecture.model_type}: {error}") from error
    except _UNBUILT as error:
        raise UnsupportedError(
            f"architecture {architecture.model_type}: the frontend cannot build this "
            f"configuration: {one_line(error)}"
        ) from error


def _from_library(
    config: Any,
    architecture: Architecture,
    max_seq_len: int,
    widths: Sequence[LayerWidths] | None,
) -> ir.Model:
    if config.hidden_act not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {config.hidden_act!r} is not supported "
            f"(supported: {', '.join(_ACTIVATIONS)})"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("partial_rotary_factor, which transformers ignores in this family")
    tables = rotary_tables(config, max_seq_len)
    with _quiet():
        import mobius
        from mobius._config_resolver import _config_from_hf
        from mobius._execution_providers import ep_registry

        if _PROVIDER not in ep_registry:
            mobius.register_ep(mobius.EpCapabilities(_PROVIDER, supports_skip_layer_norm=False))
        module_class = mobius.registry.get(architecture.frontend_name)
        resolved = _config_from_hf(config, module_class=module_class)
        resolved = dataclasses.replace(
            resolved,
            # Weights are read as float32 whatever the checkpoint holds; targets lower the types.
            dtype=ir.DataType.FLOAT,
            # Tables of plain rotary positions, replaced below: for the model's whole context they
            # take gigabytes, and the library's long-rope looks positions up at an offset.
            max_position_embeddings=max_seq_len,
            rope_type="default",
            rope_scaling=None,
        )
        if getattr(config, "mlp_bias", False):  # Llama's key, which mobius 0.1.0 overlooks
            resolved = dataclasses.replace(resolved, mlp_bias=True)
        module = module_class(resolved)
        if widths is not None:
            _resize_layers(module, resolved, widths)
        package = mobius.build_from_module(
            module, resolved, "text-generation", execution_provider=_PROVIDER
        )
    model: ir.Model = package["model"]
    if widths is not None:
        _resize_caches(model.graph, widths, head_dim_of(config))
    for name, table in (("cos", tables.cos), ("sin", tables.sin)):
        stored = model.graph.initializers[f"model.rotary_emb.{name}_cache"]
        stored.const_value = ir.tensor(table, name=stored.name)
        stored.shape = ir.Shape(table.shape)
    return model


def _resize_layers(module: Any, resolved: Any, widths: Sequence[LayerWidths]) -> None:
    """Layers of their own widths in place of the uniform ones."""
    uniform = module.model.layers
    own = [
        dataclasses.replace(
            resolved,
            num_attention_heads=layer.heads,
            num_key_value_heads=layer.kv_heads,
            intermediate_size=layer.intermediate,
        )
        for layer in widths
    ]
    layers = [type(old)(new) for old, new in zip(uniform, own, strict=True)]
    module.model.layers = type(uniform)(layers)


def _resize_caches(graph: ir.Graph, widths: Sequence[LayerWidths], head_dim: int) -> None:
    by_name = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for index, layer in enumerate(widths):
        for part in ("key", "value"):
            for name, length in (("past_key_values", "past"), ("present", "total")):
                value = by_name[f"{name}.{index}.{part}"]
                value.shape = ir.Shape(["batch", layer.kv_heads, length, head_dim])


def layer_of(node: ir.Node) -> int | None:
    """0-based decoder layer that a node belongs to, by its module path; None outside layers."""
    for scope in _scopes(node):
        if match := _SCOPE.match(scope):
            return int(match.group(1))
    return None


def _scopes(node: ir.Node) -> Iterator[str]:
    raw = node.metadata_props.get(SCOPES_KEY, "")
    yield from (part.strip(" '\"") for part in raw.strip("[]").split(","))


@contextmanager
def _quiet() -> Iterator[None]:
    # The frontend warns about what this project lowers itself (sliding windows, fusions).
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    loggers = [logging.getLogger(name) for name in ("mobius", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
