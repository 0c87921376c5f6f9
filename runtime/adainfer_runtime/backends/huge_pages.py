"""Weights in huge pages, where Linux has them: what a decoded token reads is all of them.

A token of an int4 model reads its weights once and computes little, so that looking up the
addresses of 4 KB pages is part of its time (figures: `tools/RESULTS.md`). ONNX Runtime packs
weights into memory of its own and asks for no huge pages; where the system gives them to those who
ask (`madvise`, the default of most distributions), the ones around it have to.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

__all__ = ["in_huge_pages"]

_LOG = logging.getLogger(__name__)
_ROOT = Path("/")
_SETTINGS = "sys/kernel/mm/transparent_hugepage"
_MAPS = "proc/self/maps"
# Of linux/mman.h. The first lets the kernel merge pages when it comes to it, the second merges
# them at once, and is refused by kernels before 6.1.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25

# Advises the kernel on memory: address, bytes, advice.
Advise = Callable[[int, int, int], object]


@contextmanager
def in_huge_pages(root: Path = _ROOT, advise: Advise | None = None) -> Iterator[None]:
    """What this process allocates in the block, for good, is moved into huge pages behind it.

    Contents and addresses stay. Elsewhere than on Linux, and where the system's owner turned
    huge pages off, nothing happens.

    Args:
        root: where `proc` and `sys` are found.
        advise: `madvise`.
    """
    size = _page_size(root)
    before = _whole_pages(root, size) if size else frozenset()
    yield
    if not size:
        return
    tell = advise or _madvise()
    for address, length in _runs(_whole_pages(root, size) - before, size):
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            tell(address, length, advice)


def _page_size(root: Path) -> int:
    """Bytes of a huge page; 0 where there are none for who asks."""
    try:
        allowed = (root / _SETTINGS / "enabled").read_text(encoding="ascii")
        size = int((root / _SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return 0 if "[never]" in allowed else size


def _whole_pages(root: Path, size: int) -> frozenset[int]:
    """Numbers of the huge pages that lie within writable private memory without a file."""
    try:
        lines = (root / _MAPS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found: set[int] = set()
    for line in lines:
        addresses, rights, _offset, _device, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.update(range(-(-start // size), end // size))
    return frozenset(found)


def _runs(pages: frozenset[int], size: int) -> Iterator[tuple[int, int]]:
    """Neighbouring pages together: address and bytes."""
    numbered = enumerate(sorted(pages))
    for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0]):
        numbers = [page for _, page in run]
        yield numbers[0] * size, len(numbers) * size


def _madvise() -> Advise:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def advise(address: int, length: int, advice: int) -> None:
        if function(address, length, advice):  # no loss: the memory stays as it is
            _LOG.debug("madvise(%#x, %d, %d): %d", address, length, advice, ctypes.get_errno())

    return advise
