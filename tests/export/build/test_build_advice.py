"""What a refusal of plans says to run, run as it stands: afterwards the plans are there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adainfer_export.build import BuildRequest, build_plans, builder
from adainfer_export.build.command import register
from adainfer_export.build.worker import Outcome
from adainfer_export.progress import SilentReporter
from adainfer_runtime.devices import GpuInfo
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.errors import PlanError
from adainfer_runtime.plans import check_plan, find_stamp

RTX = {"tensorrt-rtx": "1.7.1"}
FULL = {"tensorrt": "10.15.1"}


class FakeBuilder:
    """TensorRT's place is taken by a few bytes."""

    def __init__(self, backend):
        self._backend = backend

    def version(self):
        return {**RTX, **FULL}[self._backend]

    def build(self, job):
        Path(job.plan).write_bytes(job.onnx.encode())
        return Outcome(None)


def gpu_of(sm):
    return GpuInfo(f"GPU {sm}", sm, 8 << 30, "13.0")


@pytest.fixture
def folder(tiny, tmp_path):
    made = tiny("llama", target="tensorrt-basic", precision="fp16")
    shutil.copytree(made.folder, tmp_path / "engines")
    return tmp_path / "engines"


@pytest.fixture
def machine(monkeypatch):
    """Makes this one with such a GPU, or with none."""

    def become(sm):
        monkeypatch.setattr(builder, "find_gpu", lambda: gpu_of(sm) if sm else None)
        monkeypatch.setattr(builder, "SubprocessBuilder", FakeBuilder)

    return become


def build(folder, backend="tensorrt-rtx", **settings):
    request = BuildRequest(backend, max_rows=settings.pop("max_rows", 16), **settings)
    return build_plans(folder, load_manifest(folder), request, SilentReporter())


def refusal(folder, sm, installed):
    with pytest.raises(PlanError) as caught:
        find_stamp(folder, load_manifest(folder), installed=installed, gpu=gpu_of(sm))
    return str(caught.value)


def obey(message):
    """Runs the command of a message, which stands between backticks."""
    (line,) = re.findall(r"run `adainfer build (.*?)` on this device", message)
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, [*line.split(), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def change_an_engine(folder):
    data = json.loads((folder / "manifest.json").read_text())
    data["files"]["stages/layer_002.onnx"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 120, 121])
@pytest.mark.parametrize("before", [None, (86,), (86, 89, 120)])
def test_the_command_gives_plans_for_every_gpu_of_tensorrt_rtx(folder, machine, sm, before):
    machine(None)
    if before is not None:
        build(folder, sm=before)
    manifest = load_manifest(folder)
    if before is None or sm not in before:
        message = refusal(folder, sm, RTX)
        assert f"--sm {sm} " in message
        obey(message)
    assert sm in find_stamp(folder, manifest, installed=RTX, gpu=gpu_of(sm)).sm


@pytest.mark.parametrize("sm", [87, 90, 100, 110])
@pytest.mark.parametrize("before", [False, True])
def test_gpus_that_tensorrt_rtx_has_not_are_told_of_the_other(folder, machine, sm, before):
    machine(sm)
    if before:
        build(folder)
    message = refusal(folder, sm, RTX)
    assert f"TensorRT-RTX has no plans for this GPU (SM {sm}); install the TensorRT of" in message
    assert "--backend tensorrt`" in message
    # With both installed, the one that has plans for it is named at once.
    message = refusal(folder, sm, RTX | FULL)
    assert "TensorRT-RTX" not in message
    obey(message)
    found = find_stamp(folder, load_manifest(folder), installed=RTX | FULL, gpu=gpu_of(sm))
    assert (found.backend, found.sm) == ("tensorrt", (sm,))


def test_without_families_the_gpu_at_hand_decides(folder, machine):
    for sm, expected in ((80, (80,)), (90, (86, 89, 120)), (None, (86, 89, 120))):
        machine(sm)
        assert build(folder).stamp.sm == expected


@pytest.mark.parametrize(
    ("backend", "installed", "sm"), [("tensorrt", FULL, ()), ("tensorrt-rtx", RTX, (80, 89))]
)
def test_a_stale_folder_is_mended_in_its_own_form(folder, machine, backend, installed, sm):
    machine(89)
    settings = {"single_profile": True, "max_rows": 8, "optimisation_level": 5}
    whole = build(folder, backend, sm=sm, **settings)
    change_an_engine(folder)
    message = refusal(folder, 89, installed)
    assert "--single-profile --max-rows 8 --optimisation-level 5 " in message
    done = obey(message)
    assert done["built"] == ["stages/layer_002.onnx"]
    assert len(done["kept"]) == len(whole.built) - 1
    found = find_stamp(folder, load_manifest(folder), installed=installed, gpu=gpu_of(89))
    assert found.same_build(whole.stamp)


def test_another_version_or_gpu_gets_the_same_form(folder, machine):
    machine(87)
    build(folder, "tensorrt", single_profile=True)
    machine(110)
    message = refusal(folder, 110, FULL)
    assert obey(message)["stamp"]["single_profile"] is True
    build(folder, sm=(80, 89))  # of every family that it had, if this GPU's is among them
    assert "--sm 80,89 " in refusal(folder, 80, {"tensorrt-rtx": "1.8.0"})
    assert "--sm 120 " in refusal(folder, 120, {"tensorrt-rtx": "1.8.0"})


def test_what_is_default_is_not_said(folder, machine):
    machine(None)
    message = refusal(folder, 87, FULL)
    assert f"run `adainfer build {folder} --backend tensorrt` on this device" in message


def test_a_plan_that_goes_after_the_stamp_was_read(folder, machine):
    """The plan of candidate tokens is loaded when a request first names labels."""
    machine(87)
    stamp = build(folder, "tensorrt").stamp
    file = load_manifest(folder).candidates.file
    path = folder / "plans" / stamp.name / stamp.plans[file].file
    path.unlink()
    match = r"candidates.plan cannot be read \(No such file or directory\): run `adainfer build .*"
    with pytest.raises(PlanError, match=match):
        check_plan(folder, stamp, file)
    path.mkdir()
    with pytest.raises(PlanError, match=r"candidates.plan cannot be read \(Is a directory\)"):
        check_plan(folder, stamp, file)
