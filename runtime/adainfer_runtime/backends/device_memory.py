"""Device memory behind a tiny driver protocol: everything that only a GPU can do is in there.

Order is one stream's: copies and stages run in the order in which they were asked for, and only
`download` waits for them.
"""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import AdaInferError
from .layout import ITEM_BYTES, Region

__all__ = ["ALIGNMENT", "DeviceDriver", "DeviceRows", "Tensor", "from_storage", "to_storage"]

ALIGNMENT = 256  # of every tensor that TensorRT is given

Float32 = npt.NDArray[np.float32]


class DeviceDriver(Protocol):
    """One device and one stream.

    Whoever holds the lock has the stream alone. Every call takes it; so does who binds a stage and
    runs it, for stages are shared, and who writes a result's place before it is read.
    """

    @property
    def lock(self) -> threading.RLock:
        """One for the device: sequences of several threads take turns."""

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of zeros, aligned to `ALIGNMENT`.

        Raises:
            DeviceMemoryError: they do not fit.
        """

    def free(self, address: int) -> None:
        """Gives an allocation back, once the stream is done with it."""

    def upload(self, address: int, host: npt.NDArray[Any]) -> None:
        """Copies to the device; `host` may be changed when this returns."""

    def upload_rows(self, address: int, pitch: int, host: npt.NDArray[Any]) -> None:
        """Copies `[rows, elements]` to places that lie `pitch` bytes apart."""

    def download(self, host: npt.NDArray[Any], address: int) -> None:
        """Copies from the device, after everything before it; waits."""

    def download_rows(self, host: npt.NDArray[Any], address: int, pitch: int) -> None:
        """Copies `[rows, elements]` from places that lie `pitch` bytes apart; waits."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Copies on the device; the places do not overlap."""

    def wait(self) -> None:
        """Returns when the stream is done."""

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Host memory that downloads reach quickest: for what an exit decision reads back."""


@dataclass(frozen=True)
class Tensor:
    """A tensor on the device."""

    address: int
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def at(cls, base: int, region: Region) -> Tensor:
        """A region of a buffer that begins at `base`."""
        return cls(base + region.offset, region.dtype, region.shape)

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class DeviceRows:
    """Float32 rows `[rows, width]` on the device, handled like a numpy array by the chain.

    Slices are views; assigning to one copies on the device, or from the host. `np.asarray` brings
    the rows to the host, and is what nothing on the way to an exit decision does.
    """

    def __init__(
        self,
        driver: DeviceDriver,
        address: int,
        rows: int,
        width: int,
        owner: DeviceRows | None = None,
    ) -> None:
        self.driver = driver
        self.address = address
        self.rows = rows
        self.width = width
        self._owner = owner  # whose memory this is, if it goes with an object

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, width)`."""
        return self.rows, self.width

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, key: int | slice) -> DeviceRows:
        start, rows = self._span(key)
        address = self.address + start * 4 * self.width
        return DeviceRows(self.driver, address, rows, self.width, self)

    def __setitem__(self, key: int | slice, value: DeviceRows | Float32) -> None:
        target = self[key]
        if not isinstance(value, DeviceRows):
            host = np.ascontiguousarray(value, np.float32).reshape(-1, self.width)
            if len(host) != target.rows:
                raise ValueError(f"{len(host)} rows do not fit {target.rows}")
            self.driver.upload(target.address, host)
            return
        if value.rows != target.rows:
            raise ValueError(f"{value.rows} rows do not fit {target.rows}")
        self.driver.copy(target.address, value.address, 4 * value.rows * value.width)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        host = np.empty(self.shape, np.float32)
        self.driver.download(host, self.address)
        return host if dtype is None else host.astype(dtype)

    def copy(self) -> DeviceRows:
        """Rows of their own."""
        size = 4 * self.rows * self.width
        copied = _OwnedRows(self.driver, self.driver.allocate(size), self.rows, self.width)
        self.driver.copy(copied.address, self.address, size)
        return copied

    def _span(self, key: int | slice) -> tuple[int, int]:
        if isinstance(key, slice):
            start, stop, _ = key.indices(self.rows)
            return start, max(0, stop - start)
        index = key + self.rows if key < 0 else key
        if not 0 <= index < self.rows:
            raise IndexError(f"row {key} of {self.rows}")
        return index, 1


class _OwnedRows(DeviceRows):
    """Rows whose memory goes with them."""

    def __del__(self) -> None:
        with suppress(AdaInferError):  # of a device that is going down itself
            self.driver.free(self.address)


def to_storage(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Float32 values as they lie in memory in an element type; bfloat16 as uint16."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    return (rounded >> 16).astype(np.uint16)


def from_storage(values: npt.NDArray[Any], dtype: str) -> Float32:
    """The inverse of `to_storage`."""
    if dtype != "bfloat16":
        return values.astype(np.float32, copy=False)
    return (values.astype(np.uint32) << 16).view(np.float32)
