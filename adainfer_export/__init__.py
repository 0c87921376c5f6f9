"""Compile LLMs into chains of ONNX engines with an exit graph between them (AdaInfer)."""

from .calibrate import CalibrationRequest
from .export import ExportRequest, ExportResult, export

__all__ = ["CalibrationRequest", "ExportRequest", "ExportResult", "export"]
