"""Weights that several plans are given as inputs: each once in device memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import AdaInferError, PlanError, one_line
from ..plans import SharedTable
from .device_memory import DeviceDriver, Tensor

__all__ = ["SharedTables"]


class SharedTables:
    """Matrices of an engine folder's weight files, on the device from their first use on; they go
    with this object.
    """

    def __init__(self, folder: Path, driver: DeviceDriver) -> None:
        self._folder = folder
        self._driver = driver
        self._places: dict[tuple[str, int, int], int] = {}

    def tensor(self, table: SharedTable) -> Tensor:
        """Where it lies; equal places in the folder are one on the device.

        Raises:
            DeviceMemoryError: it does not fit.
            PlanError: its file cannot be read.
        """
        if table.place not in self._places:
            self._places[table.place] = self._upload(table)
        return Tensor(self._places[table.place], table.dtype, table.shape)

    def _upload(self, table: SharedTable) -> int:
        path = self._folder / table.file
        try:
            content = np.memmap(path, np.uint8, "r", table.offset, (table.bytes,))
        except (OSError, ValueError) as error:  # gone, or too short
            raise PlanError(f"{path} cannot be read: {one_line(error)}") from None
        address = self._driver.allocate(table.bytes)
        try:
            self._driver.upload(address, content)
        except BaseException:
            self._driver.free(address)
            raise
        return address

    def free(self) -> None:
        """Gives all of them back; again it does nothing."""
        while self._places:
            self._driver.free(self._places.popitem()[1])

    def __del__(self) -> None:
        with suppress(AdaInferError):  # of a device that is going down itself
            self.free()
