"""What is missing is named, with what brings it."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from typer.testing import CliRunner

from adainfer_runtime.commands.app import build_app
from adainfer_runtime.devices import GpuInfo
from adainfer_runtime.doctor import Ability, Diagnosis, diagnose, module_version

ORIN = GpuInfo("Orin", 87, 8 << 30, "12.6")
H100 = GpuInfo("H100", 90, 80 << 30, "13.0")
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "cuda-python": "cuda.bindings"}


def machine(gpu=None, library=None, broken=(), **versions):
    """What doctor finds; `versions` of distributions and, under their usual distribution's name, of
    modules.
    """
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    modules = {MODULES[name]: names.pop(name) for name in MODULES.keys() & names.keys()}

    def version(name):
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return names[name]

    def module(name):
        if name in broken:
            raise ImportError("libnvinfer.so.10: cannot open shared\nobject file")
        return modules.get(name)

    return diagnose(lambda: gpu, version, lambda: library, module)


def look(gpu=None, library=None, broken=(), **versions):
    found = machine(gpu, library, broken, **versions)
    return {ability.what: ability.missing for ability in found.abilities}


def test_a_machine_with_nothing():
    missing = look()
    assert missing["run any target on the CPU"] == ("pip install 'adainfer-export[cpu]'",)
    assert "an NVIDIA GPU with its driver" in missing["run target ort-cuda on the GPU"]
    assert missing["build plans with TensorRT-RTX, without a GPU"] == (
        "pip install 'adainfer-export[tensorrt-rtx]'",
    )


def test_a_jetson_with_jetpack_6():
    missing = look(ORIN, tensorrt="10.3.0", cuda_python="12.6", onnxruntime="1.32", onnx="1.22")
    assert missing["build plans of target tensorrt-basic here"] == ()
    assert missing["run TensorRT plans on the GPU"] == ()
    assert missing["build plans of target tensorrt here"] == (
        "TensorRT 10.15 or later, found 10.3.0",
    )


def test_plans_are_built_with_onnx_alone_of_the_compiler():
    missing = look(ORIN, tensorrt="10.15.1", tensorrt_rtx="1.7.1", cuda_python="12.6")
    for target in ("tensorrt", "tensorrt-basic"):
        expected = ("pip install 'adainfer-export[tensorrt]'",)
        assert missing[f"build plans of target {target} here"] == expected
    expected = ("pip install 'adainfer-export[tensorrt-rtx]'",)
    assert missing["build plans with TensorRT-RTX, without a GPU"] == expected
    assert missing[RUN] == ()


def test_tensorrt_without_cudas_bindings_needs_no_onnxruntime():
    missing = look(ORIN, tensorrt="10.3.0")
    # Without the second part pip would bring one that is too new for this driver.
    expected = ("pip install 'adainfer-export[tensorrt]' 'cuda-python<13'",)
    assert missing["run TensorRT plans on the GPU"] == expected
    missing = look(ORIN, onnxruntime_gpu="1.31")
    expected = ("pip install 'adainfer-export[cuda]' 'cuda-python<13'",)
    assert missing["run target ort-cuda on the GPU"] == expected


@pytest.mark.parametrize("both", [False, True])
def test_the_two_runtimes_hold_one_module(both):
    extra = {"onnxruntime": "1.32"} if both else {}
    missing = look(ORIN, onnxruntime_gpu="1.31", cuda_python="12.6", **extra)
    found = missing["run target ort-cuda on the GPU"]
    assert bool(found) == both
    assert not both or "uninstall onnxruntime and onnxruntime-gpu" in found[0]


def test_libraries_that_onnxruntime_needs_are_named():
    versions = {"onnxruntime_gpu": "1.31", "cuda_python": "12.9"}
    assert look(ORIN, **versions)["run target ort-cuda on the GPU"] == ()
    found = look(ORIN, "libcudnn.so.9", **versions)["run target ort-cuda on the GPU"]
    assert found == ("libcudnn.so.9 of CUDA or cuDNN: pip install 'adainfer-export[cuda]'",)


RUN = "run TensorRT plans on the GPU"


@pytest.mark.parametrize(("gpu", "works"), [(ORIN, False), (H100, True)])
def test_cudas_bindings_are_not_newer_than_the_driver(gpu, works):
    """Newer ones answer every call with error 35; of the same major version they may be newer."""
    missing = look(gpu, tensorrt="10.15.1", cuda_python="13.5.0", onnxruntime_gpu="1.31")
    found = missing[RUN], missing["run target ort-cuda on the GPU"]
    assert found[0] == found[1]
    assert bool(found[0]) != works
    if not works:
        (text,) = found[0]
        assert text.startswith("cuda-python 13.5.0 needs a later driver than this one for CUDA 12")
        assert "pip install 'cuda-python<13'" in text
    assert look(gpu, tensorrt="10.15.1", cuda_python="12.9.4")[RUN] == ()


def test_tensorrt_rtx_runs_on_the_gpus_that_it_has():
    there = {"tensorrt_rtx": "1.7.1", "cuda_python": "12.6", "onnx": "1.22"}
    assert look(GpuInfo("RTX", 89, 1, "13.0"), **there)[RUN] == ()
    expected = "TensorRT-RTX has no plans for SM 90", "TensorRT with its Python package"
    found = look(H100, **there)[RUN]
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == [*expected]
    assert look(H100, **there, tensorrt="10.15.1")[RUN] == ()
    assert look(H100, **there)["build plans with TensorRT-RTX, without a GPU"] == ()


def test_a_package_that_cannot_be_loaded_is_not_one_that_is_missing():
    missing = look(ORIN, broken=("tensorrt",), cuda_python="12.6", onnx="1.22")
    text = "tensorrt cannot be loaded: libnvinfer.so.10: cannot open shared object file"
    assert missing[RUN] == missing["build plans of target tensorrt here"] == (text,)


def test_modules_are_looked_for_as_the_runtime_loads_them(tmp_path, monkeypatch):
    """Whatever distribution brought them: `tensorrt-cu12`, `cuda-bindings`, JetPack's own."""
    assert module_version("no_such_package.bindings") is None
    (tmp_path / "a_module").mkdir()
    for name, text in (("whole", "__version__ = '12.6.2'"), ("torn", "import no_such_library")):
        (tmp_path / "a_module" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert module_version("a_module.whole") == "12.6.2"
    assert module_version("a_module.absent") is None
    with pytest.raises(ImportError, match="no_such_library"):
        module_version("a_module.torn")


def test_the_command_prints_json():
    result = CliRunner().invoke(build_app(), ["doctor", "--json"])
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert {"system", "gpu", "packages", "abilities"} <= set(data)
    assert all({"what", "works", "missing"} == set(ability) for ability in data["abilities"])
    assert CliRunner().invoke(build_app(), ["doctor"]).exit_code == 0


def test_extras_are_printed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report = Diagnosis("Linux", "3.11", None, None, {}, (Ability("x", ("install 'a[cuda]'",)),))
    monkeypatch.setattr("adainfer_runtime.commands.doctor.diagnose", lambda: report)
    result = CliRunner().invoke(build_app(), ["doctor"])
    assert "install 'a[cuda]'" in result.output
