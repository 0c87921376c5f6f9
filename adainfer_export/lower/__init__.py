"""From the standard decoder graph to what a target runs."""

from .precision import PRECISIONS, Precision
from .targets import TARGETS, Target, find_target, require_shortlist

__all__ = ["PRECISIONS", "TARGETS", "Precision", "Target", "find_target", "require_shortlist"]
