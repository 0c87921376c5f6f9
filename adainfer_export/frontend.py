"""The decoder as a graph without weights, in standard ONNX operators.

Model definitions come from mobius (`mobius-onnx`, the ONNX Runtime organisation's declarative
builder on onnx_ir). This is the only module that imports it, and the only place that knows its
conventions: module paths in `pkg.onnxscript.name_scopes`, initialisers under their Hugging Face
names without a value, rotary tables as initialisers with one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from .architectures import Architecture
from .errors import UnsupportedError

__all__ = ["build_decoder", "layer_of"]

# mobius counts as "default" an execution provider that fuses skip-norms across layer boundaries,
# which the split would have to undo. This one keeps residual additions and norms apart.
_PROVIDER = "adainfer-decoder"
_SCOPE = re.compile(r"^(?:layers|h|blocks)\.(\d+)$")
_SCOPES_KEY = "pkg.onnxscript.name_scopes"


def build_decoder(config: Any, architecture: Architecture) -> ir.Model:
    """Builds the weightless decoder of a transformers configuration.

    Args:
        config: a `transformers.PretrainedConfig` of a decoder-only model.
        architecture: the entry of the architecture table.

    Returns:
        Opset 24 graph with inputs `input_ids`, `attention_mask`, `position_ids`,
        `past_key_values.{i}.{key,value}` and outputs `logits`, `present.{i}.{key,value}`.

    Raises:
        UnsupportedError: the configuration asks for something the frontend cannot express.
    """
    with _quiet():
        import mobius
        from mobius._config_resolver import _config_from_hf
        from mobius._execution_providers import ep_registry

        if _PROVIDER not in ep_registry:
            mobius.register_ep(mobius.EpCapabilities(_PROVIDER, supports_skip_layer_norm=False))
        module_class = mobius.registry.get(architecture.frontend_name)
        try:
            resolved = _config_from_hf(config, module_class=module_class)
            # Weights are read as float32 whatever the checkpoint holds; targets lower the types.
            resolved = dataclasses.replace(resolved, dtype=ir.DataType.FLOAT)
            if getattr(config, "mlp_bias", False):  # Llama's key, which mobius 0.1.0 overlooks
                resolved = dataclasses.replace(resolved, mlp_bias=True)
            package = mobius.build_from_module(
                module_class(resolved), resolved, "text-generation", execution_provider=_PROVIDER
            )
        except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
            raise UnsupportedError(
                f"architecture {architecture.model_type}: the frontend cannot build this "
                f"configuration: {error}"
            ) from error
    model: ir.Model = package["model"]
    return model


def layer_of(node: ir.Node) -> int | None:
    """0-based decoder layer that a node belongs to, by its module path; None outside layers."""
    for scope in _scopes(node):
        if match := _SCOPE.match(scope):
            return int(match.group(1))
    return None


def _scopes(node: ir.Node) -> Iterator[str]:
    raw = node.metadata_props.get(_SCOPES_KEY, "")
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
