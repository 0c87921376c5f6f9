"""TensorRT plans of an engine folder, and the stamp that says what they were built for.

`plans/NAME/stamp.json` lies beside the plans of one build. A plan runs on the TensorRT version that
built it, and only for the ONNX files that it was built from: those of TensorRT on the model of GPU
that built them (its kernels are chosen by their time there), those of TensorRT-RTX on the families
that they were built for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .devices import GpuInfo
from .errors import PlanError
from .manifest import Manifest

__all__ = [
    "PLAN_FOLDER",
    "Backend",
    "BuildStamp",
    "PlanRecord",
    "PlanShapes",
    "check_plan",
    "engine_files",
    "find_stamp",
    "load_stamp",
    "stage_digest",
    "write_stamp",
]

PLAN_FOLDER = "plans"
_STAMP = "stamp.json"
Backend = Literal["tensorrt", "tensorrt-rtx"]

# Of one profile: smallest, usual and largest shape by input.
PlanShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class PlanRecord(BaseModel):
    """One plan. `source` is the digest of the ONNX file and the weights that it was built from;
    `fused_attention` and `float8_products` the numbers of fused attention kernels and of products
    of 8-bit floats that the build log names, in all profiles; `profiles` the shapes of each.
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
    profiles: tuple[PlanShapes, ...] = ()


class BuildStamp(BaseModel):
    """What the plans of one folder were built with.

    Attributes:
        sm: compute capabilities, such as 86; of `tensorrt` the one of the GPU that built them.
        gpu: its model (`GpuInfo.model`); None where none was there (`tensorrt-rtx`).
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
    folder: Path, manifest: Manifest, *, installed: Mapping[Backend, str], gpu: GpuInfo
) -> BuildStamp:
    """The stamp whose plans run here, with a current plan for every engine of the manifest.

    Args:
        installed: versions of TensorRT's packages; the first is preferred.

    Raises:
        PlanError: there is none; the message says what was found, and which command builds it.
    """
    stamps = [
        stamp
        for path in sorted((folder / PLAN_FOLDER).glob(f"*/{_STAMP}"))
        if (stamp := load_stamp(folder, path.parent.name)) is not None
    ]
    preferred = next(iter(installed))
    if not stamps:
        raise PlanError(f"{folder} has no TensorRT plans: {_build(folder, preferred)}")
    fitting = [s for backend in installed for s in stamps if s.backend == backend]
    fitting = [s for s in fitting if not _misfit(s, installed, gpu)]
    if not fitting:
        known = [stamp for stamp in stamps if stamp.backend in installed]
        found = "; ".join(_misfit(stamp, installed, gpu) for stamp in stamps)
        backend = known[0].backend if known else preferred
        here = " and ".join(f"{name} {version}" for name, version in installed.items())
        raise PlanError(
            f"{folder}: no plans for {here} on {gpu.model}, SM {gpu.sm} (found: {found}): "
            f"{_build(folder, backend)}"
        )
    problems = [_find_problem(folder, manifest, stamp) for stamp in fitting]
    for stamp, problem in zip(fitting, problems, strict=True):
        if problem is None:
            return stamp
    raise PlanError(f"{problems[0]}: {_build(folder, fitting[0].backend)}")


def check_plan(folder: Path, stamp: BuildStamp, file: str) -> Path:
    """The plan of an ONNX file, as it was built.

    Raises:
        PlanError: there is none, or it was changed.
    """
    record = stamp.plans.get(file)
    if record is None:
        raise PlanError(f"{folder}: the plan of {file} is missing: {_build(folder, stamp.backend)}")
    path = folder / PLAN_FOLDER / stamp.name / record.file
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != record.sha256:
        raise PlanError(
            f"{path} is not the plan that was built (its sha256 differs): remove it, then "
            f"{_build(folder, stamp.backend)}"
        )
    return path


def _misfit(stamp: BuildStamp, installed: Mapping[Backend, str], gpu: GpuInfo) -> str:
    """Why its plans do not run here, begun with its name; empty where they do."""
    if stamp.backend not in installed:
        return f"{stamp.name}, and {stamp.backend} is not installed"
    if installed[stamp.backend] != stamp.version or gpu.sm not in stamp.sm:
        return stamp.name
    if stamp.backend == "tensorrt" and stamp.gpu != gpu.model:
        return f"{stamp.name}, built on {stamp.gpu}"
    return ""


def _find_problem(folder: Path, manifest: Manifest, stamp: BuildStamp) -> str | None:
    for file in engine_files(manifest):
        record = stamp.plans.get(file)
        if record is None or record.source != stage_digest(manifest, file):
            what = "is missing" if record is None else "was built from another ONNX file"
            return f"{folder}: the plan of {file} {what}"
        path = folder / PLAN_FOLDER / stamp.name / record.file
        if not path.is_file() or path.stat().st_size != record.bytes:
            return f"{path} is missing or damaged"
    return None


def _build(folder: Path, backend: Backend) -> str:
    return f"run `adainfer build {folder} --backend {backend}` on this device"


def engine_files(manifest: Manifest) -> tuple[str, ...]:
    """Every ONNX file that a runtime executes: stages, adapters, classifiers, translators."""
    stages = [stage for stage in manifest.stages if stage.kind != "layers"]
    files = [stage.file for stage in (*stages, *manifest.layer_stages)]
    files += [point.adapter for point in manifest.exit_points.values() if point.adapter]
    files += [point.translate for point in manifest.context_points.values() if point.translate]
    files += [classifier.graph for classifier in manifest.classifiers]
    return tuple(dict.fromkeys(files))
