"""What a TensorRT session asks of plans and of the device: as little as needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .device_memory import DeviceDriver

__all__ = ["GraphDriver", "Plan", "PlanContext", "PlanLoader"]


class GraphDriver(DeviceDriver, Protocol):
    """A driver that can record what is put onto its stream."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records `work` as a graph; the call replays it with the same addresses."""


class PlanContext(Protocol):
    """An execution context of one profile."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `StageError` where it is refused."""

    def set_address(self, name: str, address: int) -> None:
        """Raises `StageError` where it is refused."""

    def enqueue(self) -> None:
        """Puts one run onto the stream."""

    def capturable(self) -> bool:
        """Whether a run with these shapes may be recorded as a CUDA graph."""


class Plan(Protocol):
    """A deserialised plan."""

    def inputs(self) -> tuple[str, ...]:
        """Names of its inputs."""

    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs."""

    def alias_of(self, output: str) -> str | None:
        """The input that an output is updated in place of."""

    def profiles(self) -> int:
        """Number of profiles; the first is for one position."""

    def accepts(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an input's shape lies within a profile."""

    def context(self, profile: int, *, fixed_shapes: bool) -> PlanContext:
        """A new execution context.

        Args:
            fixed_shapes: its shapes are set once, so that time spent on them comes back.
        """


class PlanLoader(Protocol):
    """Deserialises plans."""

    def load(self, path: Path) -> Plan:
        """Raises `StageError` where TensorRT refuses the file."""
