"""Compile LLMs into chains of ONNX engines with an exit graph between them (AdaInfer).

The names load on first use: `adainfer build` runs on devices that have none of the compiler's
libraries but `onnx`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibrate import CalibrationRequest
    from .export import ExportRequest, ExportResult, export

__all__ = ["CalibrationRequest", "ExportRequest", "ExportResult", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(".calibrate" if name == "CalibrationRequest" else ".export", __name__)
    # `export` is a module and a function: the function is what this package offers.
    globals().update({known: getattr(module, known) for known in __all__ if hasattr(module, known)})
    return globals()[name]
