"""Device presets: what to export for a board. A board is one entry here.

Memory is shared by CPU and GPU on these boards. `memory_bytes` is what an engine may take of it,
with the system, CUDA and a desktop left their share. It bounds the cache's length, and how many
layers are joined into one engine.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from adainfer_runtime.devices import least_sm

from .errors import UnsupportedError
from .footprint import Footprint, build_bytes, footprint

__all__ = [
    "PRESETS",
    "DevicePreset",
    "find_preset",
    "fitting_length",
    "most_layers_per_engine",
    "require_precision",
]

_GIB = 1 << 30


@dataclass(frozen=True)
class DevicePreset:
    """A board.

    Attributes:
        sm: compute capability.
        tensorrt: least version of its JetPack that the preset is for; decides the target's form.
        precision: default; weights in int4 are what 8 GB hold of a 7B model.
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


PRESETS: tuple[DevicePreset, ...] = (
    DevicePreset(
        "jetson-orin",
        "Jetson AGX Orin, Orin NX 16 GB; JetPack 6.2",
        87,
        "tensorrt-basic",
        "10.3",
        "int4",
        12 * _GIB,
        4096,
    ),
    DevicePreset(
        "jetson-orin-nano",
        "Jetson Orin Nano 8 GB, Orin NX 8 GB; JetPack 6.2",
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
    """Raises `UnsupportedError` where the board's GPU does not have it, or where more would be
    written than is counted for a board: weights and caches of 32 bits.
    """
    if precision == "fp32":
        raise UnsupportedError(
            f"preset {preset.name}: precision fp32 takes twice the memory of the 16 bits that are "
            f"counted for this board; export with --precision {preset.precision} or fp16"
        )
    if preset.sm < least_sm(precision):
        raise UnsupportedError(
            f"preset {preset.name}: precision {precision} needs a GPU of SM {least_sm(precision)} "
            f"or later, and this board has SM {preset.sm}; export with --precision "
            f"{preset.precision} or fp16"
        )


def fitting_length(
    preset: DevicePreset, config: Any, precision: str, target: str, *, context_exit: bool = False
) -> int:
    """Positions of a cache in 16 bits that fits beside all else that an engine takes there.

    Args:
        config: a `transformers.PretrainedConfig`.

    Raises:
        UnsupportedError: not even the weights fit.
    """
    need = footprint(config, precision, target, context_exit=context_exit)
    rest = preset.memory_bytes - need.fixed
    length = min(preset.max_seq_len, rest // need.per_position) if rest > 0 else 0
    if length < 1:
        raise UnsupportedError(
            f"preset {preset.name}: {need.fixed / _GIB:.1f} GiB ({_parts(need)}) do not fit the "
            f"{preset.memory_bytes / _GIB:.0f} GiB that an engine may take there; choose another "
            "precision or a smaller model"
        )
    return length


def most_layers_per_engine(preset: DevicePreset, config: Any, precision: str) -> int:
    """Layers that calibration may join into one engine.

    Fewer engines are fewer calls per token, which cost the host some time each, most where the
    target has no CUDA graphs; so as many as the board can build. Half of the memory is left to the
    plan as it is written, and to the system's caches.
    """
    fitting = (
        count
        for count in range(config.num_hidden_layers, 1, -1)
        if build_bytes(config, precision, count) <= preset.memory_bytes // 2
    )
    return next(fitting, 1)


def _parts(need: Footprint) -> str:
    parts = {
        "layers": need.layers,
        "embedding and head": need.tables,
        "exit graphs": need.exits,
        "scratch": need.scratch,
    }
    return ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())
