"""Which back end serves a target on a device. Adding one is one entry here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import DeviceError
from ..manifest import Manifest
from .base import Backend

__all__ = ["load_backend"]


@dataclass(frozen=True)
class _Entry:
    target: str
    device: str
    module: str


_ORT_CPU = "adainfer_runtime.backends.ort_cpu"

# Every dialect's graphs run on ONNX Runtime's CPU provider as well: a reference without the device.
_ENTRIES = (
    _Entry("ort-cpu", "cpu", _ORT_CPU),
    _Entry("onnx-std", "cpu", _ORT_CPU),
    _Entry("tensorrt", "cpu", _ORT_CPU),
    _Entry("tensorrt-basic", "cpu", _ORT_CPU),
    _Entry("ort-cuda", "cpu", _ORT_CPU),
    _Entry("ort-cuda", "cuda", "adainfer_runtime.backends.ort_cuda"),
    _Entry("tensorrt", "cuda", "adainfer_runtime.backends.tensorrt"),
    _Entry("tensorrt-basic", "cuda", "adainfer_runtime.backends.tensorrt"),
)


def load_backend(
    folder: Path,
    manifest: Manifest,
    *,
    device: str,
    threads: int | None,
    low_memory: bool | None = None,
) -> Backend:
    """Loads the stages of a checked manifest.

    Raises:
        DeviceError: no back end runs this target on this device.
        StageError: a stage cannot be loaded.
    """
    for entry in _ENTRIES:
        if entry.target == manifest.target and entry.device == device:
            module = importlib.import_module(entry.module)
            backend: Backend = module.load(folder, manifest, threads=threads, low_memory=low_memory)
            return backend
    runs_on = [entry.device for entry in _ENTRIES if entry.target == manifest.target]
    known = ", ".join(runs_on) if runs_on else "no device of this version"
    raise DeviceError(
        f"engines for target {manifest.target!r} run on {known}, not on {device!r}; "
        "export for another target, or choose another device"
    )
