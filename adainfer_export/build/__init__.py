"""TensorRT plans from an engine folder's ONNX files: one per stage, one at a time.

Needs neither torch nor the compiler's other libraries but `onnx`, so that plans can be built on the
device.
"""

from .builder import BuildReport, BuildRequest, build_plans
from .profiles import ShapeRange, profiles_of

__all__ = ["BuildReport", "BuildRequest", "ShapeRange", "build_plans", "profiles_of"]
