"""The engine folder on disk: reading, verifying and replacing its manifest."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from .errors import IntegrityError, ManifestError, SchemaVersionError, UnsafePathError
from .manifest import SCHEMA_VERSION, FileRecord, Manifest
from .output_files import writing

__all__ = [
    "MANIFEST_NAME",
    "QUANTISATION_REPORT",
    "file_sha256",
    "load_manifest",
    "record_file",
    "replace_manifest",
    "verify_files",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
QUANTISATION_REPORT = "reports/quantisation.json"


def load_manifest(folder: Path) -> Manifest:
    """Reads and checks `manifest.json`: schema, and that every named path stays inside.

    Raises:
        ManifestError: missing, not JSON, or not of the expected form.
        SchemaVersionError: written for another schema version.
        UnsafePathError: a path is absolute or climbs out of the folder.
    """
    path = folder / MANIFEST_NAME
    if folder.is_file():
        raise ManifestError(f"{folder} is a file, no engine folder{_instead_of(folder)}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{folder} is no engine folder: {MANIFEST_NAME} is missing; "
            "write one with `adainfer-export MODEL --out DIR`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read: {error}; export the model again") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path} is no JSON object; export the model again")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path}: schema version {version!r} is unknown, this runtime reads "
            f"{SCHEMA_VERSION}; export again, or install the matching adainfer-export"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(f"{path}: {where}: {first['msg']}; export the model again") from error
    for name in manifest.referenced_files():
        _check_inside(folder, name)
    return manifest


def _instead_of(file: Path) -> str:
    there = (file.parent / MANIFEST_NAME).is_file()
    return f": give the folder that it is in, {file.parent}" if there else ""


def verify_files(folder: Path, manifest: Manifest, *, sha256: bool = False) -> None:
    """Checks that every file has the size (and, if asked, the sha256) the manifest says.

    Raises:
        IntegrityError: a file is missing, or differs.
    """
    for name in manifest.referenced_files():
        record = manifest.files.get(name)
        if record is None:
            raise IntegrityError(f"{name} is used by the manifest but not listed in its files")
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; export the model again")
        size = path.stat().st_size
        if size != record.bytes:
            raise IntegrityError(
                f"{path} has {size} bytes, expected {record.bytes}; export the model again"
            )
        if sha256 and (found := file_sha256(path)) != record.sha256:
            raise IntegrityError(
                f"{path} has sha256 {found[:16]}…, expected {record.sha256[:16]}…; "
                "the file was changed: export the model again"
            )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest into its place at once, for those that write a whole folder.

    Raises:
        OSError: the folder cannot be written; an old manifest stays in force.
    """
    temporary = folder / f".{MANIFEST_NAME}.partial"
    try:
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / MANIFEST_NAME)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes another manifest for a finished folder.

    Raises:
        OutputError: the folder cannot be written; the old manifest stays in force.
    """
    with writing(folder, "; it was left as it is"):
        write_manifest(folder, manifest)


def record_file(path: Path) -> FileRecord:
    """What the manifest keeps of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_inside(folder: Path, name: str) -> None:
    pure = PurePosixPath(name)
    root = folder.resolve()
    if pure.is_absolute() or "\\" in name or not _resolves_inside(root, name):
        raise UnsafePathError(
            f"{folder / MANIFEST_NAME}: path {name!r} leaves the engine folder; "
            "do not use this folder, export the model again"
        )


def _resolves_inside(root: Path, name: str) -> bool:
    try:
        return (root / name).resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError):  # too long, links in a circle, NUL bytes
        return False
