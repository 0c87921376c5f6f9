"""What a calibration that was stopped had fitted: the slow steps' arrays, beside the engines.

`.calibration/` in the engine folder says which calibration it is of (data, settings, engines,
version) and holds one file per finished step, and one per finished layer of the step that was at
work. The same calibration goes on from there, any other begins anew. Files have their sha256 in
their names: one that was damaged is made again. The folder goes when a calibration ends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.engine_folder import file_sha256
from adainfer_runtime.manifest import Manifest

from .distilled import Distilled, KeepLayer
from .request import CalibrationRequest

__all__ = ["KEPT_FOLDER", "KeptSteps", "identity_of"]

KEPT_FOLDER = ".calibration"
_IDENTITY = "identity.json"

Arrays = Mapping[str, npt.NDArray[Any]]


class KeptSteps:
    """Finished steps of one calibration of one engine folder, and layers of an unfinished one.

    Args:
        identity: what must be equal for them to be good.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder / KEPT_FOLDER
        self._identity = json.dumps(identity, sort_keys=True).encode()
        note = self._folder / _IDENTITY
        if self._folder.exists() and not (note.is_file() and note.read_bytes() == self._identity):
            self.discard()

    def arrays(self, step: str, make: Callable[[], Arrays]) -> Arrays:
        """The step's arrays, made where they are not there yet; its layers' are in them then.

        Raises:
            OSError: they cannot be written.
        """
        found = self._read(step)
        if found is not None:
            return found
        made = make()
        self._write(step, made)
        for layer in self._folder.glob(f"{step}-*.npz"):
            layer.unlink()
        return made

    def layers(self, step: str) -> KeepLayer:
        """Keeps what a step makes for each layer, until the step itself is finished."""
        return partial(self._layer, step)

    def _layer(self, step: str, layer: int, make: Callable[[], Distilled]) -> Distilled:
        name = f"{step}-{layer:03d}"
        found = self._read(name)
        if found is not None:
            return Distilled.of_arrays(found)
        made = make()
        self._write(name, made.arrays())
        return made

    def discard(self) -> None:
        """Forgets all steps."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, name: str) -> Arrays | None:
        for path in self._folder.glob(f"{name}.*.npz"):
            if path.name == _stamped(name, path):
                with np.load(path, allow_pickle=False) as stored:
                    return {key: stored[key] for key in stored.files}
            path.unlink()
        return None

    def _write(self, name: str, arrays: Arrays) -> None:
        if not self._folder.exists():
            self._folder.mkdir()
            (self._folder / _IDENTITY).write_bytes(self._identity)
        unfinished = self._folder / f"{name}.new"
        with unfinished.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(self._folder / _stamped(name, unfinished))


def identity_of(manifest: Manifest, request: CalibrationRequest) -> dict[str, Any]:
    """Everything that fitted arrays depend on; the manifest is that of the bare engines."""
    own = request.classifier_file
    return {
        "version": version("adainfer-export"),
        "engines": {name: record.sha256 for name, record in manifest.files.items()},
        "data": [_sha256(path) for path in request.files],
        "request": {
            **asdict(request),
            "files": [path.name for path in request.files],
            "classifier_file": _sha256(own) if own else None,
        },
    }


def _sha256(path: Path) -> str | None:
    """None where it cannot be read: the calibration itself will say so."""
    try:
        return file_sha256(path)
    except OSError:
        return None


def _stamped(name: str, path: Path) -> str:
    """The name of a file with this content."""
    return f"{name}.{file_sha256(path)[:16]}.npz"
