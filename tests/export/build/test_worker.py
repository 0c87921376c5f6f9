"""The process that builds a plan: its timing cache. A fake stands in for TensorRT."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from adainfer_export.build import worker
from adainfer_export.build.worker import Job


class FakeConfig:
    """Takes caches that begin with `cache`, or none at all; `way` is how it refuses."""

    def __init__(self, way="none"):
        self.way, self.cache = way, None

    def create_timing_cache(self, content):
        if content and not content.startswith(b"cache"):
            if self.way == "raises":
                raise RuntimeError("no cache")
            return None if self.way == "none" else "another device's"
        return content or b"new"

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache is None:
            raise TypeError("incompatible function arguments")
        if cache == "another device's":
            return False
        self.cache = cache
        return True


def attach(path, way="none"):
    config, log = FakeConfig(way), SimpleNamespace(warnings=[])
    job = Job("tensorrt", "a.onnx", "a.plan", (), (), 3, str(path))
    return worker._attach_cache(config, job, log), config, log.warnings


def test_a_cache_is_made_and_found_again(tmp_path):
    path = tmp_path / "timing.cache"
    cache, _, warnings = attach(path)
    assert (cache, warnings) == (b"new", [])
    worker._write_cache(path, memoryview(b"cache of two"))
    cache, config, warnings = attach(path)
    assert cache == config.cache == b"cache of two"
    assert warnings == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["timing.cache"]


@pytest.mark.parametrize("way", ["none", "raises", "mismatch"])
def test_a_damaged_cache_is_begun_anew_with_a_warning(tmp_path, way):
    path = tmp_path / "timing.cache"
    path.write_bytes(b"torn")
    cache, config, warnings = attach(path, way)
    assert cache == config.cache == b"new"
    assert warnings == [f"{path} is damaged or of another device: kernels are timed anew"]


def test_a_killed_build_leaves_the_old_cache(tmp_path, monkeypatch):
    path = tmp_path / "timing.cache"
    path.write_bytes(b"cache of one")

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        worker._write_cache(path, memoryview(b"cache of two"))
    assert path.read_bytes() == b"cache of one"
