"""What this machine can run: the GPU, through the driver's own library, and installed packages."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RTX_SM", "GpuInfo", "find_gpu", "jetson_model", "least_sm"]

_NAME_BYTES = 128
_MULTIPROCESSORS, _SM_MAJOR, _SM_MINOR = 16, 75, 76  # CUdevice_attribute
# NVIDIA's support matrices: bfloat16 and int4 weights from Ampere on, 8-bit floats from Ada on.
_LEAST_SM = {"bf16": 80, "int4": 80, "fp8": 89}
# Compute capabilities that TensorRT-RTX 1.7 builds for and runs on: its setter refuses all others.
RTX_SM = (75, 80, 86, 89, 120, 121)
_DEVICE_TREE = Path("/proc/device-tree/model")


@dataclass(frozen=True)
class GpuInfo:
    """An NVIDIA GPU. `sm` is its compute capability, such as 87; `driver` the CUDA version that
    its driver offers, such as `12.6`; `multiprocessors` 0 where they are not known.
    """

    name: str
    sm: int
    memory_bytes: int
    driver: str
    multiprocessors: int = 0

    @property
    def model(self) -> str:
        """What plans of TensorRT are for. The name alone does not tell an AGX Orin from an Orin
        Nano: both are called Orin, with the same SM.
        """
        count = f", {self.multiprocessors} multiprocessors" if self.multiprocessors else ""
        return self.name + count


def find_gpu() -> GpuInfo | None:
    """The first GPU; None where there is no driver or no device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(number), 0):
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    memory = ctypes.c_size_t()
    values = {kind: ctypes.c_int() for kind in (_MULTIPROCESSORS, _SM_MAJOR, _SM_MINOR)}
    failed = cuda.cuDeviceGetName(name, _NAME_BYTES, number)
    failed = failed or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), number)
    failed = failed or cuda.cuDriverGetVersion(ctypes.byref(version))
    for kind, value in values.items():
        failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(value), kind, number)
    if failed:
        return None
    return GpuInfo(
        name.value.decode(errors="replace"),
        10 * values[_SM_MAJOR].value + values[_SM_MINOR].value,
        memory.value,
        f"{version.value // 1000}.{version.value % 1000 // 10}",
        values[_MULTIPROCESSORS].value,
    )


def least_sm(precision: str) -> int:
    """Compute capability from which on TensorRT has a precision; 0 where it has it everywhere."""
    return _LEAST_SM.get(precision, 0)


def jetson_model() -> str | None:
    """The board's name on a Jetson; None elsewhere."""
    try:
        text = _DEVICE_TREE.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return None
    return text if "Jetson" in text else None
