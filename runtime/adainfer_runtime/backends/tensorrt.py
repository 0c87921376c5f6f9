"""TensorRT: plans chained on one stream, the cache updated in place, decode in CUDA graphs.

`PlanStage` is all of the logic; what needs a GPU is behind `Plan` and `GraphDriver`, of which the
real ones are as thin as they can be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..devices import find_gpu
from ..errors import DeviceError, StageError
from ..manifest import Manifest
from ..plans import Backend, BuildStamp, check_plan, engine_files, find_stamp
from .cuda_driver import CudaDriver
from .device_backend import DeviceBackend
from .device_memory import ALIGNMENT, DeviceDriver
from .device_sequence import BoundRun

__all__ = [
    "EnginePlan",
    "GraphDriver",
    "Plan",
    "PlanContext",
    "PlanLoader",
    "PlanStage",
    "PlanStages",
    "installed_modules",
    "load",
]

_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class GraphDriver(DeviceDriver, Protocol):
    """A driver that can record what is put onto its stream."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records `work` as a graph; the call replays it with the same addresses."""


class PlanContext(Protocol):
    """An execution context of one profile."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `StageError` where it is refused."""

    def set_address(self, name: str, address: int) -> None:
        """Raises `StageError` where it is refused."""

    def enqueue(self) -> None:
        """Puts one run onto the stream."""

    def capturable(self) -> bool:
        """Whether a run with these shapes may be recorded as a CUDA graph."""


class Plan(Protocol):
    """A deserialised plan."""

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

    def context(self, profile: int) -> PlanContext:
        """A new execution context."""


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
        """The plan of an ONNX file.

        Raises:
            PlanError: the file is not the one that was built: a plan is machine code.
        """
        if file not in self._loaded:
            path = check_plan(self.folder, self.stamp, file)
            self._loaded[file] = PlanStage(file, self.loader.load(path), self.driver)
        return self._loaded[file]


class PlanStage:
    """See `device_sequence.LoadedStage`.

    Runs that come again and again have a context of their own each: a graph holds what its context
    had when it was captured, and NVIDIA asks for one context per captured graph. All others share
    one per profile, which is told only what changed since its last run.
    """

    def __init__(self, name: str, plan: Plan, driver: GraphDriver) -> None:
        self._name = name
        self._plan = plan
        self._driver = driver
        self._shared: dict[int, _Context] = {}

    def bind(self, run: BoundRun) -> Callable[[], None]:
        """Checks names, shapes, alignment and aliases."""
        self._check_names(run)
        self._check_places(run)
        self._check_aliases(run)
        profile = self._profile(run)
        if run.repeatable:
            own = _Context(self._plan.context(profile))
            own.bind(run)
            return _Recorded(own, self._driver)
        if profile not in self._shared:
            self._shared[profile] = _Context(self._plan.context(profile))
        shared = self._shared[profile]

        def call() -> None:
            shared.bind(run)
            shared.enqueue()

        return call

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


class _Context:
    """Sets the shapes and addresses that differ from those of the last run."""

    def __init__(self, context: PlanContext) -> None:
        self._context = context
        self._run: BoundRun | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def bind(self, run: BoundRun) -> None:
        if run is self._run:
            return
        self._run = None  # until all is set
        for name, tensor in run.inputs.items():
            if self._shapes.get(name) != tensor.shape:
                self._context.set_input_shape(name, tensor.shape)
                self._shapes[name] = tensor.shape
        for name, tensor in (*run.inputs.items(), *run.outputs.items()):
            if self._addresses.get(name) != tensor.address:
                self._context.set_address(name, tensor.address)
                self._addresses[name] = tensor.address
        self._run = run

    def enqueue(self) -> None:
        self._context.enqueue()

    def capturable(self) -> bool:
        return self._context.capturable()


class _Recorded:
    """Runs once as it is, then as a graph.

    TensorRT settles shapes in the first run after they were set, which a capture must not see; its
    context is bound once and used by nothing else, so that run is the first one.
    """

    def __init__(self, context: _Context, driver: GraphDriver) -> None:
        self._context = context
        self._driver = driver
        self._runs = 0
        self._graph: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self._runs == 1 and self._context.capturable():
            self._graph = self._driver.record(self._context.enqueue)
        self._runs += 1
        if self._graph is not None:
            self._graph()
        else:
            self._context.enqueue()


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
    modules = installed_modules()
    versions = {backend: str(module.__version__) for backend, module in modules.items()}
    stamp = find_stamp(folder, manifest, installed=versions, gpu=gpu)
    driver = CudaDriver("tensorrt")
    loader = _EngineLoader(modules[stamp.backend], driver)
    stages = PlanStages(folder, stamp, loader, driver)
    for file in engine_files(manifest):
        # The plan for candidate tokens holds the LM head once more: loaded where one asks for it.
        if file != manifest.candidates.file:
            stages.load(file)
    return DeviceBackend(manifest, stages, driver, stamp.max_rows)


def installed_modules() -> dict[Backend, Any]:
    """TensorRT's Python packages here, by the back end whose plans they run.

    Raises:
        DeviceError: there is none.
    """
    found = {}
    for backend, name in _MODULES.items():
        with suppress(ImportError):
            found[backend] = importlib.import_module(name)
    if not found:
        raise DeviceError(
            "TensorRT's Python package is not installed: install that of your JetPack or CUDA, or "
            "pip install 'adainfer-export[tensorrt-rtx]'"
        )
    return found


class _EngineLoader:
    """Deserialises with the one runtime; contexts share scratch memory, for one stream runs one
    stage at a time.
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
        return EnginePlan(self._trt, engine, self._driver.stream, self.scratch)

    def scratch(self, size: int) -> tuple[int, int]:
        """Address and size of shared scratch memory of at least so many bytes.

        What is outgrown is kept: graphs and contexts hold its address.
        """
        if size > self._scratch[1]:
            self._scratch = (self._driver.allocate(size), size)
        return self._scratch


class EnginePlan:
    """TensorRT's engine as a `Plan`."""

    def __init__(
        self, trt: Any, engine: Any, stream: int, scratch: Callable[[int], tuple[int, int]]
    ) -> None:
        self._trt = trt
        self._engine = engine
        self._stream = stream
        self._scratch = scratch
        self._runtime_cache: Any = None
        self._names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for profile in range(self.profiles()):  # so that the first context finds all it will need
            scratch(self._scratch_bytes(profile))

    def inputs(self) -> tuple[str, ...]:
        """See `Plan`."""
        return self._of_mode(self._trt.TensorIOMode.INPUT)

    def outputs(self) -> tuple[str, ...]:
        """See `Plan`."""
        return self._of_mode(self._trt.TensorIOMode.OUTPUT)

    def alias_of(self, output: str) -> str | None:
        """See `Plan`; TensorRT before 10.15 has no aliases."""
        ask = getattr(self._engine, "get_aliased_input_tensor", None)
        return ask(output) if ask is not None else None

    def profiles(self) -> int:
        """See `Plan`."""
        return int(self._engine.num_optimization_profiles)

    def accepts(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        """See `Plan`."""
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        bounds = zip(shape, tuple(low), tuple(high), strict=True)
        return all(least <= size <= most for size, least, most in bounds)

    def context(self, profile: int) -> PlanContext:
        """See `Plan`. Its scratch memory is set once: setting it again would change a context that
        was captured.
        """
        context = self._create()
        if not context.set_optimization_profile_async(profile, self._stream):
            raise StageError(f"TensorRT refuses profile {profile}")
        context.set_device_memory(*self._scratch(self._scratch_bytes(profile)))
        return _EngineContext(context, self._stream)

    def _create(self) -> Any:
        """TensorRT-RTX compiles kernels for each context, unless they share a cache."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._trt, "IRuntimeCache"):
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if self._runtime_cache is None:
            self._runtime_cache = config.create_runtime_cache()
        config.set_runtime_cache(self._runtime_cache)
        return self._engine.create_execution_context(config)

    def _scratch_bytes(self, profile: int) -> int:
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def _of_mode(self, mode: Any) -> tuple[str, ...]:
        return tuple(n for n in self._names if self._engine.get_tensor_mode(n) == mode)


class _EngineContext:
    """See `PlanContext`."""

    def __init__(self, context: Any, stream: int) -> None:
        self._context = context
        self._stream = stream

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise StageError(f"TensorRT refuses shape {list(shape)} of {name}")

    def set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise StageError(f"TensorRT refuses the address of {name}")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise StageError("TensorRT could not run a stage; see its log")

    def capturable(self) -> bool:
        """TensorRT-RTX may allocate while it runs, unless a plan was built to leave all memory to
        its user (see `adainfer_export.build.worker`); it says so itself. TensorRT captures stages
        without data-dependent shapes, and these have none.
        """
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._stream))
