"""Device presets: what to export for a board. A board is one entry here.

Memory is shared by CPU and GPU on these boards. `memory_bytes` is what an engine may take of it,
with the system, CUDA and a desktop left their share; it bounds the cache's length.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from adainfer_runtime.devices import least_sm

from .errors import UnsupportedError
from .lower.precision import PRECISIONS

__all__ = ["PRESETS", "DevicePreset", "find_preset", "fitting_length", "require_precision"]

_GIB = 1 << 30
_INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True)
class DevicePreset:
    """A board.

    Attributes:
        sm: compute capability.
        tensorrt: least version of its JetPack that the preset is for; decides the target's form.
        precision: default; weights in int4 are what 8 GB hold of a 7B model.
        layers_per_engine: without exits in between; None joins what the calibration allows.
        max_seq_len: positions at most, before memory bounds them further.
    """

    name: str
    summary: str
    sm: int
    target: str
    tensorrt: str
    precision: str
    memory_bytes: int
    max_seq_len: int
    layers_per_engine: int | None = None


PRESETS: tuple[DevicePreset, ...] = (
    DevicePreset(
        "jetson-orin",
        "Jetson AGX Orin, Orin NX; JetPack 6.2",
        87,
        "tensorrt-basic",
        "10.3",
        "int4",
        12 * _GIB,
        4096,
    ),
    DevicePreset(
        "jetson-orin-nano",
        "Jetson Orin Nano 8 GB; JetPack 6.2",
        87,
        "tensorrt-basic",
        "10.3",
        "int4",
        5 * _GIB,
        2048,
    ),
    DevicePreset(
        "jetson-thor",
        "Jetson Thor; JetPack 7.2.2 and later",
        110,
        "tensorrt",
        "11.4.1",
        "bf16",
        96 * _GIB,
        8192,
    ),
)


def find_preset(name: str) -> DevicePreset:
    """The entry of that name.

    Raises:
        UnsupportedError: there is none; the message names those that there are.
    """
    for preset in PRESETS:
        if preset.name == name:
            return preset
    names = [preset.name for preset in PRESETS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(names)}"
    raise UnsupportedError(f"preset {name!r} is unknown; {hint}")


def require_precision(preset: DevicePreset, precision: str) -> None:
    """Raises `UnsupportedError` where the board's GPU does not have it."""
    if preset.sm < least_sm(precision):
        raise UnsupportedError(
            f"preset {preset.name}: precision {precision} needs a GPU of SM {least_sm(precision)} "
            f"or later, and this board has SM {preset.sm}; export with --precision "
            f"{preset.precision} or fp16"
        )


def fitting_length(preset: DevicePreset, config: Any, precision: str) -> int:
    """Positions of a cache in 16 bits that fits beside the weights.

    Args:
        config: a `transformers.PretrainedConfig`; MLPs count as gated ones.

    Raises:
        UnsupportedError: not even the weights fit.
    """
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_width = (getattr(config, "num_key_value_heads", None) or heads) * width
    weight_bytes = _weight_bytes(config, heads * width, kv_width, precision)
    per_position = config.num_hidden_layers * 2 * kv_width * 2
    rest = preset.memory_bytes - weight_bytes
    length = min(preset.max_seq_len, rest // per_position) if rest > 0 else 0
    if length < 1:
        raise UnsupportedError(
            f"preset {preset.name}: weights of {weight_bytes / _GIB:.1f} GiB do not fit the "
            f"{preset.memory_bytes / _GIB:.0f} GiB that an engine may take there; choose another "
            "precision or a smaller model"
        )
    return length


def _weight_bytes(config: Any, query_width: int, kv_width: int, precision: str) -> int:
    """Of layers in the precision; embedding and head in 16 bits, three plans with a table each."""
    hidden = config.hidden_size
    inner = next(
        (int(width) for name in _INNER_WIDTHS if (width := getattr(config, name, None))), 4 * hidden
    )
    per_layer = hidden * (2 * query_width + 2 * kv_width + 3 * inner)
    layer_bytes = per_layer * PRECISIONS[precision].layer_bits / 8
    return int(config.num_hidden_layers * layer_bytes + 3 * 2 * config.vocab_size * hidden)
