"""The `adainfer` command."""

from .app import main, run_guarded

__all__ = ["main", "run_guarded"]
