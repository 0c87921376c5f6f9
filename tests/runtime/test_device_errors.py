"""Devices that are not there: one clear line, and the CPU still works."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from adainfer_export.build import BuildRequest, build_plans
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cuda import require_cuda_libraries, require_cuda_sessions
from adainfer_runtime.devices import find_gpu
from adainfer_runtime.errors import DeviceError, StageError
from adainfer_runtime.planning import machine, measure_times

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


def needs_gpu_and(module):
    """A machine with both; elsewhere the test is skipped."""
    there = find_gpu() is not None and importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not there, reason=f"needs an NVIDIA GPU, and {module}")


@pytest.mark.gpu
@needs_gpu_and("tensorrt")
@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_tensorrt_on_a_gpu_equals_its_graphs_on_the_cpu(tiny, target, precision):
    made = tiny("llama", target=target, precision=precision)
    manifest = made.engine.manifest
    build_plans(made.folder, manifest, BuildRequest("tensorrt", max_rows=16), SilentReporter())
    engine = Engine.load(made.folder, device="cuda")
    prompt = PROMPT * 6  # more than one pass
    mine = engine.generate(prompt, max_new_tokens=16, ignore_eos=True)
    assert mine.tokens == made.engine.generate(prompt, max_new_tokens=16, ignore_eos=True).tokens


@pytest.mark.gpu
@needs_gpu_and("cuda")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
def test_ort_cuda_on_a_gpu_equals_its_graphs_on_the_cpu(tiny, precision):
    made = tiny("llama", target="ort-cuda", precision=precision)
    engine = Engine.load(made.folder, device="cuda")
    mine = engine.generate(PROMPT, max_new_tokens=16, ignore_eos=True)
    if precision != "bf16":
        theirs = Engine.load(made.folder).generate(PROMPT, max_new_tokens=16, ignore_eos=True)
        assert mine.tokens == theirs.tokens


@pytest.mark.gpu
@needs_gpu_and("cuda")
def test_stage_times_on_a_gpu_are_what_its_planner_reads(tiny):
    made = tiny("llama", target="ort-cuda", precision="fp16")
    engine = Engine.load(made.folder, device="cuda")
    times = measure_times(engine, repeats=3)
    assert all(seconds > 0 for seconds in (*times.layer, times.step, times.probe))
    assert times.step > 4 * times.layer[0]  # a token is four layers and more
    assert machine(None, "cuda").device_class == engine.device_class
