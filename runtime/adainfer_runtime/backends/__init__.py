"""Back ends: what loads stages and runs them. One module each, all behind `base.Backend`."""

from .base import Backend, ExitEvidence, ProbeResult, SequenceBuffers
from .registry import load_backend

__all__ = ["Backend", "ExitEvidence", "ProbeResult", "SequenceBuffers", "load_backend"]
