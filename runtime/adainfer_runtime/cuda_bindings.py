"""cuda-python against the GPU's driver: a newer major version of CUDA than the driver's is refused.

A driver takes every earlier CUDA, and later minor versions of its own major one.
"""

from __future__ import annotations

__all__ = ["MODULE", "fitting_bindings", "is_too_new", "too_new"]

MODULE = "cuda.bindings"


def is_too_new(version: str, driver: str) -> bool:
    """Whether cuda-python of a version is of a later CUDA than a driver for CUDA `driver`."""
    return _major(version) > _major(driver)


def too_new(version: str, driver: str) -> str:
    """The sentence that says so."""
    return (
        f"cuda-python {version} needs a later driver than this one for CUDA {driver} "
        "(cudaErrorInsufficientDriver, error 35): pip install "
        f"{fitting_bindings(driver)}, or update the driver"
    )


def fitting_bindings(driver: str) -> str:
    """What to ask pip for."""
    return f"'cuda-python<{_major(driver) + 1}'"


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdigit() else 0
