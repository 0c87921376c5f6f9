"""Fitting the exit graph after AdaInfer: features per layer, the model's own labels, an SVM."""

from .pipeline import calibrate, recalibrate
from .request import CalibrationRequest

__all__ = ["CalibrationRequest", "calibrate", "recalibrate"]
