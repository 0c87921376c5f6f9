"""Plans over TensorRT's Python package: scripted; and the names of the one that is installed."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

from adainfer_runtime.backends.device_memory import Tensor
from adainfer_runtime.backends.device_sequence import BoundRun
from adainfer_runtime.backends.kernel_cache import KernelCache
from adainfer_runtime.backends.tensorrt_engine import EngineLoader, EnginePlan
from adainfer_runtime.backends.tensorrt_graphs import GraphRecorder
from adainfer_runtime.backends.tensorrt_stage import PlanStage
from adainfer_runtime.errors import StageError

from .fake_device import FakeDriver


class ScriptedTensorRT:
    """As much of TensorRT's Python API as a plan needs; `calls` is what contexts were told."""

    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager")

    def __init__(self):
        self.calls = []
        self.told = []  # what contexts were created with
        self.caches = []
        self.fits = True  # a kernel cache of an earlier process

    def engine(self, sizes):
        return ScriptedEngine(self, sizes)

    def create(self, given):
        self.told.append(dict(vars(given)) if isinstance(given, RuntimeConfig) else given)
        context = SimpleNamespace()
        for name in (
            "set_optimization_profile_async",
            "set_device_memory",
            "execute_async_v3",
            "is_stream_capturable",
            "set_input_shape",
            "set_tensor_address",
        ):
            setattr(context, name, lambda *given, name=name: self.calls.append((name, *given)) or 1)
        return context


SHAPES = {"hidden": (1, -1, 4), "table": (8, 4), "past": (1, 16), "present": (1, 16)}


class ScriptedEngine:
    """Of hidden states, a static table and a cache that is updated in place; `asked` counts."""

    def __init__(self, trt, sizes):
        self._trt, self._sizes = trt, sizes
        self.asked = 0
        self.num_io_tensors = len(SHAPES)
        self.num_optimization_profiles = len(sizes)
        self.get_device_memory_size_for_profile_v2 = lambda profile: sizes[profile]
        self.create_execution_context = trt.create
        self.create_runtime_config = lambda: RuntimeConfig(trt)

    def _answer(self, value):
        self.asked += 1
        return value

    def get_tensor_name(self, index):
        return self._answer(list(SHAPES)[index])

    def get_tensor_mode(self, name):
        return self._answer("out" if name == "present" else "in")

    def get_tensor_shape(self, name):
        return self._answer(SHAPES[name])

    def get_aliased_input_tensor(self, name):
        return self._answer({"present": "past"}.get(name))

    def get_tensor_profile_shape(self, name, profile):
        assert name == "hidden", "static shapes have no profile of their own"
        most = 1 if profile == 0 else 16
        return self._answer([(1, 1, 4), (1, most, 4), (1, most, 4)])


class RuntimeConfig:
    """TensorRT-RTX's."""

    def __init__(self, trt):
        self._trt = trt
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy

    def create_runtime_cache(self):
        self._trt.caches.append(RuntimeCache(self._trt))
        return self._trt.caches[-1]

    def set_runtime_cache(self, cache):
        self.cache = cache


class RuntimeCache:
    """TensorRT-RTX's: bytes."""

    def __init__(self, trt):
        self._trt, self.content = trt, b""

    def deserialize(self, blob):
        self.content = blob if self._trt.fits else self.content
        return self._trt.fits

    def serialize(self):
        return self.content


def rtx_plan(trt, kernels, sizes=(1,)):
    return EnginePlan(trt, trt.engine(sizes), 7, lambda size: (0, size), kernels)


def test_scratch_memory_is_set_once_and_never_moves():
    trt, places = ScriptedTensorRT(), []

    def scratch(size):
        places.append(size)
        return 0x1000, max(places)

    plan = EnginePlan(trt, trt.engine([100, 300]), 7, scratch)
    assert places == [100, 300]  # all of it is known before the first context
    context = plan.context(0, fixed_shapes=True)
    for _ in range(3):
        context.enqueue()
    kinds = [kind for kind, *_ in trt.calls]
    assert kinds == [
        "set_optimization_profile_async",
        "set_device_memory",
        *3 * ["execute_async_v3"],
    ]
    assert ("set_device_memory", 0x1000, 300) in trt.calls
    assert context.capturable()
    assert trt.calls[-1] == ("is_stream_capturable", 7)
    assert trt.told == ["user"]


def test_what_is_constant_is_asked_for_once():
    """Of `tensorrt-basic` every layer is bound anew for every token."""
    trt, driver = ScriptedTensorRT(), FakeDriver()
    engine = trt.engine([1, 1])
    plan = EnginePlan(trt, engine, 7, lambda size: (0, size))
    stage, before = PlanStage("s", plan, GraphRecorder(driver)), engine.asked
    cache = Tensor(512, "float32", (1, 16))
    for rows in (1, 5, 1, 16):
        inputs = {
            "hidden": Tensor(256, "float32", (1, rows, 4)),
            "table": Tensor(1024, "float32", (8, 4)),
            "past": cache,
        }
        stage.bind(BoundRun(inputs, {"present": cache}, (("past", "present"),)))()
    assert engine.asked == before
    assert (plan.inputs(), plan.outputs()) == (("hidden", "table", "past"), ("present",))
    assert plan.alias_of("present") == "past"
    assert [plan.accepts(p, "hidden", (1, 5, 4)) for p in (0, 1)] == [False, True]
    assert not plan.accepts(1, "hidden", (5, 4))  # of another rank
    assert not plan.accepts(1, "table", (9, 4))


def test_tensorrt_before_10_15_has_no_aliases(monkeypatch):
    monkeypatch.delattr(ScriptedEngine, "get_aliased_input_tensor")
    trt = ScriptedTensorRT()
    plan = EnginePlan(trt, trt.engine([1]), 7, lambda size: (0, size))
    assert plan.alias_of("present") is None


def test_contexts_of_tensorrt_rtx_share_their_kernels(tmp_path):
    """Those of all plans."""
    trt, kernels = ScriptedTensorRT(), KernelCache(tmp_path / "kernels.cache")
    for plan in (rtx_plan(trt, kernels), rtx_plan(trt, kernels)):
        for fixed in (True, False):
            plan.context(0, fixed_shapes=fixed)
    assert len(trt.caches) == 1
    assert all(given["cache"] is trt.caches[0] for given in trt.told)
    assert {given["allocation"] for given in trt.told} == {"user"}
    # A graph would hold the kernels that stand in until those for the very shapes are compiled.
    strategies = [given["dynamic_shapes_kernel_specialization_strategy"] for given in trt.told]
    assert strategies == ["eager", "lazy"] * 2


def test_kernels_are_there_for_the_next_process(tmp_path):
    path = tmp_path / "kernels.cache"
    trt, kernels = ScriptedTensorRT(), KernelCache(path)
    kernels.save()  # nothing ran
    assert not path.exists()
    rtx_plan(trt, kernels).context(0, fixed_shapes=True)
    trt.caches[0].content = b"kernels"
    kernels.save()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kernels.cache"]
    later = ScriptedTensorRT()
    rtx_plan(later, again := KernelCache(path)).context(0, fixed_shapes=True)
    assert later.caches[0].content == path.read_bytes() == b"kernels"
    path.unlink()
    again.save()  # nothing new
    assert not path.exists()


def test_kernels_of_another_gpu_are_ignored_and_replaced(tmp_path):
    path = tmp_path / "kernels.cache"
    path.write_bytes(b"of another GPU")
    trt, kernels = ScriptedTensorRT(), KernelCache(path)
    trt.fits = False
    rtx_plan(trt, kernels).context(0, fixed_shapes=True)
    assert trt.caches[0].content == b""
    trt.caches[0].content = b"mine"
    kernels.save()
    assert path.read_bytes() == b"mine"


def test_kernels_that_cannot_be_kept_are_no_error(tmp_path):
    """A folder in their place: neither read nor replaced."""
    (tmp_path / "kernels.cache" / "x").mkdir(parents=True)
    for path in (tmp_path / "kernels.cache", tmp_path / "gone" / "kernels.cache"):
        trt, kernels = ScriptedTensorRT(), KernelCache(path)
        rtx_plan(trt, kernels).context(0, fixed_shapes=True)
        trt.caches[0].content = b"kernels"
        kernels.save()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kernels.cache"]


def loader_of(trt, kernels, engine):
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    trt.Runtime = lambda logger: runtime
    trt.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    driver = SimpleNamespace(stream=7, allocate=lambda size: 0x1000)
    return EngineLoader(trt, driver, kernels)


def test_kernels_are_saved_when_the_plans_are_given_up(tmp_path):
    path = tmp_path / "kernels.cache"
    path.with_suffix(".plan").write_bytes(b"plan")
    trt = ScriptedTensorRT()
    loader = loader_of(trt, KernelCache(path), trt.engine([8]))
    plan = loader.load(path.with_suffix(".plan"))
    plan.context(0, fixed_shapes=True)
    trt.caches[0].content = b"kernels"
    del loader
    gc.collect()
    assert not path.exists()  # a plan lives
    del plan
    gc.collect()
    assert path.read_bytes() == b"kernels"


def test_a_plan_that_tensorrt_refuses_is_named(tmp_path):
    (tmp_path / "x.plan").write_bytes(b"plan")
    loader = loader_of(ScriptedTensorRT(), None, None)
    with pytest.raises(StageError, match=r"x\.plan: TensorRT refuses the plan"):
        loader.load(tmp_path / "x.plan")


def test_the_installed_tensorrt_rtx_has_what_is_asked_of_it():
    rtx = pytest.importorskip("tensorrt_rtx")
    names = {
        rtx.ICudaEngine: (
            "create_execution_context create_runtime_config get_aliased_input_tensor "
            "get_device_memory_size_for_profile_v2 get_tensor_mode get_tensor_name "
            "get_tensor_profile_shape get_tensor_shape num_io_tensors num_optimization_profiles"
        ),
        rtx.IRuntimeConfig: (
            "create_runtime_cache dynamic_shapes_kernel_specialization_strategy "
            "set_execution_context_allocation_strategy set_runtime_cache"
        ),
        rtx.IRuntimeCache: "deserialize serialize",
        rtx.IExecutionContext: (
            "execute_async_v3 is_stream_capturable set_device_memory set_input_shape "
            "set_optimization_profile_async set_tensor_address"
        ),
        rtx.DynamicShapesKernelSpecializationStrategy: "EAGER LAZY",
        rtx.ExecutionContextAllocationStrategy: "USER_MANAGED",
        rtx.TensorIOMode: "INPUT OUTPUT",
    }
    for owner, wanted in names.items():
        assert [name for name in wanted.split() if not hasattr(owner, name)] == []
    strategy = rtx.IRuntimeConfig.__dict__["dynamic_shapes_kernel_specialization_strategy"]
    assert strategy.fset is not None
    assert rtx.__version__
