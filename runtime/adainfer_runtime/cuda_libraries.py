"""Whether onnxruntime-gpu finds the CUDA and cuDNN libraries that it needs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
from pathlib import Path
from typing import Any

__all__ = ["installed_provider_problem", "provider_problem"]


def installed_provider_problem() -> str | None:
    """`provider_problem` of the installed package; None without one."""
    try:
        return provider_problem(importlib.import_module("onnxruntime"))
    except ImportError:
        return None


def provider_problem(onnxruntime: Any) -> str | None:
    """The first library without which the CUDA provider cannot be loaded; None where it can.

    ONNX Runtime itself only logs it, and goes on with the CPU.
    """
    if hasattr(onnxruntime, "preload_dlls"):
        # Libraries that pip installed lie where the loader does not look. It prints what it
        # does not find, which need not be an error.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for name in ("shared", "cuda"):
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"))
    except OSError as error:
        return str(error).partition(":")[0]
    return None
