"""Builds the plans of an engine folder: one at a time, each in a process of its own, resumable."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from adainfer_runtime.devices import RTX_SM, GpuInfo, find_gpu, least_sm
from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.errors import DeviceError
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.plans import (
    BACKEND_MODULES,
    DEFAULT_MAX_ROWS,
    DEFAULT_OPTIMISATION_LEVEL,
    PLAN_FOLDER,
    BuildStamp,
    PlanRecord,
    PlanShapes,
    SharedTable,
    engine_files,
    load_stamp,
    stage_digest,
    write_stamp,
)

from ..errors import BuildError
from .profiles import profiles_of
from .shared_tables import shared_tables
from .worker import Job, Outcome

__all__ = ["BuildReport", "BuildRequest", "PlanBuilder", "SubprocessBuilder", "build_plans"]

_RTX_DEFAULT = (86, 89, 120)
_NEEDS = {"tensorrt": (10, 15), "tensorrt-basic": (10, 3)}  # target: least TensorRT version
_INSTALL = {
    "tensorrt": "install the TensorRT of your CUDA or JetPack with its Python package",
    "tensorrt-rtx": "pip install 'adainfer-export[tensorrt-rtx]'",
}


class PlanReporter(Protocol):
    """Shows progress."""

    def begin(self, what: str, total: int) -> None:
        """A phase of `total` steps begins."""

    def step(self, detail: str = "") -> None:
        """One step of the phase is done."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        sm: compute capabilities (`tensorrt-rtx` alone; `tensorrt` builds for the GPU at hand);
            where empty, that of the GPU at hand, and where TensorRT-RTX has none for it or there is
            no GPU, those of `_RTX_DEFAULT` that have the folder's precision.
        stages: patterns of ONNX files, such as `layer_*`; all where empty.
        max_rows: positions that one pass may carry.
        single_profile: one profile for decoding and prompts (see `profiles_of`).
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    sm: tuple[int, ...] = ()
    stages: tuple[str, ...] = ()
    max_rows: int = DEFAULT_MAX_ROWS
    optimisation_level: int = DEFAULT_OPTIMISATION_LEVEL
    single_profile: bool = False


@dataclass(frozen=True)
class BuildReport:
    """What stands in the folder now: the stamp, and the files that were built and kept."""

    stamp: BuildStamp
    built: tuple[str, ...]
    kept: tuple[str, ...]
    warnings: tuple[str, ...]


class PlanBuilder(Protocol):
    """Builds one plan."""

    def version(self) -> str:
        """Of TensorRT."""

    def build(self, job: Job) -> Outcome:
        """Writes `job.plan`, or says why not."""


def build_plans(
    folder: Path,
    manifest: Manifest,
    request: BuildRequest,
    reporter: PlanReporter,
    builder: PlanBuilder | None = None,
    gpu: GpuInfo | None = None,
) -> BuildReport:
    """Builds what is missing or stale; an interrupted build goes on where it stopped.

    Raises:
        DeviceError: TensorRT, or the GPU that it needs, is not there.
        BuildError: a stage cannot be built; what was built before it is kept.
    """
    _check_target(manifest)
    builder = builder or SubprocessBuilder(request.backend)
    version = builder.version()
    _check_version(manifest, request, version)
    stamp = _new_stamp(manifest, request, version, gpu)
    place = folder / PLAN_FOLDER / stamp.name
    place.mkdir(parents=True, exist_ok=True)
    before = load_stamp(folder, stamp.name)
    known = dict(before.plans) if before is not None and before.same_build(stamp) else {}
    files = _select(manifest, request.stages)
    reporter.begin("building plans", len(files))
    built, kept, warnings = [], [], []
    for file in files:
        wanted = _Wanted(
            file,
            stage_digest(manifest, file),
            _shapes(manifest, file, stamp),
            shared_tables(folder, manifest, file),
        )
        if wanted.is_built(place, known.get(file)):
            kept.append(file)
        else:
            again = "; run `adainfer calibrate` again" if _is_calibrated(manifest, file) else ""
            outcome = _build_one(builder, folder, place, request, stamp, wanted, again)
            known[file] = _record(place, wanted, outcome)
            built.append(file)
            warnings += [f"{file}: {warning}" for warning in outcome.warnings]
        stamp = stamp.model_copy(update={"plans": dict(known)})
        write_stamp(folder, stamp)  # after each: what was built is not built again
        reporter.step(file)
    return BuildReport(stamp, tuple(built), tuple(kept), tuple(warnings))


@dataclass(frozen=True)
class _Wanted:
    """The plan that an ONNX file should have."""

    file: str
    source: str
    profiles: tuple[PlanShapes, ...]
    tables: tuple[SharedTable, ...]

    def is_built(self, place: Path, record: PlanRecord | None) -> bool:
        """Whether it stands there."""
        if record is None:
            return False
        found = (record.source, record.profiles, record.tables)
        path = place / record.file
        if found != (self.source, self.profiles, self.tables):
            return False
        return path.is_file() and path.stat().st_size == record.bytes


class SubprocessBuilder:
    """TensorRT in a process of its own, which a bad graph may kill."""

    def __init__(self, backend: Literal["tensorrt", "tensorrt-rtx"]) -> None:
        self._backend = backend
        if importlib.util.find_spec(BACKEND_MODULES[backend]) is None:
            raise DeviceError(
                f"{backend} is not installed ({BACKEND_MODULES[backend]}): {_INSTALL[backend]}"
            )

    def version(self) -> str:
        """Asked in a process of its own, too."""
        code = f"import {BACKEND_MODULES[self._backend]} as trt; print(trt.__version__)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DeviceError(f"{self._backend} cannot be loaded: {reason}")
        return done.stdout.strip().splitlines()[-1]

    def build(self, job: Job) -> Outcome:
        """Runs `worker`."""
        with tempfile.TemporaryDirectory() as scratch:
            paths = [Path(scratch) / name for name in ("job.json", "report.json")]
            paths[0].write_text(json.dumps(asdict(job)), encoding="utf-8")
            command = [sys.executable, "-m", "adainfer_export.build.worker", *map(str, paths)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if paths[1].is_file():
                data = json.loads(paths[1].read_text(encoding="utf-8"))
                data |= {key: tuple(data[key]) for key in ("unused_inputs", "warnings")}
                return Outcome(**data)
        if done.returncode < 0:
            return Outcome(f"TensorRT ended its process with signal {-done.returncode}")
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return Outcome(f"TensorRT's process failed: {lines[-1]}")


def _build_one(
    builder: PlanBuilder,
    folder: Path,
    place: Path,
    request: BuildRequest,
    stamp: BuildStamp,
    wanted: _Wanted,
    again: str,
) -> Outcome:
    file = wanted.file
    job = Job(
        backend=request.backend,
        onnx=str((folder / file).absolute()),
        plan=str(place.absolute() / f".{_plan_name(file)}.partial"),
        sm=stamp.sm,
        profiles=wanted.profiles,
        optimisation_level=request.optimisation_level,
        # Kernels are timed on the GPU: without one there is nothing to keep.
        timing_cache=str(place.absolute() / "timing.cache")
        if request.backend == "tensorrt"
        else None,
        tables=tuple(table.name for table in wanted.tables),
    )
    outcome = builder.build(job)
    if outcome.error is None and outcome.unused_inputs:
        outcome = Outcome(f"inputs are ignored: {'; '.join(outcome.unused_inputs)}{again}")
    if outcome.error is not None:
        Path(job.plan).unlink(missing_ok=True)
        raise BuildError(f"{folder / file}: {stamp.backend} {stamp.version}: {outcome.error}")
    Path(job.plan).replace(place / _plan_name(file))
    return outcome


def _shapes(manifest: Manifest, file: str, stamp: BuildStamp) -> tuple[PlanShapes, ...]:
    profiles = profiles_of(manifest, file, stamp.max_rows, single=stamp.single_profile)
    return tuple(
        {name: (s.smallest, s.usual, s.largest) for name, s in profile.items()}
        for profile in profiles
    )


def _is_calibrated(manifest: Manifest, file: str) -> bool:
    """Of a classifier or translator: those of earlier versions have inputs that they do not use."""
    files = {classifier.graph for classifier in manifest.classifiers}
    return file in files | {point.translate for point in manifest.context_points.values()}


def _record(place: Path, wanted: _Wanted, outcome: Outcome) -> PlanRecord:
    name = _plan_name(wanted.file)
    written = record_file(place / name)
    return PlanRecord(
        file=name,
        bytes=written.bytes,
        sha256=written.sha256,
        source=wanted.source,
        seconds=round(outcome.seconds, 2),
        peak_memory_bytes=outcome.peak_memory_bytes,
        fused_attention=outcome.fused_attention,
        float8_products=outcome.float8_products,
        profiles=wanted.profiles,
        tables=wanted.tables,
    )


def _plan_name(file: str) -> str:
    return file.replace("/", ".").removesuffix(".onnx") + ".plan"


def _select(manifest: Manifest, patterns: Sequence[str]) -> tuple[str, ...]:
    files = engine_files(manifest)
    if not patterns:
        return files
    found = tuple(
        file
        for file in files
        if any(fnmatch.fnmatch(Path(file).stem, pattern) for pattern in patterns)
    )
    if not found:
        names = ", ".join(Path(file).stem for file in files[:6])
        raise BuildError(
            f"no stage is named like {', '.join(patterns)}; there are {len(files)}: {names}, …"
        )
    return found


def _check_target(manifest: Manifest) -> None:
    if manifest.target not in _NEEDS:
        raise BuildError(
            f"engines for target {manifest.target} hold operators that TensorRT does not parse; "
            "export with --target tensorrt, or tensorrt-basic for TensorRT before 10.15"
        )


def _check_version(manifest: Manifest, request: BuildRequest, version: str) -> None:
    least = _NEEDS[manifest.target]
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if request.backend == "tensorrt" and found < least:
        raise BuildError(
            f"engines for target {manifest.target} need TensorRT {least[0]}.{least[1]}, found "
            f"{version}; export with --target tensorrt-basic"
        )


def _new_stamp(
    manifest: Manifest, request: BuildRequest, version: str, gpu: GpuInfo | None
) -> BuildStamp:
    least, name = least_sm(manifest.precision), None
    gpu = gpu or find_gpu()
    sm = request.sm or _rtx_families(gpu, least)
    if request.backend == "tensorrt":
        if gpu is None:
            raise DeviceError(
                "--backend tensorrt builds on the GPU that will run the plans, and none was found; "
                "run this on the device, or use --backend tensorrt-rtx"
            )
        sm, name = (gpu.sm,), gpu.model
        if request.sm and request.sm != sm:
            raise BuildError(f"--sm belongs to tensorrt-rtx: this GPU ({name}) has SM {gpu.sm}")
    if lacking := [str(number) for number in sm if number < least]:
        raise BuildError(
            f"precision {manifest.precision} needs SM {least} or later, not {', '.join(lacking)}; "
            f"export with --precision {'int4 or fp16' if least > least_sm('int4') else 'fp16'} for "
            "older GPUs"
        )
    return BuildStamp(
        backend=request.backend,
        version=version,
        sm=tuple(sorted(sm)),
        gpu=name,
        max_rows=min(request.max_rows, manifest.kv.max_length),
        optimisation_level=request.optimisation_level,
        single_profile=request.single_profile,
    )


def _rtx_families(gpu: GpuInfo | None, least: int) -> tuple[int, ...]:
    """What TensorRT-RTX builds for where nothing is asked for."""
    if gpu is not None and gpu.sm in RTX_SM:
        return (gpu.sm,)
    return tuple(number for number in _RTX_DEFAULT if number >= least)
