"""TensorRT: plans chained on one stream, the cache updated in place, decode in CUDA graphs.

`PlanStage` is all of the logic; what needs a GPU is behind `Plan` and `GraphDriver`, of which the
real ones are as thin as they can be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..devices import find_gpu
from ..errors import DeviceError, StageError
from ..manifest import Manifest
from ..plans import PLAN_FOLDER, BuildStamp, engine_files, find_stamp
from .cuda_driver import CudaDriver
from .device_backend import DeviceBackend
from .device_memory import ALIGNMENT, DeviceDriver
from .device_sequence import BoundRun

__all__ = ["GraphDriver", "Plan", "PlanLoader", "PlanStage", "PlanStages", "load"]

_MODULES = ("tensorrt", "tensorrt_rtx")


class GraphDriver(DeviceDriver, Protocol):
    """A driver that can record what is put onto its stream."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records `work` as a graph; the call replays it with the same addresses."""


class Plan(Protocol):
    """A deserialised plan with one execution context per profile."""

    def inputs(self) -> tuple[str, ...]:
        """Names of its inputs."""

    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs."""

    def alias_of(self, output: str) -> str | None:
        """The input that an output is updated in place of."""

    def profiles(self) -> int:
        """Number of profiles; the first is for one position."""

    def accepts(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an input's shape lies within a profile."""

    def set_input_shape(self, profile: int, name: str, shape: tuple[int, ...]) -> None:
        """Raises `StageError` where it is refused."""

    def set_address(self, profile: int, name: str, address: int) -> None:
        """Raises `StageError` where it is refused."""

    def enqueue(self, profile: int) -> None:
        """Puts one run onto the stream."""


class PlanLoader(Protocol):
    """Deserialises plans."""

    def load(self, path: Path) -> Plan:
        """Raises `StageError` where TensorRT refuses the file."""


@dataclass
class PlanStages:
    """The plans of a stamp, each loaded on first use."""

    folder: Path
    stamp: BuildStamp
    loader: PlanLoader
    driver: GraphDriver

    def __post_init__(self) -> None:
        self._loaded: dict[str, PlanStage] = {}

    def load(self, file: str) -> PlanStage:
        """The plan of an ONNX file."""
        if file not in self._loaded:
            path = self.folder / PLAN_FOLDER / self.stamp.name / self.stamp.plans[file].file
            self._loaded[file] = PlanStage(file, self.loader.load(path), self.driver)
        return self._loaded[file]


class PlanStage:
    """See `device_sequence.LoadedStage`."""

    def __init__(self, name: str, plan: Plan, driver: GraphDriver) -> None:
        self._name = name
        self._plan = plan
        self._driver = driver
        self._set: dict[int, BoundRun] = {}

    def bind(self, run: BoundRun) -> Callable[[], None]:
        """Checks names, shapes, alignment and aliases; the addresses are set when it first runs."""
        self._check_names(run)
        self._check_places(run)
        self._check_aliases(run)
        profile = self._profile(run)
        if run.repeatable:
            return _Recorded(lambda: self._enqueue(run, profile), self._driver)
        return lambda: self._enqueue(run, profile)

    def _enqueue(self, run: BoundRun, profile: int) -> None:
        if self._set.get(profile) is not run:  # of one sequence, once
            for name, tensor in run.inputs.items():
                self._plan.set_input_shape(profile, name, tensor.shape)
            for name, tensor in (*run.inputs.items(), *run.outputs.items()):
                self._plan.set_address(profile, name, tensor.address)
            self._set[profile] = run
        self._plan.enqueue(profile)

    def _check_names(self, run: BoundRun) -> None:
        for kind, wanted, given in (
            ("inputs", self._plan.inputs(), run.inputs),
            ("outputs", self._plan.outputs(), run.outputs),
        ):
            if set(wanted) != set(given):
                raise StageError(
                    f"{self._name}: the plan has {kind} {', '.join(sorted(wanted))}, the manifest "
                    f"{', '.join(sorted(given))}; build the plans again"
                )

    def _check_places(self, run: BoundRun) -> None:
        for name, tensor in (*run.inputs.items(), *run.outputs.items()):
            if tensor.address % ALIGNMENT:
                raise StageError(
                    f"{self._name}: {name} at {tensor.address:#x} is not aligned to {ALIGNMENT}"
                )

    def _check_aliases(self, run: BoundRun) -> None:
        """A plan that wrote the cache elsewhere would run, and forget every earlier position."""
        for before, after in run.aliases:
            if (found := self._plan.alias_of(after)) != before:
                raise StageError(
                    f"{self._name}: TensorRT does not update {before} in place (it reports "
                    f"{found or 'no alias'} for {after}); use a TensorRT from 10.15 on, or export "
                    "with --target tensorrt-basic"
                )
            if run.inputs[before].address != run.outputs[after].address:
                raise StageError(f"{self._name}: {before} and {after} are bound to two places")

    def _profile(self, run: BoundRun) -> int:
        for profile in range(self._plan.profiles()):
            shapes = ((name, tensor.shape) for name, tensor in run.inputs.items())
            if all(self._plan.accepts(profile, name, shape) for name, shape in shapes):
                return profile
        shapes_text = ", ".join(f"{name} {list(t.shape)}" for name, t in run.inputs.items())
        raise StageError(f"{self._name}: no profile of the plan takes {shapes_text}")


class _Recorded:
    """Runs once as it is (TensorRT settles its shapes there), then as a graph."""

    def __init__(self, enqueue: Callable[[], None], driver: GraphDriver) -> None:
        self._enqueue = enqueue
        self._driver = driver
        self._graph: Callable[[], None] | None = None
        self._warm = False

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph()
        elif self._warm:
            self._graph = self._driver.record(self._enqueue)
            self._graph()
        else:
            self._enqueue()
            self._warm = True


def load(
    folder: Path, manifest: Manifest, *, threads: int | None, low_memory: bool | None
) -> DeviceBackend:
    """Loads the plans that were built for this device.

    Raises:
        DeviceError: no GPU, or TensorRT is not installed.
        PlanError: no plans for this TensorRT, GPU or folder.
    """
    gpu = find_gpu()
    if gpu is None:
        raise DeviceError(
            "device cuda: no NVIDIA GPU was found (no driver, or no device); use device cpu, "
            "and see `adainfer doctor`"
        )
    trt = _import_tensorrt()
    rtx = trt.__name__ == "tensorrt_rtx"
    stamp = find_stamp(
        folder,
        manifest,
        backend="tensorrt-rtx" if rtx else "tensorrt",
        version=str(trt.__version__),
        sm=gpu.sm,
    )
    driver = CudaDriver("tensorrt")
    stages = PlanStages(folder, stamp, _EngineLoader(trt, driver), driver)
    for file in engine_files(manifest):  # all of them: then the scratch buffer stays where it is
        stages.load(file)
    return DeviceBackend(manifest, stages, driver, stamp.max_rows)


def _import_tensorrt() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise DeviceError(
        "TensorRT's Python package is not installed: install that of your JetPack or CUDA, or "
        "pip install 'adainfer-export[tensorrt-rtx]'"
    )


class _EngineLoader:
    """Deserialises with the one runtime; contexts share one scratch buffer, for one stream runs
    one stage at a time.
    """

    def __init__(self, trt: Any, driver: CudaDriver) -> None:
        self._trt = trt
        self._driver = driver
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._scratch = (0, 0)

    def load(self, path: Path) -> Plan:
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise StageError(f"{path}: TensorRT refuses the plan; run `adainfer build` again")
        return _EnginePlan(self._trt, engine, self._driver, self)

    def scratch(self, size: int) -> tuple[int, int]:
        """Address and size of the shared scratch buffer, grown where it is too small."""
        if size > self._scratch[1]:
            if self._scratch[1]:
                self._driver.free(self._scratch[0])
            self._scratch = (self._driver.allocate(size), size)
        return self._scratch


class _EnginePlan:
    def __init__(self, trt: Any, engine: Any, driver: CudaDriver, loader: _EngineLoader) -> None:
        self._trt = trt
        self._engine = engine
        self._driver = driver
        self._loader = loader
        self._names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._contexts = [self._context(i) for i in range(engine.num_optimization_profiles)]

    def inputs(self) -> tuple[str, ...]:
        return self._of_mode(self._trt.TensorIOMode.INPUT)

    def outputs(self) -> tuple[str, ...]:
        return self._of_mode(self._trt.TensorIOMode.OUTPUT)

    def alias_of(self, output: str) -> str | None:
        ask = getattr(self._engine, "get_aliased_input_tensor", None)
        return ask(output) if ask is not None else None

    def profiles(self) -> int:
        return len(self._contexts)

    def accepts(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        bounds = zip(shape, tuple(low), tuple(high), strict=True)
        return all(least <= size <= most for size, least, most in bounds)

    def set_input_shape(self, profile: int, name: str, shape: tuple[int, ...]) -> None:
        if not self._contexts[profile].set_input_shape(name, shape):
            raise StageError(f"TensorRT refuses shape {list(shape)} of {name}")

    def set_address(self, profile: int, name: str, address: int) -> None:
        if not self._contexts[profile].set_tensor_address(name, address):
            raise StageError(f"TensorRT refuses the address of {name}")

    def enqueue(self, profile: int) -> None:
        context = self._contexts[profile]
        size = self._engine.get_device_memory_size_for_profile_v2(profile)
        context.set_device_memory(*self._loader.scratch(size))
        if not context.execute_async_v3(self._driver.stream):
            raise StageError("TensorRT could not run a stage; see its log")

    def _context(self, profile: int) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if not context.set_optimization_profile_async(profile, self._driver.stream):
            raise StageError(f"TensorRT refuses profile {profile}")
        # The scratch buffer must not move once a graph has recorded its address.
        self._loader.scratch(self._engine.get_device_memory_size_for_profile_v2(profile))
        return context

    def _of_mode(self, mode: Any) -> tuple[str, ...]:
        return tuple(n for n in self._names if self._engine.get_tensor_mode(n) == mode)
