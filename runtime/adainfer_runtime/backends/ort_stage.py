"""A stage's ONNX Runtime session, whose errors name the stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from ..errors import StageError, one_line

__all__ = ["OrtStage", "Place", "run_error"]

# Element type, shape and address of a tensor in the process's memory.
Place = tuple[Any, tuple[int, ...], int]


def run_error(file: str, error: Exception) -> StageError:
    """What ONNX Runtime says of a run, on one line."""
    return StageError(f"{file} cannot be run by ONNX Runtime: {one_line(error)}")


class OrtStage:
    """See `onnxruntime.InferenceSession`; every error is a `StageError`."""

    def __init__(self, file: str, session: Any) -> None:
        self._file = file
        self._session = session
        self._run = session.run

    def run(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[npt.NDArray[Any]]:
        """The outputs that are named.

        Raises:
            StageError: ONNX Runtime refuses the feed, or fails.
        """
        try:
            return self._run(outputs, feed)  # type: ignore[no-any-return]
        except Exception as error:  # onnxruntime's exception types share no public base
            raise run_error(self._file, error) from error

    def bind(self, inputs: Mapping[str, Place], outputs: Mapping[str, Place]) -> Callable[[], None]:
        """A run that reads and writes memory where it lies.

        Raises:
            StageError: the stage has no such tensors; so does the run where ONNX Runtime fails.
        """
        binding = self._session.io_binding()
        try:
            for name, place in inputs.items():
                binding.bind_input(name, "cpu", 0, *place)
            for name, place in outputs.items():
                binding.bind_output(name, "cpu", 0, *place)
        except Exception as error:  # as above
            raise run_error(self._file, error) from error
        return self._bound(binding)

    def _bound(self, binding: Any) -> Callable[[], None]:
        run, file = _runner(self._session, binding), self._file

        def call() -> None:
            # Without RunOptions: ONNX Runtime 1.32 looks an entry up in them by a C++ exception,
            # which costs 50 µs a run (SmolLM2: 35% of a decoded token's layers).
            try:
                run()
            except Exception as error:  # as above
                raise run_error(file, error) from error

        return call


def _runner(session: Any, binding: Any) -> Callable[[], None]:
    """A run of a binding, past what ONNX Runtime's Python looks at before each (WebGPU's graphs):
    2% of a decoded token with one engine, 3% with 30. Where its insides are not as in 1.32, by it.
    """
    native, bound = getattr(session, "_sess", None), getattr(binding, "_iobinding", None)
    run = getattr(native, "run_with_iobinding", None)
    if run is None or bound is None:
        return partial(session.run_with_iobinding, binding)
    return partial(run, bound, None)
