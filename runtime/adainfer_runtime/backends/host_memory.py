"""The machine's main memory: how much there is, and buffers that take it only as they fill."""

from __future__ import annotations

import mmap
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DeviceMemoryError
from .layout import BufferSpec

__all__ = ["lazy_zeros", "memory_limit"]

_ROOT = Path("/")
_CONTROL_GROUPS = "sys/fs/cgroup"


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes that this process may use: the machine's, or its control group's if less (version 2:
    a container's limit). None where the system does not say (Windows).

    Args:
        root: where `proc` and `sys` are found.
    """
    limits = _group_limits(root)
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _group_limits(root: Path) -> list[int]:
    """Of the process's own group and every group around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    group = PurePosixPath(own.lstrip("/"))
    return [
        limit
        for name in (group, *group.parents)
        if (limit := _limit(root / _CONTROL_GROUPS / name / "memory.max")) is not None
    ]


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max": none


def lazy_zeros(spec: BufferSpec) -> npt.NDArray[Any]:
    """Zeros in pages of their own, each taken when it is first written.

    numpy asks for pages of 2 MB, and a cache has its heads far apart: the first positions of
    Llama-2-7B would take all of the 2.1 GB that 2048 positions need.

    Raises:
        DeviceMemoryError: the system does not have so much.
    """
    private = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, spec.bytes, **private)
    except (OSError, OverflowError) as error:
        raise DeviceMemoryError(
            f"the system has no {spec.bytes / (1 << 30):.1f} GiB for a buffer of a sequence "
            f"({error}); export with a smaller --max-seq-len"
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, spec.dtype).reshape(spec.shape)
