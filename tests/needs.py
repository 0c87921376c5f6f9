"""Marks for tests that need what most machines lack; reasons say what would bring it."""

from __future__ import annotations

import functools
import importlib.util

import pytest
from gpu_needs import lacking

from adainfer_runtime.doctor import Diagnosis, diagnose

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(
    not HAS_RTX,
    reason="needs TensorRT-RTX (230 MB, so `make setup` goes without): `make rtx`, or "
    "pip install 'adainfer-export[tensorrt-rtx]'",
)


@functools.cache
def _here() -> Diagnosis:
    return diagnose()


def needs_gpu_for(
    target: str, precision: str = "fp16", backend: str = "tensorrt"
) -> pytest.MarkDecorator:
    """A GPU that has the precision, and all software that the target takes to run there."""
    missing = lacking(_here(), target, precision, backend)
    return pytest.mark.skipif(bool(missing), reason=f"needs {'; '.join(missing)}")
