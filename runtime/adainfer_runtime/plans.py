"""TensorRT plans of an engine folder, and the stamp that says what they were built for.

`plans/NAME/stamp.json` lies beside the plans of one build. A plan runs on the TensorRT version and
the GPU family that it was built with, and only for the ONNX files that it was built from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import PlanError
from .manifest import Manifest

__all__ = [
    "PLAN_FOLDER",
    "BuildStamp",
    "PlanRecord",
    "engine_files",
    "find_stamp",
    "load_stamp",
    "stage_digest",
    "write_stamp",
]

PLAN_FOLDER = "plans"
_STAMP = "stamp.json"
Backend = Literal["tensorrt", "tensorrt-rtx"]


class PlanRecord(BaseModel):
    """One plan. `source` is the digest of the ONNX file and the weights that it was built from;
    `fused_attention` and `float8_products` the numbers of fused attention kernels and of products
    of 8-bit floats that the build log names, in all profiles.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    bytes: int
    sha256: str
    source: str
    seconds: float
    peak_memory_bytes: int
    fused_attention: int
    float8_products: int = 0


class BuildStamp(BaseModel):
    """What the plans of one folder were built with.

    Attributes:
        sm: compute capabilities, such as 86; of `tensorrt` the one of the GPU that built them.
        gpu: its name; None where none was there (`tensorrt-rtx`).
        max_rows: positions that one pass may carry: the prefill profile's largest.
        plans: by the ONNX file's path in the engine folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Backend
    version: str
    sm: tuple[int, ...]
    gpu: str | None = None
    max_rows: int
    optimisation_level: int
    single_profile: bool = False
    plans: dict[str, PlanRecord] = {}

    @property
    def name(self) -> str:
        """Name of the folder."""
        return "-".join([self.backend, self.version, *(f"sm{sm}" for sm in self.sm)])

    def same_build(self, other: BuildStamp) -> bool:
        """Whether plans of the other stamp may stand beside this one's."""
        mine, theirs = (stamp.model_dump(exclude={"plans"}) for stamp in (self, other))
        return mine == theirs


def stage_digest(manifest: Manifest, file: str) -> str:
    """Of an ONNX file and of all weight files (graphs share them)."""
    digest = hashlib.sha256()
    for name, record in sorted(manifest.files.items()):
        if name == file or name.endswith(".data"):
            digest.update(f"{name} {record.sha256}\n".encode())
    return digest.hexdigest()


def write_stamp(folder: Path, stamp: BuildStamp) -> None:
    """Replaces the stamp of `folder/plans/NAME` atomically."""
    place = folder / PLAN_FOLDER / stamp.name
    temporary = place / f".{_STAMP}.partial"
    temporary.write_text(stamp.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(place / _STAMP)


def load_stamp(folder: Path, name: str) -> BuildStamp | None:
    """The stamp of one build; None where it is missing or damaged."""
    try:
        data = json.loads((folder / PLAN_FOLDER / name / _STAMP).read_text(encoding="utf-8"))
        stamp = BuildStamp.model_validate(data)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError):
        return None
    return stamp if stamp.name == name else None


def find_stamp(
    folder: Path, manifest: Manifest, *, backend: Backend, version: str, sm: int
) -> BuildStamp:
    """The stamp whose plans run here, with a current plan for every engine of the manifest.

    Raises:
        PlanError: there is none; the message says what was found, and which command builds it.
    """
    command = f"run `adainfer build {folder} --backend {backend}` on this device"
    stamps = [
        stamp
        for path in sorted((folder / PLAN_FOLDER).glob(f"*/{_STAMP}"))
        if (stamp := load_stamp(folder, path.parent.name)) is not None
    ]
    if not stamps:
        raise PlanError(f"{folder} has no TensorRT plans: {command}")
    fitting = [s for s in stamps if (s.backend, s.version) == (backend, version) and sm in s.sm]
    if not fitting:
        found = ", ".join(stamp.name for stamp in stamps)
        raise PlanError(
            f"{folder}: no plans for {backend} {version} on SM {sm} (found: {found}): {command}"
        )
    stamp = fitting[0]
    for file in engine_files(manifest):
        record = stamp.plans.get(file)
        if record is None or record.source != stage_digest(manifest, file):
            what = "is missing" if record is None else "was built from another ONNX file"
            raise PlanError(f"{folder}: the plan of {file} {what}: {command}")
        path = folder / PLAN_FOLDER / stamp.name / record.file
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise PlanError(f"{path} is missing or damaged: {command}")
    return stamp


def engine_files(manifest: Manifest) -> tuple[str, ...]:
    """Every ONNX file that a runtime executes: stages, adapters, classifiers, translators."""
    stages = [stage for stage in manifest.stages if stage.kind != "layers"]
    files = [stage.file for stage in (*stages, *manifest.layer_stages)]
    files += [point.adapter for point in manifest.exit_points.values() if point.adapter]
    files += [point.translate for point in manifest.context_points.values() if point.translate]
    files += [classifier.graph for classifier in manifest.classifiers]
    return tuple(dict.fromkeys(files))
