"""Builds one plan in a process of its own: `python -m adainfer_export.build.worker JOB REPORT`.

TensorRT's parser ends the whole process on some graphs, and its memory grows from build to build.
JOB and REPORT are JSON files; see `Job` and `Outcome`.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adainfer_runtime.plans import BACKEND_MODULES, Backend

from .shared_tables import with_inputs

__all__ = ["Job", "Outcome", "peak_memory_bytes"]

_FUSED_ATTENTION = ("_mha", "fmha", "fused_attention")


@dataclass(frozen=True)
class Job:
    """One plan to build. `profiles` maps inputs to [smallest, usual, largest] shapes; `tables` are
    initialisers that become inputs.
    """

    backend: Backend
    onnx: str
    plan: str
    sm: tuple[int, ...]
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    optimisation_level: int
    timing_cache: str | None = None
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of it: `error` is one line, or None where the plan was written.

    `unused_inputs` are inputs that the parser drops without refusing the graph. `fused_attention`
    and `float8_products` count kernels, of all profiles.
    """

    error: str | None
    unused_inputs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    fused_attention: int = 0
    float8_products: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


def main() -> None:
    """Reads the job, builds, writes the report."""
    job_path, report_path = map(Path, sys.argv[1:3])
    job = Job(**json.loads(job_path.read_text(encoding="utf-8")))
    start = time.perf_counter()
    trt = importlib.import_module(BACKEND_MODULES[job.backend])
    outcome = _build(trt, job)
    seconds = time.perf_counter() - start
    report = {**asdict(outcome), "seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
    report_path.write_text(json.dumps(report), encoding="utf-8")


def peak_memory_bytes() -> int:
    """Largest resident memory of this process: not `ru_maxrss`, in which Linux counts the process
    that started this one as well.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _build(trt: Any, job: Job) -> Outcome:
    log = _make_log(trt)
    try:
        return _build_with(trt, job, log)
    except _RefusedError as error:
        said = f": {_one_line(' '.join(log.errors))}" if log.errors else ""
        return Outcome(f"{error}{said}")


def _build_with(trt: Any, job: Job, log: Any) -> Outcome:
    builder = trt.Builder(log)
    # TensorRT 11 knows strongly typed networks alone, and no flag for them.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    if network is None:
        raise _RefusedError("it makes no network")
    parser = trt.OnnxParser(network, log)
    if not _parse(parser, job):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return Outcome(f"the parser refuses it: {_one_line(' '.join(reasons))}")
    config = builder.create_builder_config()
    if config is None:
        raise _RefusedError("it makes no builder configuration")
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = job.optimisation_level
    if job.backend == "tensorrt-rtx":
        _set_capabilities(trt, config, job.sm)
    # TensorRT-RTX: nothing is allocated while a plan runs, which a CUDA graph could not record.
    if (strict := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(strict)
    for number, shapes in enumerate(job.profiles):
        if config.add_optimization_profile(_profile(builder, network, shapes)) < 0:
            raise _RefusedError(f"profile {number} is refused")
    cache = _attach_cache(config, job, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _RefusedError("the builder refuses it")
    Path(job.plan).write_bytes(memoryview(plan))
    if cache is not None and job.timing_cache is not None:
        _write_cache(Path(job.timing_cache), memoryview(cache.serialize()))
    return Outcome(
        None,
        tuple(log.unused),
        tuple(log.warnings[:10]),
        fused_attention=log.fused_attention,
        float8_products=log.float8_products,
    )


def _parse(parser: Any, job: Job) -> bool:
    if not job.tables:
        return bool(parser.parse_from_file(job.onnx))
    model = with_inputs(Path(job.onnx), job.tables)
    return bool(parser.parse(model.SerializeToString(), job.onnx))  # weights lie beside that file


class _RefusedError(Exception):
    """TensorRT said no; why is in its log."""


def _set_capabilities(trt: Any, config: Any, sm: tuple[int, ...]) -> None:
    config.num_compute_capabilities = len(sm)
    for index, number in enumerate(sm):
        capability = getattr(trt.ComputeCapability, f"SM{number}", None)
        # The setter answers False where the capability is not supported; a build then crashes.
        if capability is None or not config.set_compute_capability(capability, index):
            raise _RefusedError(f"TensorRT-RTX {trt.__version__} does not build for SM {number}")


def _profile(builder: Any, network: Any, shapes: Mapping[str, Any]) -> Any:
    profile = builder.create_optimization_profile()
    if profile is None:
        raise _RefusedError("it makes no profile")
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 not in tuple(tensor.shape):
            continue
        if tensor.name not in shapes:
            raise _RefusedError(f"input {tensor.name} has no shapes; export the model again")
        given = [tuple(shape) for shape in shapes[tensor.name]]
        try:
            profile.set_shape(tensor.name, *given)
        except ValueError:
            raise _RefusedError(
                f"input {tensor.name} {list(tensor.shape)} does not take {given}"
            ) from None
    return profile


def _attach_cache(config: Any, job: Job, log: Any) -> Any:
    """The folder's timing cache; an empty one in place of one that TensorRT does not take, which a
    full disk or another driver may leave behind.
    """
    if job.timing_cache is None:
        return None
    path = Path(job.timing_cache)
    kept = path.read_bytes() if path.is_file() else b""
    cache = _try_cache(config, kept)
    if cache is None and kept:
        log.warnings.append(f"{path} is damaged or of another device: kernels are timed anew")
        cache = _try_cache(config, b"")
    return cache


def _try_cache(config: Any, content: bytes) -> Any:
    try:
        cache = config.create_timing_cache(content)
        return cache if cache is not None and config.set_timing_cache(cache, False) else None
    except (RuntimeError, ValueError, TypeError):  # the bindings' ways to say that it is no cache
        return None


def _write_cache(path: Path, content: memoryview) -> None:
    """Atomically: a build that is killed leaves the old one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)


def _make_log(trt: Any) -> Any:
    severity = trt.ILogger.Severity
    wrong = (severity.ERROR, severity.INTERNAL_ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what matters of a verbose build log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.unused: list[str] = []
            self.fused_attention = 0
            self.float8_products = 0

        def log(self, level: Any, message: str) -> None:
            if level in wrong:
                self.errors.append(message)
            elif level == severity.WARNING:
                if "unused input" in message.lower():
                    self.unused.append(_one_line(message))
                elif "Int64 binding" not in message:
                    self.warnings.append(_one_line(message))
            # The layer list of the finished engine, one line per kernel.
            for line in message.splitlines():
                if "LayerType:" not in line:
                    continue
                kernel, kind = (
                    line.partition(key)[2].partition(",")[0] for key in ("Name: ", "LayerType: ")
                )
                if any(mark in kernel for mark in _FUSED_ATTENTION):
                    self.fused_attention += 1
                if "gemm" in kind.lower() and line.count("Datatype: FP8") > 1:  # both operands
                    self.float8_products += 1

    return Log()


def _one_line(text: str, limit: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


if __name__ == "__main__":
    main()
