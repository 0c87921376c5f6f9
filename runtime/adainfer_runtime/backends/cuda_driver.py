"""The CUDA runtime through cuda-python: memory, copies and graphs on one stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..devices import find_gpu
from ..errors import DeviceError, StageError

__all__ = ["CudaDriver"]

_INSTALL = "pip install 'adainfer-export[{extra}]'"


class CudaDriver:
    """See `device_memory.DeviceDriver`."""

    def __init__(self, extra: str) -> None:
        """Opens the first GPU.

        Args:
            extra: of this package, that brings what is missing.

        Raises:
            DeviceError: no GPU, or cuda-python is not installed.
        """
        if find_gpu() is None:
            raise DeviceError(
                "device cuda: no NVIDIA GPU was found (no driver, or no device); use device cpu, "
                "and see `adainfer doctor`"
            )
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise DeviceError(
                f"cuda-python is not installed: {_INSTALL.format(extra=extra)}"
            ) from None
        self._cuda = runtime
        self._kind = runtime.cudaMemcpyKind
        self._stream = self._call(runtime.cudaStreamCreate)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """`cudaMalloc` aligns to 256 bytes and more."""
        address = self._call(self._cuda.cudaMalloc, max(1, size))
        self._call(self._cuda.cudaMemsetAsync, address, 0, max(1, size), self._stream)
        return int(address)

    def free(self, address: int) -> None:
        """Waits for the device, as `cudaFree` does."""
        self._call(self._cuda.cudaFree, address)

    def upload(self, address: int, host: npt.NDArray[Any]) -> None:
        """From pageable memory: the driver stages it before it returns."""
        kind = self._kind.cudaMemcpyHostToDevice
        array = np.ascontiguousarray(host)
        place = array.ctypes.data
        self._call(self._cuda.cudaMemcpyAsync, address, place, array.nbytes, kind, self._stream)

    def download(self, host: npt.NDArray[Any], address: int) -> None:
        """Waits; into memory from `pinned` without a detour."""
        kind = self._kind.cudaMemcpyDeviceToHost
        place = host.ctypes.data
        self._call(self._cuda.cudaMemcpyAsync, place, address, host.nbytes, kind, self._stream)
        self.wait()

    def copy(self, target: int, source: int, size: int) -> None:
        """On the device."""
        kind = self._kind.cudaMemcpyDeviceToDevice
        self._call(self._cuda.cudaMemcpyAsync, target, source, size, kind, self._stream)

    def wait(self) -> None:
        """`cudaStreamSynchronize`."""
        self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures what `work` puts onto the stream as a CUDA graph; the call launches it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, self._stream, mode)
        try:
            work()
        finally:
            graph = self._call(self._cuda.cudaStreamEndCapture, self._stream)
        launchable = self._call(self._cuda.cudaGraphInstantiate, graph, 0)

        def launch() -> None:
            self._call(self._cuda.cudaGraphLaunch, launchable, self._stream)

        return launch

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Page-locked host memory, kept for the life of the process."""
        address = int(self._call(self._cuda.cudaMallocHost, size))
        buffer = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(buffer)

    def _call(self, function: Any, *arguments: Any) -> Any:
        error, *results = function(*arguments)
        if int(error) != 0:
            raise StageError(f"CUDA: {function.__name__} failed with {error.name}")
        return results[0] if results else None
