"""Allocations in device memory that are given back: named ones together, others to a pool."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Self

from ..errors import AdaInferError
from .device_memory import ALIGNMENT, DeviceDriver

__all__ = ["BlockPool", "DeviceBlocks", "Slots"]


class DeviceBlocks:
    """Named allocations: all of them are there, or none; they go with this object."""

    def __init__(self, driver: DeviceDriver, sizes: Mapping[str, int]) -> None:
        """Allocates them.

        Raises:
            DeviceMemoryError: they do not fit; what was allocated before is free again.
        """
        self._driver = driver
        self._places: dict[str, int] = {}
        try:
            for name, size in sizes.items():
                self._places[name] = driver.allocate(size)
        except BaseException:
            self.free()
            raise

    def __getitem__(self, name: str) -> int:
        """Address of one."""
        return self._places[name]

    def free(self) -> None:
        """Gives all of them back; again it does nothing."""
        while self._places:
            self._driver.free(self._places.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __del__(self) -> None:
        with suppress(AdaInferError):  # of a device that is going down itself
            self.free()


class BlockPool:
    """Blocks of one size, made where none is idle. Work on one stream: a block that was given back
    is written anew only after everything that reads it.
    """

    def __init__(self, driver: DeviceDriver, size: int) -> None:
        self._driver = driver
        self._size = size
        self._idle: list[int] = []
        self._closed = False

    def __del__(self) -> None:
        with suppress(AdaInferError):  # see `DeviceBlocks`
            self.close()

    def take(self) -> int:
        """Address of a block of one's own; the caller holds the driver's lock."""
        return self._idle.pop() if self._idle else self._driver.allocate(self._size)

    def give(self, place: int) -> None:
        """A block is idle again; from any thread."""
        if self._closed:
            self._driver.free(place)
        else:
            self._idle.append(place)

    def close(self) -> None:
        """Frees the idle ones, and the others as they are given back."""
        self._closed = True
        while self._idle:
            self._driver.free(self._idle.pop())


class Slots:
    """Places of small values in one block: TensorRT wants every tensor aligned."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.offsets: dict[str, int] = {}
        self.bytes = 0
        for name, size in sizes.items():
            self.offsets[name] = self.bytes
            self.bytes += -(-max(1, size) // ALIGNMENT) * ALIGNMENT
