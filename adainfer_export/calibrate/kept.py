"""What a calibration that was stopped had fitted: the slow steps' arrays, beside the engines.

`.calibration/` in the engine folder holds one file per finished step, and which calibration they
are of: data, settings, engines, version. The same one goes on from there, any other begins anew.
The folder goes when a calibration ends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.engine_folder import file_sha256
from adainfer_runtime.manifest import Manifest

from .request import CalibrationRequest

__all__ = ["KeptSteps", "identity_of"]

_FOLDER = ".calibration"
_IDENTITY = "identity.json"

Arrays = Mapping[str, npt.NDArray[Any]]


class KeptSteps:
    """Finished steps of one calibration of one engine folder.

    Args:
        identity: what must be equal for them to be good.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder / _FOLDER
        self._identity = json.dumps(identity, sort_keys=True)
        note = self._folder / _IDENTITY
        if self._folder.exists() and not (
            note.is_file() and note.read_text(encoding="utf-8") == self._identity
        ):
            self.discard()

    def arrays(self, step: str, make: Callable[[], Arrays]) -> Arrays:
        """The step's arrays, made where they are not there yet.

        Raises:
            OSError: they cannot be written.
        """
        path = self._folder / f"{step}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        made = make()
        if not self._folder.exists():
            self._folder.mkdir()
            (self._folder / _IDENTITY).write_text(self._identity, encoding="utf-8")
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **made)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
        return made

    def discard(self) -> None:
        """Forgets all steps."""
        shutil.rmtree(self._folder, ignore_errors=True)


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
