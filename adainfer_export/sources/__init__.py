"""Where models come from."""

from .checkpoint import Checkpoint
from .resolve import resolve

__all__ = ["Checkpoint", "resolve"]
