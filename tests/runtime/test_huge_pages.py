"""Memory that is moved into huge pages: which one, and that nothing is lost."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest

from adainfer_runtime.backends.huge_pages import in_huge_pages

MB = 1 << 20
PAGE = 2 * MB


@pytest.fixture
def system(tmp_path):
    """A system's files under a root; `maps` of (start, end, rights, name) in MB."""

    def write(maps, enabled="always [madvise] never", page=PAGE):
        settings = tmp_path / "sys/kernel/mm/transparent_hugepage"
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "enabled").write_text(enabled + "\n")
        (settings / "hpage_pmd_size").write_text(f"{page}\n")
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        lines = [
            f"{start * MB:x}-{end * MB:x} {rights} 00000000 00:00 {inode} {name}"
            for start, end, rights, inode, name in maps
        ]
        (tmp_path / "proc/self/maps").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path

    return write


def advised(system, before, after, **settings):
    """Address and bytes in MB, by advice."""
    found = {}

    def advise(address, length, advice):
        found.setdefault(advice, []).append((address / MB, length / MB))

    root = system(before, **settings)
    with in_huge_pages(root, advise):
        system(after, **settings)
    return found


def anonymous(start, end):
    return start, end, "rw-p", 0, ""


def test_whole_pages_of_what_is_new(system):
    before = [anonymous(10, 20), (100, 110, "rw-p", 0, "[heap]")]
    after = [
        anonymous(10, 20),
        anonymous(31, 37),  # 32 … 36 are whole pages
        (100, 116, "rw-p", 0, "[heap]"),  # grown
        (200, 210, "r--p", 0, ""),
        (300, 310, "rw-p", 77, "/models/layers.data"),
        (400, 410, "rw-s", 0, "/dev/zero (deleted)"),
        (500, 501, "rw-p", 0, ""),  # less than a page
        (600, 610, "rw-p", 0, "[stack]"),
    ]
    places = [(32.0, 4.0), (110.0, 6.0)]
    assert advised(system, before, after) == {14: places, 25: places}


def test_nothing_where_they_are_off(system):
    new = [anonymous(10, 20)]
    assert advised(system, [], new, enabled="always madvise [never]") == {}
    assert advised(system, [], new, enabled="[always] madvise never")[14] == [(10.0, 10.0)]


def test_nothing_on_other_systems(tmp_path):
    def advise(*_):
        raise AssertionError("asked")

    with in_huge_pages(tmp_path, advise):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_contents_stay():
    with in_huge_pages():
        pages = mmap.mmap(-1, 16 * MB, flags=mmap.MAP_PRIVATE)
        values = np.frombuffer(pages, np.float32)
        values[:] = np.arange(len(values))
    assert (values == np.arange(len(values), dtype=np.float32)).all()
