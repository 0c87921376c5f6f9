"""Plans through TensorRT's Python package: as thin as it can be, for it needs a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import StageError
from .cuda_driver import CudaDriver
from .kernel_cache import KernelCache
from .tensorrt_protocols import Plan, PlanContext

__all__ = ["EngineLoader", "EnginePlan"]


class EngineLoader:
    """Deserialises with the one runtime; contexts share scratch memory, for one stream runs one
    stage at a time.
    """

    def __init__(self, trt: Any, driver: CudaDriver, kernels: KernelCache | None) -> None:
        """`kernels` of TensorRT-RTX; they are saved when all plans are gone, or at exit."""
        self._trt = trt
        self._driver = driver
        self._kernels = kernels
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._scratch = (0, 0)
        if kernels is not None:
            weakref.finalize(self, kernels.save)

    def load(self, path: Path) -> Plan:
        """See `PlanLoader`."""
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise StageError(f"{path}: TensorRT refuses the plan; run `adainfer build` again")
        return EnginePlan(self._trt, engine, self._driver.stream, self.scratch, self._kernels)

    def scratch(self, size: int) -> tuple[int, int]:
        """Address and size of shared scratch memory of at least so many bytes.

        What is outgrown is kept: graphs and contexts hold its address.
        """
        if size > self._scratch[1]:
            self._scratch = (self._driver.allocate(size), size)
        return self._scratch


class EnginePlan:
    """TensorRT's engine as a `Plan`. What is constant of it is asked for once: stages whose places
    move are bound anew for every token.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        stream: int,
        scratch: Callable[[int], tuple[int, int]],
        kernels: KernelCache | None = None,
    ) -> None:
        self._trt = trt
        self._engine = engine
        self._stream = stream
        self._scratch = scratch
        self._kernels = kernels
        self._profiles = range(int(engine.num_optimization_profiles))
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self._inputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self._outputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.OUTPUT)
        # TensorRT before 10.15 has no aliases.
        alias = getattr(engine, "get_aliased_input_tensor", lambda output: None)
        self._aliases = {output: alias(output) or None for output in self._outputs}
        self._bounds = [
            {name: self._read_bounds(name, profile) for name in self._inputs}
            for profile in self._profiles
        ]
        for profile in self._profiles:  # so that the first context finds all it will need
            scratch(self._scratch_bytes(profile))

    def inputs(self) -> tuple[str, ...]:
        """See `Plan`."""
        return self._inputs

    def outputs(self) -> tuple[str, ...]:
        """See `Plan`."""
        return self._outputs

    def alias_of(self, output: str) -> str | None:
        """See `Plan`."""
        return self._aliases[output]

    def profiles(self) -> int:
        """See `Plan`."""
        return len(self._profiles)

    def accepts(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        """See `Plan`."""
        low, high = self._bounds[profile][name]
        if len(shape) != len(low):
            return False
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def context(self, profile: int, *, fixed_shapes: bool) -> PlanContext:
        """See `Plan`. Its scratch memory is set once: setting it again would change a context that
        was captured.
        """
        context = self._create(fixed_shapes=fixed_shapes)
        if not context.set_optimization_profile_async(profile, self._stream):
            raise StageError(f"TensorRT refuses profile {profile}")
        context.set_device_memory(*self._scratch(self._scratch_bytes(profile)))
        return _EngineContext(context, self._stream)

    def _create(self, *, fixed_shapes: bool) -> Any:
        """TensorRT-RTX compiles kernels while it runs, for each context unless they share a cache.
        Kernels for a context's very shapes it compiles beside the first runs, which a graph would
        not learn of: of fixed shapes they are compiled before.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if fixed_shapes:
            specialise = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = specialise.EAGER
        self._kernels.share(self._engine, config)
        return self._engine.create_execution_context(config)

    def _scratch_bytes(self, profile: int) -> int:
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def _read_bounds(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest shape."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            return shape, shape
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)


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
