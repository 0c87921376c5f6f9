"""The CUDA runtime through cuda-python: memory, copies and graphs on one stream."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cuda_bindings import too_new
from ..devices import find_gpu
from ..errors import DeviceError, DeviceMemoryError, StageError

__all__ = ["CudaDriver"]

_INSTALL = "pip install 'adainfer-export[{extra}]'"
_MEMORY_IS_FULL = 2  # cudaErrorMemoryAllocation
_DRIVER_IS_OLD = 35  # cudaErrorInsufficientDriver


class CudaDriver:
    """See `device_memory.DeviceDriver`. Everything goes with it: memory, graphs, the stream."""

    def __init__(self, extra: str) -> None:
        """Opens the first GPU.

        Args:
            extra: of this package, that brings what is missing.

        Raises:
            DeviceError: no GPU, or no cuda-python that its driver takes.
        """
        gpu = find_gpu()
        if gpu is None:
            raise DeviceError(
                "device cuda: no NVIDIA GPU was found (no driver, or no device); use device cpu, "
                "and see `adainfer doctor`"
            )
        try:
            from cuda import bindings
            from cuda.bindings import runtime
        except ImportError:
            raise DeviceError(
                f"cuda-python is not installed: {_INSTALL.format(extra=extra)}"
            ) from None
        self.lock = threading.RLock()
        self._cuda = runtime
        self._kind = runtime.cudaMemcpyKind
        self._live: set[int] = set()
        self._pinned: list[int] = []
        self._recording = False
        self._waiting: list[Callable[[], None]] = []
        error, *found = runtime.cudaStreamCreate()  # the first call of all
        if int(error) == _DRIVER_IS_OLD:
            version = getattr(bindings, "__version__", "of an unknown version")
            raise DeviceError(f"device cuda: {too_new(version, gpu.driver)}")
        self._check(error, "cudaStreamCreate")
        self._stream: Any = found[0]

    def __del__(self) -> None:
        if hasattr(self, "_waiting"):  # it was opened
            with suppress(Exception):  # of a process that is ending, in which CUDA is gone before
                self.close()

    def close(self) -> None:
        """Frees everything that was allocated, and the stream; again it does nothing."""
        with self.lock:
            if self._stream is None:
                return
            self.wait()
            for address in tuple(self._live):
                self.free(address)
            for address in self._pinned:
                self._call(self._cuda.cudaFreeHost, address)
            self._pinned.clear()
            self._call(self._cuda.cudaStreamDestroy, self._stream)
            self._stream = None

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """`cudaMalloc` aligns to 256 bytes and more."""
        size = max(1, size)
        with self.lock:
            address = self._malloc(size)
            self._live.add(address)
            try:
                self._call(self._cuda.cudaMemsetAsync, address, 0, size, self._stream)
            except StageError:
                self.free(address)
                raise
        return address

    def free(self, address: int) -> None:
        """Waits for the device, as `cudaFree` does."""
        with self.lock:
            if address in self._live:  # not where `close` was earlier
                self._live.remove(address)
                self.when_recorded(lambda: self._call(self._cuda.cudaFree, address))

    def upload(self, address: int, host: npt.NDArray[Any]) -> None:
        """From pageable memory: the driver stages it before it returns."""
        array = np.ascontiguousarray(host)
        self._copy(address, array.ctypes.data, array.nbytes, self._kind.cudaMemcpyHostToDevice)

    def upload_rows(self, address: int, pitch: int, host: npt.NDArray[Any]) -> None:
        """The same, of rows."""
        array = np.ascontiguousarray(host)
        width = array.nbytes // max(1, len(array))
        kind = self._kind.cudaMemcpyHostToDevice
        self._copy_rows((address, pitch), (array.ctypes.data, width), array, kind)

    def download(self, host: npt.NDArray[Any], address: int) -> None:
        """Waits; into memory from `pinned` without a detour."""
        with self.lock:
            self._copy(host.ctypes.data, address, host.nbytes, self._kind.cudaMemcpyDeviceToHost)
            self.wait()

    def download_rows(self, host: npt.NDArray[Any], address: int, pitch: int) -> None:
        """The same, of rows."""
        width = host.nbytes // max(1, len(host))
        kind = self._kind.cudaMemcpyDeviceToHost
        with self.lock:
            self._copy_rows((host.ctypes.data, width), (address, pitch), host, kind)
            self.wait()

    def copy(self, target: int, source: int, size: int) -> None:
        """On the device."""
        self._copy(target, source, size, self._kind.cudaMemcpyDeviceToDevice)

    def wait(self) -> None:
        """`cudaStreamSynchronize`."""
        with self.lock:
            self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures what `work` puts onto the stream as a CUDA graph; the call launches it, and the
        graph goes with the call.
        """
        with self.lock:
            try:
                graph = self._capture(work)
                try:
                    launchable = self._call(self._cuda.cudaGraphInstantiate, graph, 0)
                finally:
                    self._call(self._cuda.cudaGraphDestroy, graph)
            except BaseException:
                self._cuda.cudaGetLastError()  # or who asks for it next is told of this one
                raise
            return _Graph(self, launchable)

    def launch(self, graph: Any) -> None:
        """Puts a graph onto the stream."""
        with self.lock:
            self._call(self._cuda.cudaGraphLaunch, graph, self._stream)

    def destroy(self, graph: Any) -> None:
        """Gives a graph back, once the stream is done with it."""

        def destroy() -> None:
            self.wait()
            self._call(self._cuda.cudaGraphExecDestroy, graph)

        with self.lock:
            if self._stream is not None:
                self.when_recorded(destroy)

    def when_recorded(self, call: Callable[[], None]) -> None:
        """Calls now; while a graph is recorded, which a collected object may be the cause of, right
        after it: nothing else may be asked of CUDA then.
        """
        with self.lock:
            if self._recording:
                self._waiting.append(call)
            else:
                call()

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Page-locked host memory, kept for the life of the driver."""
        with self.lock:
            address = int(self._call(self._cuda.cudaMallocHost, size))
            self._pinned.append(address)
        buffer = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(buffer)

    def _capture(self, work: Callable[[], None]) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, self._stream, mode)
        self._recording = True
        try:
            work()
        except BaseException:
            with suppress(StageError):  # the first error is the one to be told of
                self._call(self._cuda.cudaGraphDestroy, self._end_capture())
            raise
        else:
            return self._end_capture()
        finally:
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                call()

    def _end_capture(self) -> Any:
        self._recording = False
        return self._call(self._cuda.cudaStreamEndCapture, self._stream)

    def _malloc(self, size: int) -> int:
        error, address = self._cuda.cudaMalloc(size)
        if int(error) == _MEMORY_IS_FULL:
            free, total = self._call(self._cuda.cudaMemGetInfo)
            raise DeviceMemoryError(
                f"the GPU's memory is full: {size / 1e6:,.1f} MB more do not fit (free are "
                f"{free / 1e6:,.1f} of {total / 1e6:,.1f} MB); run fewer sequences at once, or "
                "export with a shorter --max-seq-len or a lower --precision"
            )
        self._check(error, "cudaMalloc")
        return int(address)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        with self.lock:
            self._call(self._cuda.cudaMemcpyAsync, target, source, size, kind, self._stream)

    def _copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], host: npt.NDArray[Any], kind: Any
    ) -> None:
        """`target` and `source` are (address, bytes from row to row)."""
        if not host.nbytes:
            return
        size = (host.nbytes // len(host), len(host))
        with self.lock:
            call = self._cuda.cudaMemcpy2DAsync
            self._call(call, *target, *source, *size, kind, self._stream)

    def _call(self, function: Any, *arguments: Any) -> Any:
        error, *results = function(*arguments)
        self._check(error, function.__name__)
        return results[0] if len(results) == 1 else tuple(results) or None

    @staticmethod
    def _check(error: Any, name: str) -> None:
        if int(error) != 0:
            raise StageError(f"CUDA: {name} failed with {error.name}")


class _Graph:
    """A graph that can be launched; destroyed with this object."""

    def __init__(self, driver: CudaDriver, launchable: Any) -> None:
        self._driver = driver
        self._launchable = launchable

    def __call__(self) -> None:
        self._driver.launch(self._launchable)

    def __del__(self) -> None:
        with suppress(Exception):  # see `CudaDriver.__del__`
            self._driver.destroy(self._launchable)
