"""One plan as a stage of the chain: what is bound to it is checked, then set where it changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from ..errors import StageError
from .device_memory import ALIGNMENT, Tensor
from .device_sequence import BoundRun
from .tensorrt_graphs import GraphRecorder, RecordedRun
from .tensorrt_protocols import Plan, PlanContext

__all__ = ["PlanStage"]


class PlanStage:
    """See `device_sequence.LoadedStage`.

    Runs that come again and again have a context of their own each: a graph holds what its context
    had when it was captured, and NVIDIA asks for one context per captured graph. All others share
    one per profile, which is told only what changed since its last run.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        recorder: GraphRecorder,
        tables: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """`tables` are inputs that are the same in every run: weights that plans share."""
        self._name = name
        self._plan = plan
        self._recorder = recorder
        self._tables = dict(tables)
        self._shared: dict[int, _Context] = {}

    def bind(self, run: BoundRun) -> Callable[[], None]:
        """Checks names, shapes, alignment and aliases."""
        if self._tables:
            run = replace(run, inputs={**run.inputs, **self._tables})
        self._check_names(run)
        self._check_places(run)
        self._check_aliases(run)
        profile = self._profile(run)
        if run.repeatable:
            return RecordedRun(self._name, lambda: self._own(profile, run), self._recorder)
        if profile not in self._shared:
            self._shared[profile] = _Context(self._plan.context(profile, fixed_shapes=False))
        shared = self._shared[profile]

        def call() -> None:
            shared.bind(run)
            shared.enqueue()

        return call

    def _own(self, profile: int, run: BoundRun) -> _Context:
        own = _Context(self._plan.context(profile, fixed_shapes=True))
        own.bind(run)
        return own

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
