"""Devices that are not there: one clear line, and the CPU still works."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gpu_compare import compare, failures

from adainfer_export import ExportRequest, export
from adainfer_export.build import BuildRequest, build_plans
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine, certificate
from adainfer_runtime.backends.device_memory import Tensor
from adainfer_runtime.backends.device_sequence import BoundRun
from adainfer_runtime.backends.ort_cuda import (
    _SessionStage,
    open_stages,
    require_cuda_libraries,
    require_cuda_sessions,
)
from adainfer_runtime.certificate import certified_threshold, device_class, device_option
from adainfer_runtime.devices import GpuInfo, find_gpu
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.errors import DeviceError, ExitUnavailableError, StageError
from adainfer_runtime.manifest import (
    Certificate,
    CertificateLevel,
    ClassifierSpec,
    ExitPoint,
    ExitSpec,
)
from adainfer_runtime.planning import machine, measure_times
from adainfer_runtime.plans import engine_files

from ..needs import needs_gpu_for

PROMPT = [5, 17, 200, 43]


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt", "tensorrt-basic"])
def test_cuda_without_a_gpu(tiny, target):
    made = tiny("llama", target=target, precision="fp16")
    with pytest.raises(DeviceError, match="device cuda: no NVIDIA GPU was found") as caught:
        Engine.load(made.folder, device="cuda")
    assert "\n" not in str(caught.value)
    assert len(Engine.load(made.folder).generate(PROMPT, max_new_tokens=2).tokens) > 0


def test_targets_name_the_devices_that_they_run_on(tiny):
    made = tiny("llama")
    with pytest.raises(DeviceError, match="target 'ort-cpu' run on cpu, not on 'cuda'"):
        Engine.load(made.folder, device="cuda")


def test_device_classes_name_the_gpus_architecture(monkeypatch):
    assert device_class() == device_class("cpu")
    assert device_class().startswith("cpu-")
    assert device_option(device_class()) == ""
    orin = GpuInfo("Orin", 87, 8 << 30, "12.6")
    for gpu, name in ((orin, "gpu-sm87"), (None, "gpu-unknown")):
        monkeypatch.setattr(certificate, "find_gpu", lambda gpu=gpu: gpu)
        assert device_class("cuda") == name
        assert device_option(name) == " --device cuda"


def test_a_cpus_certificate_says_nothing_of_a_gpu():
    level = CertificateLevel(level=0.02, confidence=0.95, prompts=500, threshold=0.5)
    made = Certificate(
        target="tensorrt", precision="fp16", device_class="cpu-x86_64", data=(), levels=(level,)
    )
    assert certified_threshold(made, 0.02, "cpu-x86_64") == 0.5
    with pytest.raises(ExitUnavailableError, match=r"of cpu-x86_64, this is gpu-sm87.*cuda` here"):
        certified_threshold(made, 0.02, "gpu-sm87")


@pytest.mark.parametrize("providers", [["CPUExecutionProvider"], []])
def test_a_silent_fall_back_is_an_error(providers):
    with pytest.raises(StageError, match="ONNX Runtime's CUDA provider was not loaded"):
        require_cuda_sessions(Path("stages/layer_001.onnx"), providers)


def test_a_library_that_is_missing_is_named(tmp_path):
    """A package whose CUDA provider links to what is not there: here the provider itself."""
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="1.31.1")
    with pytest.raises(DeviceError, match=r"onnxruntime-gpu 1\.31\.1 needs .*\.so, which is not"):
        require_cuda_libraries(package)


def test_cuda_sessions_pass():
    require_cuda_sessions(Path("x"), ["CUDAExecutionProvider", "CPUExecutionProvider"])


class ScriptedRuntime:
    """ONNX Runtime whose CUDA provider leaves a node of one file to the CPU."""

    SessionOptions = staticmethod(
        lambda: SimpleNamespace(entries={}, add_session_config_entry=lambda *entry: None)
    )
    RunOptions = staticmethod(lambda: SimpleNamespace(add_run_config_entry=lambda *entry: None))

    def __init__(self, refused, providers=("CUDAExecutionProvider", "CPUExecutionProvider")):
        self._refused, self._providers = refused, providers
        self.opened = []

    def InferenceSession(self, path, options, providers):
        self.opened.append(path)
        if self._refused is not None and path.endswith(self._refused):
            raise RuntimeError("This session contains graph nodes that are assigned to the default")
        return SimpleNamespace(get_providers=lambda: list(self._providers))


def test_everything_that_may_run_is_checked_when_it_is_loaded(tiny):
    """Candidates, adapters and classifiers too: not in the middle of a request."""
    made = tiny("llama", target="ort-cuda", precision="fp16")
    manifest = made.engine.manifest
    classifier = ClassifierSpec(kind="own", graph="exit/own.onnx", state_size=3, features=())
    point = ExitPoint(exit_layer=2, adapter="adapters/layer_002.onnx")
    spec = ExitSpec(points=(point,), classifier=classifier, threshold=0.0, target_agreement=0.9)
    calibrated = manifest.model_copy(update={"exit": spec})
    fine = ScriptedRuntime(None)
    open_stages(made.folder, calibrated, fine, 0)
    names = {path.removeprefix(f"{made.folder}/") for path in fine.opened}
    assert names == set(engine_files(calibrated))
    for file in (manifest.candidates.file, point.adapter, classifier.graph):
        match = f"{file} cannot be run by ONNX Runtime's CUDA provider alone: This session contains"
        with pytest.raises(StageError, match=match):
            open_stages(made.folder, calibrated, ScriptedRuntime(file), 0)
    with pytest.raises(StageError, match=r"CUDA provider was not loaded .*runs on CPUExecution"):
        open_stages(made.folder, calibrated, ScriptedRuntime(None, ("CPUExecutionProvider",)), 0)


class CountingSession:
    """A session of ONNX Runtime that notes what is bound and what runs."""

    def __init__(self):
        self.bound, self.ran = [], []

    def io_binding(self):
        number = len(self.bound)
        self.bound.append([])
        note = self.bound[number].append
        return SimpleNamespace(
            number=number,
            bind_input=lambda *given: note(given),
            bind_output=lambda *given: note(given),
        )

    def run_with_iobinding(self, binding, options):
        self.ran.append(binding.number)


def test_runs_in_the_same_places_are_bound_once():
    session = CountingSession()
    stage = _SessionStage("stages/x.onnx", ScriptedRuntime(None), session)

    def run(address):
        x, y = Tensor(address, "float32", (1, 2)), Tensor(64, "bfloat16", (1,))
        stage.bind(BoundRun({"x": x}, {"y": y}))()

    for address in (256, 256, 512, 256):
        run(address)
    assert session.ran == [0, 0, 1, 0]
    assert session.bound[1] == [
        ("x", "cuda", 0, np.float32, (1, 2), 512),
        ("y", "cuda", 0, 16, (1,), 64),
    ]
    for address in range(1024, 1024 + 9 * 256, 256):
        run(address)
    run(256)  # forgotten by now
    assert session.ran[-1] == len(session.bound) - 1 == 11


class FailingSession(CountingSession):
    """Takes every binding, and fails."""

    def run_with_iobinding(self, binding, options):
        raise RuntimeError("CUDA failure 700:\nan illegal address")


def test_a_run_that_fails_on_a_gpu_names_its_stage():
    stage = _SessionStage("stages/x.onnx", ScriptedRuntime(None), FailingSession())
    run = stage.bind(BoundRun({}, {}))
    with pytest.raises(StageError, match=r"x\.onnx cannot be run .*: CUDA failure 700: an illegal"):
        run()


def each(*pairs, backend="tensorrt"):
    """Targets and precisions, each where the machine has what it takes."""
    return [pytest.param(*pair, marks=needs_gpu_for(*pair, backend)) for pair in pairs]


def exported(tiny, folder, target, precision):
    """A folder of its own: plans of another back end are not to be taken instead, and `tiny` loads
    on a CPU, which has no bf16.
    """
    export(ExportRequest(str(tiny("llama").checkpoint), folder, target=target, precision=precision))
    return folder


def check_on_gpu(tiny, folder, target, precision):
    """Prompts of several passes and decoded tokens equal those of the graphs on the CPU."""
    device = Engine.load(folder, device="cuda")
    half = "fp16" if precision == "bf16" else precision
    found = compare(device, tiny("llama", target=target, precision=half).engine)
    assert failures({"precision": precision, **found, "modes": {}}) == []


def build_here(folder, backend, sm=()):
    request = BuildRequest(backend, sm=sm, max_rows=16)
    build_plans(folder, load_manifest(folder), request, SilentReporter())


PLANNED = [("tensorrt", "fp16"), ("tensorrt", "bf16"), ("tensorrt", "int4")]
PLANNED += [("tensorrt-basic", "fp16"), ("tensorrt-basic", "int4")]
ORT = [("ort-cuda", "fp16"), ("ort-cuda", "bf16"), ("ort-cuda", "int4")]


@pytest.mark.gpu
@pytest.mark.parametrize(("target", "precision"), each(*PLANNED))
def test_tensorrt_on_a_gpu_equals_its_graphs_on_the_cpu(tiny, tmp_path, target, precision):
    folder = exported(tiny, tmp_path / "engines", target, precision)
    build_here(folder, "tensorrt")
    check_on_gpu(tiny, folder, target, precision)


@pytest.mark.gpu
@pytest.mark.parametrize(("target", "precision"), each(*PLANNED, backend="tensorrt-rtx"))
def test_tensorrt_rtx_on_a_gpu_equals_its_graphs_on_the_cpu(tiny, tmp_path, target, precision):
    folder = exported(tiny, tmp_path / "engines", target, precision)
    build_here(folder, "tensorrt-rtx", sm=(find_gpu().sm,))
    check_on_gpu(tiny, folder, target, precision)


@pytest.mark.gpu
@pytest.mark.parametrize(("target", "precision"), each(*ORT))
def test_ort_cuda_on_a_gpu_equals_its_graphs_on_the_cpu(tiny, tmp_path, target, precision):
    folder = exported(tiny, tmp_path / "engines", target, precision)
    check_on_gpu(tiny, folder, target, precision)


@pytest.mark.gpu
@needs_gpu_for("ort-cuda")
def test_stage_times_on_a_gpu_are_what_its_planner_reads(tiny):
    made = tiny("llama", target="ort-cuda", precision="fp16")
    engine = Engine.load(made.folder, device="cuda")
    times = measure_times(engine, repeats=3)
    assert all(seconds > 0 for seconds in (*times.layer, times.step, times.probe))
    assert times.step > 4 * times.layer[0]  # a token is four layers and more
    assert machine(None, "cuda").device_class == engine.device_class
