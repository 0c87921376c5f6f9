"""TensorRT-RTX builds every stage of real shapes for GPU families, without a GPU."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from adainfer_export import ExportRequest, export
from adainfer_export.build import BuildRequest, build_plans
from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.progress import SilentReporter
from adainfer_runtime.devices import least_sm
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.plans import engine_files

from .export.context_folder import write_prompts
from .export.exit_folder import make_exit_folder
from .needs import needs_rtx

pytestmark = [pytest.mark.slow, needs_rtx]

FAMILIES = (86, 89, 120)


@pytest.fixture(scope="module")
def llama2_layer(tmp_path_factory):
    """One layer of Llama-2-7B's shape with random weights, as the tool makes it."""
    tool = Path(__file__).parent.parent / "tools" / "build_rtx.py"
    spec = importlib.util.spec_from_file_location("build_rtx", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.random_llama_layer(tmp_path_factory.mktemp("llama2") / "checkpoint")


def builds(model, folder, precision, target="tensorrt"):
    manifest = export(ExportRequest(model, folder, target=target, precision=precision)).manifest
    families = tuple(sm for sm in FAMILIES if sm >= least_sm(precision))
    request = BuildRequest("tensorrt-rtx", sm=families)
    stamp = build_plans(folder, manifest, request, SilentReporter()).stamp
    assert stamp.sm == families
    assert set(stamp.plans) == set(engine_files(manifest))
    for stage in manifest.layer_stages:
        plan = stamp.plans[stage.file]
        fused = 2 if target == "tensorrt" else 0  # in each of the profiles
        assert plan.fused_attention == fused
        assert plan.float8_products >= 8 if precision == "fp8" else plan.float8_products == 0


@pytest.mark.parametrize("variant", ["llama", "opt"])  # OPT's translators know no positions
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_everything_of_a_folder_with_exits(tiny, tmp_path, target, variant):
    made = tiny(variant, target=target, precision="fp16")
    folder = make_exit_folder(made.folder, tmp_path / "engines")
    builds_without_a_word(folder)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_everything_of_a_calibrated_folder(tiny, tmp_path, target):
    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama", target=target, precision="fp16").folder, folder)
    prompts = write_prompts(tmp_path / "p.jsonl", 0, 160)
    request = CalibrationRequest((prompts,), target_agreement=0.5, context_exit=True)
    manifest = recalibrate(folder, load_manifest(folder), request, SilentReporter())
    assert manifest.classifiers
    builds_without_a_word(folder)


def builds_without_a_word(folder):
    manifest = load_manifest(folder)
    request = BuildRequest("tensorrt-rtx", sm=FAMILIES)
    report = build_plans(folder, manifest, request, SilentReporter())
    assert set(report.built) == set(engine_files(manifest))
    assert report.warnings == ()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4", "fp8"])
def test_every_stage_of_smollm2(tmp_path, precision):
    builds("smollm2-135m", tmp_path / "engines", precision)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4", "fp8"])
def test_a_layer_of_llama_2_7b(llama2_layer, tmp_path, precision):
    builds(llama2_layer, tmp_path / "engines", precision)


def test_every_stage_of_smollm2_in_plain_operators(tmp_path):
    """What the presets of both Orin boards export."""
    builds("smollm2-135m", tmp_path / "engines", "int4", "tensorrt-basic")
