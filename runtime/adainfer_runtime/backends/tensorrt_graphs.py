"""CUDA graphs of runs that come again, and what is done where a stage cannot be recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from ..errors import StageError
from .tensorrt_protocols import GraphDriver

__all__ = ["GraphRecorder", "Recordable", "RecordedRun"]

_LOG = logging.getLogger(__name__)
_ASKED = 4  # times that a stage is asked whether it can be recorded: kernels may be on their way


class Recordable(Protocol):
    """A context that one run is bound to."""

    def enqueue(self) -> None:
        """Puts the run onto the stream."""

    def capturable(self) -> bool:
        """Whether it may be recorded."""


class GraphRecorder:
    """Records runs of stages. Speed is all that a graph gives, so one that fails costs no request:
    its stage is left alone from then on, and the first such is warned of.
    """

    def __init__(self, driver: GraphDriver) -> None:
        self._driver = driver
        self._failed: set[str] = set()

    def takes(self, stage: str) -> bool:
        """Whether no recording of the stage failed."""
        return stage not in self._failed

    def record(self, stage: str, work: Callable[[], None]) -> Callable[[], None] | None:
        """The graph of `work`; None where it cannot be recorded.

        Raises:
            StageError: the stream itself is broken.
        """
        try:
            return self._driver.record(work)
        except StageError as error:
            if not self._failed:
                _LOG.warning(
                    "%s cannot be recorded as a CUDA graph and runs without one, which is slower; "
                    "so do other stages of which the same is true: %s",
                    stage,
                    error,
                )
            self._failed.add(stage)
            self._driver.wait()  # its context is given up, which nothing may use any more
            return None


class RecordedRun:
    """Runs once as it is, then as a graph.

    TensorRT settles shapes in the first run after they were set, which a capture must not see; its
    context is bound once and used by nothing else, so that run is the first one.
    """

    def __init__(self, stage: str, bind: Callable[[], Recordable], recorder: GraphRecorder) -> None:
        """`bind` gives a new context, bound to the run."""
        self._stage = stage
        self._bind = bind
        self._recorder = recorder
        self._context = bind()
        self._settled = False
        self._questions = _ASKED
        self._graph: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Puts one run onto the stream."""
        if self._settled and self._questions:
            self._ask()
        if self._graph is not None:
            self._graph()
        else:
            self._context.enqueue()
            self._settled = True

    def _ask(self) -> None:
        self._questions -= 1
        if not self._recorder.takes(self._stage) or not self._context.capturable():
            return
        self._questions = 0
        self._graph = self._recorder.record(self._stage, self._context.enqueue)
        if self._graph is None:  # what a failed capture leaves of a context is not documented
            self._context = self._bind()
