"""The `adainfer` command."""

from .app import main, main_export

__all__ = ["main", "main_export"]
