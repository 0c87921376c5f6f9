"""Every error that a user of the runtime can cause.

    AdaInferError
    ├── ManifestError            the engine folder's manifest is missing or malformed
    │   ├── SchemaVersionError   written by an exporter this runtime does not know
    │   ├── UnsafePathError      a path that leaves the engine folder
    │   └── IntegrityError       a file whose size or sha256 is not the manifest's
    ├── DeviceError              the device is unknown, or its provider is not installed
    │   └── DeviceMemoryError    its memory is full
    ├── PlanError                TensorRT plans are missing, or were built for something else
    ├── StageError               ONNX Runtime refused a stage
    ├── RequestError             the request itself is wrong
    │   ├── PromptTooLongError
    │   ├── TokenizerMissingError
    │   ├── ChatTemplateError
    │   └── ExitUnavailableError
    ├── DeadlineError            the request's time is over
    ├── RequestCancelledError    the request was cancelled, and there is no part of it to return
    ├── OutputError              a file or folder that a command writes cannot be written
    ├── TaskFileError            a JSON-lines task file cannot be read, used or written
    └── DatasetUnavailableError  a dataset cannot be loaded from the hub or its cache

Each message says what was wrong, where, what was found and expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "AdaInferError",
    "ChatTemplateError",
    "DatasetUnavailableError",
    "DeadlineError",
    "DeviceError",
    "DeviceMemoryError",
    "ExitUnavailableError",
    "IntegrityError",
    "ManifestError",
    "OutputError",
    "PlanError",
    "PromptTooLongError",
    "RequestCancelledError",
    "RequestError",
    "SchemaVersionError",
    "StageError",
    "TaskFileError",
    "TokenizerMissingError",
    "UnsafePathError",
]


class AdaInferError(Exception):
    """Base of all errors with a one-line message meant for the user."""


class ManifestError(AdaInferError):
    """The engine folder's manifest is missing or malformed."""


class SchemaVersionError(ManifestError):
    """The manifest's schema version is not one this runtime reads."""


class UnsafePathError(ManifestError):
    """A path in the manifest leaves the engine folder."""


class IntegrityError(ManifestError):
    """A file differs from what the manifest says about it."""


class DeviceError(AdaInferError):
    """The device is unknown, or the package that drives it is not installed."""


class DeviceMemoryError(DeviceError):
    """The device's memory is full; the engine stays usable."""


class PlanError(AdaInferError):
    """TensorRT plans are missing, or their stamp does not match."""


class StageError(AdaInferError):
    """A stage cannot be loaded or run."""


class RequestError(AdaInferError):
    """A request that cannot be served; the engine stays usable."""


class PromptTooLongError(RequestError):
    """Prompt and new tokens do not fit the engine's maximum sequence length."""


class TokenizerMissingError(RequestError):
    """Text was given to an engine that was exported without a tokenizer."""


class ChatTemplateError(RequestError):
    """The engine has no chat template, or it does not take these messages."""


class ExitUnavailableError(RequestError):
    """A mode, KV policy or probe needs what this engine folder does not have."""


class DeadlineError(AdaInferError):
    """The request's deadline passed before it was finished."""


class RequestCancelledError(AdaInferError):
    """The request was cancelled before there was anything to return (of a text there always is)."""


class OutputError(AdaInferError):
    """A file or folder cannot be written."""


class TaskFileError(AdaInferError):
    """A task file (JSON lines) cannot be read, used or written."""


class DatasetUnavailableError(AdaInferError):
    """A dataset cannot be loaded, or is not what its entry in the registry says."""


def one_line(error: object) -> str:
    """What a library says, as part of a message of one line."""
    return " ".join(str(error).split()) or type(error).__name__
