"""Back ends: what loads stages and runs them. One module each, all behind `base.Backend`."""

from .base import Backend, ProbeResult, SequenceBuffers
from .registry import load_backend

__all__ = ["Backend", "ProbeResult", "SequenceBuffers", "load_backend"]
