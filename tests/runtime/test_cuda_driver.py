"""The CUDA driver over a CUDA runtime that is none: it counts what lives, and fails where told."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from adainfer_runtime.backends import cuda_driver
from adainfer_runtime.backends.cuda_driver import CudaDriver
from adainfer_runtime.backends.device_blocks import DeviceBlocks
from adainfer_runtime.devices import GpuInfo
from adainfer_runtime.errors import DeviceError, DeviceMemoryError, StageError


class Error(int):
    name = "cudaErrorSomething"


class FakeRuntime(ModuleType):
    """`cuda.bindings.runtime`: every call gives an error number and its results."""

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        kinds = ("HostToDevice", "DeviceToHost", "DeviceToDevice")
        self.cudaMemcpyKind = SimpleNamespace(**{f"cudaMemcpy{kind}": kind for kind in kinds})
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        self.live = dict.fromkeys(("stream", "memory", "pinned", "graph", "executable"), 0)
        self.memory, self.failing, self.capturing = {}, {}, False
        self.last_error = 0
        for name, what, step in (
            ("cudaStreamCreate", "stream", 1),
            ("cudaStreamDestroy", "stream", -1),
            ("cudaGraphInstantiate", "executable", 1),
            ("cudaGraphExecDestroy", "executable", -1),
            ("cudaGraphDestroy", "graph", -1),
            ("cudaFreeHost", "pinned", -1),
        ):
            self._define(name, lambda *_, what=what, step=step: self._count(what, step))
        for name in ("cudaMemsetAsync", "cudaMemcpyAsync", "cudaGraphLaunch"):
            self._define(name, lambda *_: ())
        self._define("cudaStreamSynchronize", self._synchronise)
        self._define("cudaMalloc", self._malloc)
        self._define("cudaFree", self._free)
        self._define("cudaMallocHost", self._pin)
        self._define("cudaMemcpy2DAsync", self._copy_rows)
        self._define("cudaGetLastError", self._clear)
        self._define("cudaMemGetInfo", lambda: (1 << 20, 8 << 30))
        self._define("cudaStreamBeginCapture", self._begin)
        self._define("cudaStreamEndCapture", self._end)

    def _define(self, name, work):
        def call(*arguments):
            if name in self.failing:
                self.last_error = self.failing[name]
                return (Error(self.failing[name]), *self.failing.get("results", ()))
            return (Error(0), *work(*arguments))

        call.__name__ = name
        setattr(self, name, call)

    def _count(self, what, step):
        self.live[what] += step
        assert self.live[what] >= 0, what
        return (7,) if step > 0 else ()

    def _synchronise(self, stream):
        assert not self.capturing, "synchronised while recording"
        return ()

    def _malloc(self, size):
        block = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(block)
        self.memory[address] = block
        return (address,)

    def _free(self, address):
        assert not self.capturing, "freed while recording"
        del self.memory[address]
        return ()

    def _pin(self, size):
        self._count("pinned", 1)
        self._pinned = (ctypes.c_uint8 * size)()
        return (ctypes.addressof(self._pinned),)

    def _copy_rows(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        return ()

    def _clear(self):
        self.last_error = 0
        return ()

    def _begin(self, stream, mode):
        self.capturing = True
        return ()

    def _end(self, stream):
        self.capturing = False
        return self._count("graph", 1)

    @property
    def left(self):
        return {**self.live, "memory": len(self.memory)}


NOTHING = dict.fromkeys(("stream", "memory", "pinned", "graph", "executable"), 0)


@pytest.fixture
def cuda(monkeypatch):
    runtime = FakeRuntime()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = runtime
    package = ModuleType("cuda")
    package.bindings = bindings
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(cuda_driver, "find_gpu", object)
    return runtime


def test_everything_goes_with_the_driver(cuda):
    driver = CudaDriver("cuda")
    driver.allocate(100)
    blocks = DeviceBlocks(driver, {"a": 10, "b": 0})
    driver.pinned(16)
    launch = driver.record(lambda: None)
    launch()
    assert cuda.left == {"stream": 1, "memory": 3, "pinned": 1, "graph": 0, "executable": 1}
    del launch
    assert cuda.left["executable"] == 0
    driver.close()
    assert cuda.left == NOTHING
    del blocks  # its memory is gone already
    driver.close()
    driver = CudaDriver("cuda")
    driver.allocate(1)
    del driver
    assert cuda.left == NOTHING


def test_bindings_that_the_driver_is_too_old_for_are_named(cuda, monkeypatch):
    monkeypatch.setattr(cuda_driver, "find_gpu", lambda: GpuInfo("Orin", 87, 8 << 30, "12.6"))
    sys.modules["cuda.bindings"].__version__ = "13.5.0"
    cuda.failing |= {"cudaStreamCreate": 35, "results": (None,)}
    match = (
        r"^device cuda: cuda-python 13\.5\.0 needs a later driver than this one for CUDA 12\.6 .*: "
        r"pip install 'cuda-python<13', or update the driver$"
    )
    with pytest.raises(DeviceError, match=match):
        CudaDriver("tensorrt")
    cuda.failing["cudaStreamCreate"] = 100
    with pytest.raises(StageError, match="cudaStreamCreate failed"):
        CudaDriver("tensorrt")


def test_a_recording_that_fails_leaves_no_graph(cuda):
    driver = CudaDriver("cuda")

    def work():
        raise StageError("a stage")

    with pytest.raises(StageError, match="a stage"):
        driver.record(work)
    assert not cuda.capturing
    cuda.failing["cudaGraphInstantiate"] = 3
    with pytest.raises(StageError, match="cudaGraphInstantiate failed with cudaErrorSomething"):
        driver.record(lambda: None)
    assert cuda.last_error == 0  # TensorRT would take it for its own
    cuda.failing.clear()
    assert (cuda.left["graph"], cuda.left["executable"]) == (0, 0)
    assert driver.record(lambda: None)  # and the driver is usable


def test_what_is_collected_while_recording_is_freed_afterwards(cuda):
    driver = CudaDriver("cuda")
    held = [DeviceBlocks(driver, {"a": 8}), driver.record(lambda: None)]
    launch = driver.record(held.clear)
    assert cuda.left["memory"] == 0
    assert cuda.left["executable"] == 1
    del launch


def test_recording_keeps_other_threads_off_the_stream(cuda):
    driver = CudaDriver("cuda")
    seen = []

    def work():
        other = threading.Thread(target=lambda: seen.append((driver.wait(), cuda.capturing)))
        other.start()
        other.join(0.05)
        assert not seen
        threads.append(other)

    threads = []
    driver.record(work)
    threads[0].join()
    assert seen == [(None, False)]


def test_full_memory_is_said_with_advice(cuda):
    driver = CudaDriver("cuda")
    cuda.failing |= {"cudaMalloc": 2, "results": (0,)}
    match = (
        r"^the GPU's memory is full: 5.0 MB more do not fit \(free are 1.0 of 8,589.9 MB\); run "
        r"fewer sequences at once, or export with a shorter --max-seq-len or a lower --precision$"
    )
    with pytest.raises(DeviceMemoryError, match=match):
        driver.allocate(5_000_000)
    cuda.failing |= {"cudaMalloc": 46}
    with pytest.raises(StageError, match="CUDA: cudaMalloc failed with cudaErrorSomething"):
        driver.allocate(5_000_000)
    cuda.failing.clear()
    cuda.failing["cudaMemsetAsync"] = 46
    with pytest.raises(StageError, match="cudaMemsetAsync"):
        driver.allocate(16)
    cuda.failing.clear()
    assert cuda.left["memory"] == 0


def test_rows_are_copied_to_their_places(cuda):
    driver = CudaDriver("cuda")
    place = driver.allocate(4 * 12)
    ctypes.memset(place, 0, 4 * 12)
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    driver.upload_rows(place + 4, 16, rows)
    back = np.zeros((3, 2), np.float32)
    driver.download_rows(back, place + 4, 16)
    np.testing.assert_array_equal(back, rows)
    whole = np.ctypeslib.as_array((ctypes.c_float * 12).from_address(place)).reshape(3, 4)
    np.testing.assert_array_equal(whole[:, 1:3], rows)
    assert not whole[:, [0, 3]].any()
    driver.download_rows(np.zeros((2, 0), np.float32), place, 16)  # nothing, which CUDA refuses
