"""What is held once or twice, and memory that is taken as it fills."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from adainfer_runtime import Engine
from adainfer_runtime.backends import host_memory, ort_cpu
from adainfer_runtime.backends.layout import BufferSpec
from adainfer_runtime.errors import DeviceMemoryError

MB = 1 << 20
MAPS = Path("/proc/self/smaps_rollup")


def control_group(root, group, limits):
    """The files of a process in a control group, with `memory.max` of some groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"4:memory:/old\n0::{group}\n")
    for name, limit in limits.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("/", {".": 64 * MB}, 64 * MB),
        ("/a/b", {"a": 32 * MB, "a/b": "max"}, 32 * MB),
        ("/a/b", {"a": 32 * MB, "a/b": 16 * MB}, 16 * MB),
    ],
    ids=["container", "around", "own"],
)
def test_the_least_limit_of_the_control_groups_counts(tmp_path, group, limits, expected):
    assert host_memory.memory_limit(control_group(tmp_path, group, limits)) == expected


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the system does not say")
def test_without_a_limit_the_machine_counts(tmp_path):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host_memory.memory_limit(tmp_path) == machine
    assert host_memory.memory_limit(control_group(tmp_path, "/", {".": "max"})) == machine


def test_weights_are_held_twice_within_a_quarter_of_the_memory(tiny):
    manifest = tiny("llama", precision="int4").engine.manifest
    stages = [r.bytes for name, r in manifest.files.items() if name.startswith("stages/")]
    both = 2 * sum(stages)
    assert ort_cpu.fits_twice(manifest, 4 * both)
    assert not ort_cpu.fits_twice(manifest, 4 * both - 1)
    assert ort_cpu.fits_twice(manifest, None)


@pytest.mark.parametrize(
    ("memory", "low_memory", "twice"),
    [(1 << 40, None, True), (MB, None, False), (MB, False, True), (1 << 40, True, False)],
)
def test_what_was_asked_for_goes_before_the_rule(tiny, monkeypatch, memory, low_memory, twice):
    folder = tiny("llama", precision="int4").folder
    monkeypatch.setattr(ort_cpu, "memory_limit", lambda: memory)
    backend = Engine.load(folder, low_memory=low_memory).backend
    rows = backend.manifest.quantisation.wide_rows
    assert (backend.stage(0, rows) is not backend.stage(0, 1)) is twice
    assert backend.stage(0, rows - 1) is backend.stage(0, 1)


@pytest.mark.skipif(not MAPS.exists(), reason="Linux tells")
def test_a_cache_takes_memory_as_it_fills():
    before = anonymous_bytes()
    heads = host_memory.lazy_zeros(BufferSpec("float32", (32, 2048, 128)))  # 32 MB
    heads[:, :3] = 1
    assert anonymous_bytes() - before < 2 * MB
    heads[:, 3:] = 2
    assert anonymous_bytes() - before > 30 * MB
    assert heads.dtype == np.float32
    assert heads.sum() == 32 * 128 * (3 + 2 * 2045)


def anonymous_bytes():
    lines = MAPS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def test_more_memory_than_there_is():
    with pytest.raises(DeviceMemoryError, match=r"no 4194304\.0 GiB for a buffer"):
        host_memory.lazy_zeros(BufferSpec("float32", (1 << 50,)))
