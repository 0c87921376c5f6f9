"""Back ends: what loads stages and runs them. One module each, all behind `base.Backend`."""

from .base import Backend, ExitEvidence, ProbeResult, SequenceBatch, SequenceBuffers
from .registry import load_backend

__all__ = [
    "Backend",
    "ExitEvidence",
    "ProbeResult",
    "SequenceBatch",
    "SequenceBuffers",
    "load_backend",
]
