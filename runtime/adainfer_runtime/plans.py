"""TensorRT plans of an engine folder, and the stamp that says what they were built for.

`plans/NAME/stamp.json` lies beside the plans of one build. A plan runs on the TensorRT version that
built it, and only for the ONNX files that it was built from: those of TensorRT on the model of GPU
that built them (its kernels are chosen by their time there), those of TensorRT-RTX on the families
that they were built for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .backends.layout import ITEM_BYTES
from .devices import RTX_SM, GpuInfo
from .errors import PlanError, one_line
from .manifest import Manifest

__all__ = [
    "BACKEND_MODULES",
    "DEFAULT_MAX_ROWS",
    "DEFAULT_OPTIMISATION_LEVEL",
    "PLAN_FOLDER",
    "Backend",
    "BuildStamp",
    "PlanRecord",
    "PlanShapes",
    "SharedTable",
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
# Their Python modules.
BACKEND_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Of `adainfer build`: what a command that repeats a build need not name.
DEFAULT_MAX_ROWS = 512
DEFAULT_OPTIMISATION_LEVEL = 3

# Of one profile: smallest, usual and largest shape by input.
PlanShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class SharedTable(BaseModel):
    """A matrix `shape` that a plan is given as its input `name`: `bytes` of a weight file of the
    folder, from `offset` on. Plans that name the same ones share it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    file: str
    offset: int
    bytes: int
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[int, ...]

    @property
    def place(self) -> tuple[str, int, int]:
        """Which bytes of which file."""
        return self.file, self.offset, self.bytes

    def lies_within(self, size: int) -> bool:
        """Whether it is so many bytes as its shape says, in a file of this size."""
        needed = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        return self.bytes == needed and 0 <= self.offset <= size - self.bytes


class PlanRecord(BaseModel):
    """One plan. `source` is the digest of the ONNX file and the weights that it was built from;
    `fused_attention` and `float8_products` the numbers of fused attention kernels and of products
    of 8-bit floats that the build log names, in all profiles; `profiles` the shapes of each;
    `tables` the weights that it is given as inputs, and does not hold.
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
    tables: tuple[SharedTable, ...] = ()


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

    @property
    def profile_options(self) -> tuple[str, ...]:
        """Options of `adainfer build` that give plans like these, on whatever GPU."""
        options = ["--single-profile"] if self.single_profile else []
        if self.max_rows != DEFAULT_MAX_ROWS:
            options.append(f"--max-rows {self.max_rows}")
        if self.optimisation_level != DEFAULT_OPTIMISATION_LEVEL:
            options.append(f"--optimisation-level {self.optimisation_level}")
        return tuple(options)

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
    if not stamps:
        raise PlanError(f"{folder} has no TensorRT plans: {_first_build(folder, installed, gpu)}")
    fitting = [s for backend in installed for s in stamps if s.backend == backend]
    fitting = [s for s in fitting if not _misfit(s, installed, gpu)]
    if not fitting:
        found = "; ".join(_misfit(stamp, installed, gpu) for stamp in stamps)
        here = " and ".join(f"{name} {version}" for name, version in installed.items())
        raise PlanError(
            f"{folder}: no plans for {here} on {gpu.model}, SM {gpu.sm} (found: {found}): "
            f"{_first_build(folder, installed, gpu, stamps)}"
        )
    problems = [_find_problem(folder, manifest, stamp) for stamp in fitting]
    for stamp, problem in zip(fitting, problems, strict=True):
        if problem is None:
            return stamp
    raise PlanError(f"{problems[0]}: {_build_again(folder, fitting[0])}")


def check_plan(folder: Path, stamp: BuildStamp, file: str) -> Path:
    """The plan of an ONNX file, as it was built.

    Raises:
        PlanError: there is none, it cannot be read, or it was changed.
    """
    record = stamp.plans.get(file)
    if record is None:
        raise PlanError(f"{folder}: the plan of {file} is missing: {_build_again(folder, stamp)}")
    path = folder / PLAN_FOLDER / stamp.name / record.file
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:  # a plan may be loaded long after the stamp was read
        raise PlanError(
            f"{path} cannot be read ({error.strerror or one_line(error)}): "
            f"{_build_again(folder, stamp)}"
        ) from None
    if digest != record.sha256:
        raise PlanError(
            f"{path} is not the plan that was built (its sha256 differs): remove it, then "
            f"{_build_again(folder, stamp)}"
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
        for table in record.tables:
            weights = manifest.files.get(table.file)
            if weights is None or not table.lies_within(weights.bytes):
                return f"{folder}: the plan of {file} reads {table.file}, which is not what it was"
        path = folder / PLAN_FOLDER / stamp.name / record.file
        if not path.is_file() or path.stat().st_size != record.bytes:
            return f"{path} is missing or damaged"
    return None


def _first_build(
    folder: Path, installed: Mapping[Backend, str], gpu: GpuInfo, stamps: Sequence[BuildStamp] = ()
) -> str:
    """What gives plans for this GPU: in the form of those for another one or version, if any."""
    usable = [name for name in installed if name == "tensorrt" or gpu.sm in RTX_SM]
    if not usable:
        return (
            f"TensorRT-RTX has no plans for this GPU (SM {gpu.sm}); install the TensorRT of your "
            "CUDA or JetPack with its Python package, then "
            f"{_command(folder, 'tensorrt', _options_of(stamps))}"
        )
    known = [stamp for stamp in stamps if stamp.backend in usable]
    backend = known[0].backend if known else usable[0]
    same = [stamp for stamp in known if stamp.backend == backend]
    if backend == "tensorrt":
        return _command(folder, backend, _options_of(same))
    families = next((stamp.sm for stamp in same if gpu.sm in stamp.sm), (gpu.sm,))
    return _command(folder, backend, _options_of(same), families)


def _build_again(folder: Path, stamp: BuildStamp) -> str:
    """What mends a build, and keeps the plans of it that are current."""
    sm = stamp.sm if stamp.backend == "tensorrt-rtx" else ()
    return _command(folder, stamp.backend, stamp.profile_options, sm)


def _options_of(stamps: Sequence[BuildStamp]) -> tuple[str, ...]:
    return stamps[0].profile_options if stamps else ()


def _command(
    folder: Path, backend: Backend, options: tuple[str, ...], sm: tuple[int, ...] = ()
) -> str:
    """`sm` of TensorRT-RTX, which does not build for the GPU at hand alone."""
    families = (f"--sm {','.join(map(str, sm))}",) if sm else ()
    line = " ".join(("adainfer build", str(folder), *options, *families, "--backend", backend))
    return f"run `{line}` on this device"


def engine_files(manifest: Manifest) -> tuple[str, ...]:
    """Every ONNX file that a runtime executes: stages, adapters, classifiers, translators."""
    stages = [stage for stage in manifest.stages if stage.kind != "layers"]
    files = [stage.file for stage in (*stages, *manifest.layer_stages)]
    files += [point.adapter for point in manifest.exit_points.values() if point.adapter]
    files += [point.translate for point in manifest.context_points.values() if point.translate]
    files += [classifier.graph for classifier in manifest.classifiers]
    return tuple(dict.fromkeys(files))
