"""Errors of the compiler. All of them are `AdaInferError`s: one line that says what to do.

AdaInferError
├── SourceError               the model cannot be found or fetched
│   ├── GatedSourceError
│   ├── GgufSourceError
│   ├── PickledSourceError
│   └── UnknownModelError
├── CheckpointError           the checkpoint is damaged or incomplete
│   └── NonFiniteWeightError
├── UnsupportedError          architecture, target or precision that is not built
├── LoweringError             the graph did not become what the target needs
├── OutputError               the engine folder cannot be written (the runtime's)
├── BuildError                TensorRT cannot build a stage
├── CalibrationError          the calibration data cannot give an exit graph
└── ValidationFailedError     an engine folder differs from its reference
"""

from __future__ import annotations

from adainfer_runtime.errors import AdaInferError, OutputError, one_line

__all__ = [
    "BuildError",
    "CalibrationError",
    "CheckpointError",
    "GatedSourceError",
    "GgufSourceError",
    "LoweringError",
    "NonFiniteWeightError",
    "OutputError",
    "PickledSourceError",
    "SourceError",
    "UnknownModelError",
    "UnsupportedError",
    "ValidationFailedError",
    "one_line",
]


class SourceError(AdaInferError):
    """The model's source cannot be found, fetched or verified."""


class GatedSourceError(SourceError):
    """The weights are to be had only once their licence was accepted."""


class GgufSourceError(SourceError):
    """A repository on the hub holds its weights as GGUF alone."""


class PickledSourceError(SourceError):
    """There are weights, but pickled ones alone, which are not read."""


class UnknownModelError(SourceError):
    """The name is no alias, folder, file or Hugging Face id."""


class CheckpointError(AdaInferError):
    """The checkpoint is truncated, incomplete or inconsistent."""


class NonFiniteWeightError(CheckpointError):
    """A weight holds NaN or infinity."""


class UnsupportedError(AdaInferError):
    """The architecture, target or precision is not supported."""


class LoweringError(AdaInferError):
    """After lowering, an operator that the target needs is not there."""


class BuildError(AdaInferError):
    """A stage cannot be built into a TensorRT plan."""


class CalibrationError(AdaInferError):
    """The calibration data or its results cannot give an exit graph."""


class ValidationFailedError(AdaInferError):
    """A stage or the whole chain differs from its reference by more than the tolerance."""
