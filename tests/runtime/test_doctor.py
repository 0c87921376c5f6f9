"""What is missing is named, with what brings it."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from typer.testing import CliRunner

from adainfer_runtime.commands.app import build_app
from adainfer_runtime.devices import GpuInfo
from adainfer_runtime.doctor import Ability, Diagnosis, diagnose

ORIN = GpuInfo("Orin", 87, 8 << 30, "12.6")


def packages(versions):
    """`metadata.version` of a machine where these are installed, by their names."""

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    return version


def look(gpu=None, library=None, **versions):
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    found = diagnose(lambda: gpu, packages(names), lambda: library)
    return {ability.what: ability.missing for ability in found.abilities}


def test_a_machine_with_nothing():
    missing = look()
    assert missing["run any target on the CPU"] == ("pip install 'adainfer-export[cpu]'",)
    assert "an NVIDIA GPU with its driver" in missing["run target ort-cuda on the GPU"]
    assert missing["build plans with TensorRT-RTX, without a GPU"] == (
        "pip install 'adainfer-export[tensorrt-rtx]'",
    )


def test_a_jetson_with_jetpack_6():
    missing = look(ORIN, tensorrt="10.3.0", cuda_python="12.6", onnxruntime="1.32")
    assert missing["build plans of target tensorrt-basic here"] == ()
    assert missing["run TensorRT plans on the GPU"] == ()
    assert missing["build plans of target tensorrt here"] == (
        "TensorRT 10.15 or later, found 10.3.0",
    )


def test_tensorrt_without_cudas_bindings_needs_no_onnxruntime():
    missing = look(ORIN, tensorrt="10.3.0")
    expected = ("pip install 'adainfer-export[tensorrt]'",)
    assert missing["run TensorRT plans on the GPU"] == expected
    missing = look(ORIN, onnxruntime_gpu="1.31")
    assert missing["run target ort-cuda on the GPU"] == ("pip install 'adainfer-export[cuda]'",)


@pytest.mark.parametrize("both", [False, True])
def test_the_two_runtimes_hold_one_module(both):
    extra = {"onnxruntime": "1.32"} if both else {}
    missing = look(ORIN, onnxruntime_gpu="1.31", cuda_python="12.6", **extra)
    found = missing["run target ort-cuda on the GPU"]
    assert bool(found) == both
    assert not both or "uninstall onnxruntime and onnxruntime-gpu" in found[0]


def test_libraries_that_onnxruntime_needs_are_named():
    versions = {"onnxruntime_gpu": "1.31", "cuda_python": "13.0"}
    assert look(ORIN, **versions)["run target ort-cuda on the GPU"] == ()
    found = look(ORIN, "libcudnn.so.9", **versions)["run target ort-cuda on the GPU"]
    assert found == ("libcudnn.so.9 of CUDA or cuDNN: pip install 'adainfer-export[cuda]'",)


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
