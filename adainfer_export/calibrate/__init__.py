"""Fitting the exit graph after AdaInfer: features per layer, the model's own labels, a classifier.

The steps are in `pipeline`; importing it loads scikit-learn, which an export without calibration
does without.
"""

from .request import CalibrationRequest, ShortlistRequest

__all__ = ["CalibrationRequest", "ShortlistRequest"]
