"""Kernels that TensorRT-RTX compiled on this GPU, kept beside the plans for the next process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["KernelCache"]


class KernelCache:
    """One for all contexts of all plans of a build.

    A file of another GPU, driver or version, or a damaged one, is ignored: TensorRT-RTX checks it.
    Nothing depends on the file but the time of the first runs, so one that cannot be read or
    written is no error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._made_by: Any = None
        self._saved = b""

    def share(self, engine: Any, config: Any) -> None:
        """Gives it to a context that will be created by `config`, of an engine."""
        if self._cache is None:
            self._made_by = engine, config  # which live as long as it does
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                content = self._path.read_bytes()
                if content and self._cache.deserialize(content):
                    self._saved = content
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the file atomically, where there is something new."""
        serialised = self._cache.serialize() if self._cache is not None else None
        content = bytes(memoryview(serialised)) if serialised is not None else b""
        if not content or content == self._saved:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        with suppress(OSError):
            try:
                temporary.write_bytes(content)
                temporary.replace(self._path)
                self._saved = content
            finally:
                temporary.unlink(missing_ok=True)
