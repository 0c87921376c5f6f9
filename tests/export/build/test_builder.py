"""Building plans: what is built, kept and refused, and the stamp. A fake stands in for TensorRT."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import typer
from typer.testing import CliRunner

from adainfer_export import ExportRequest, export
from adainfer_export.build import BuildRequest, build_plans, profiles_of
from adainfer_export.build.builder import SubprocessBuilder
from adainfer_export.build.command import register
from adainfer_export.build.shared_tables import shared_tables, with_inputs
from adainfer_export.build.worker import Outcome
from adainfer_export.errors import BuildError
from adainfer_export.progress import SilentReporter
from adainfer_export.sources import resolve
from adainfer_runtime.devices import GpuInfo
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.errors import DeviceError, PlanError
from adainfer_runtime.plans import engine_files, find_stamp, load_stamp, write_stamp

from ...checkpoints import make_checkpoint
from ...needs import HAS_RTX, needs_rtx
from ..exit_folder import make_exit_folder

ORIN = GpuInfo("Orin", 87, 8 << 30, "12.6")


class FakeBuilder:
    """Writes a few bytes; fails where told to."""

    def __init__(self, version="10.15.1", outcomes=None):
        self._version, self._outcomes = version, outcomes or {}
        self.jobs = []

    def version(self):
        return self._version

    def build(self, job):
        self.jobs.append(job)
        with Path(job.plan).open("wb") as stream:
            stream.write(b"plan of " + job.onnx.encode())
        name = job.onnx.rsplit("/", 1)[1]
        return self._outcomes.get(name, Outcome(None, fused_attention=2, seconds=1.5))


@pytest.fixture
def folder(tiny, tmp_path):
    made = tiny("llama", target="tensorrt", precision="fp16")
    shutil.copytree(made.folder, tmp_path / "engines")
    return tmp_path / "engines"


@pytest.fixture
def exits(tiny, tmp_path):
    """A folder of a target with adapters, classifiers and translators."""

    def make(target):
        return make_exit_folder(
            tiny("llama", target=target, precision="fp16").folder, tmp_path / target
        )

    return make


def adapters(manifest):
    return (Path(point.adapter).stem for point in manifest.exit_points.values())


def build(folder, builder, backend="tensorrt", **settings):
    manifest = load_manifest(folder)
    request = BuildRequest(backend, **settings)
    return build_plans(folder, manifest, request, SilentReporter(), builder, ORIN)


def test_every_engine_gets_a_plan_with_the_devices_stamp(folder):
    builder = FakeBuilder()
    report = build(folder, builder)
    manifest = load_manifest(folder)
    assert report.stamp.name == "tensorrt-10.15.1-sm87"
    assert report.stamp.gpu == "Orin"
    assert set(report.stamp.plans) == set(engine_files(manifest))
    assert len(builder.jobs) == len(engine_files(manifest)) == 8
    assert {job.timing_cache for job in builder.jobs} == {
        str(folder / "plans" / report.stamp.name / "timing.cache")
    }
    found = find_stamp(folder, manifest, installed={"tensorrt": "10.15.1"}, gpu=ORIN)
    assert found == report.stamp == load_stamp(folder, report.stamp.name)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_profiles_name_every_dynamic_input_within_bounds(tiny, target):
    made = tiny("llama", target=target, precision="fp16")
    manifest = made.engine.manifest
    for file in engine_files(manifest):
        inputs = {value.name: value for value in ir.load(made.folder / file).graph.inputs}
        for profile in profiles_of(manifest, file, 64):
            assert set(profile) == set(inputs)
            for name, shapes in profile.items():
                dims = list(inputs[name].shape)
                assert len(dims) == len(shapes.usual)
                for dim, low, usual, high in zip(
                    dims, shapes.smallest, shapes.usual, shapes.largest, strict=True
                ):
                    assert 1 <= low <= usual <= high
                    if isinstance(dim, int):
                        assert low == usual == high == dim
    decode, prefill = profiles_of(manifest, manifest.layer_stages[0].file, 64)
    assert decode["hidden"].largest == (1, 1, 64)
    assert prefill["hidden"].largest == (1, 64, 64)


def test_a_single_profile_spans_both(tiny, folder):
    builder = FakeBuilder()
    build(folder, builder, single_profile=True, max_rows=64)
    assert {len(job.profiles) for job in builder.jobs} == {1}
    manifest = load_manifest(folder)
    file = manifest.layer_stages[0].file
    (profile,) = profiles_of(manifest, file, 64, single=True)
    assert (profile["hidden"].smallest, profile["hidden"].largest) == ((1, 1, 64), (1, 64, 64))


def test_a_second_build_keeps_what_is_current(folder):
    build(folder, FakeBuilder())
    again = FakeBuilder()
    report = build(folder, again)
    assert (report.built, len(report.kept), again.jobs) == ((), 8, [])


def test_the_head_is_an_input_of_all_plans_that_read_it(folder, tiny):
    builder = FakeBuilder()
    stamp = build(folder, builder).stamp
    given = {Path(job.onnx).stem: job.tables for job in builder.jobs}
    assert {name: tables for name, tables in given.items() if tables} == {
        "probe": ("lm_head.weight",),
        "candidates": ("lm_head.weight",),
    }
    (table,) = stamp.plans["stages/probe.onnx"].tables
    assert (table.dtype, table.shape, table.bytes) == ("float16", (320, 64), 2 * 320 * 64)
    assert stamp.plans["stages/candidates.onnx"].tables == (table,)
    tied = tiny("llama-tied", target="tensorrt", precision="fp16").folder
    names = [
        shared_tables(tied, load_manifest(tied), f"stages/{s}.onnx") for s in ("embed", "probe")
    ]
    assert names[0] == names[1] != ()
    model = with_inputs(tied / "stages" / "embed.onnx", [names[0][0].name])
    assert [value.name for value in model.graph.input] == ["input_ids", names[0][0].name]
    assert not model.graph.initializer


@pytest.mark.parametrize(("tied", "sharing"), [(True, {"embed", "candidates"}), (False, set())])
def test_a_head_of_odd_sizes_is_the_probes_own(tmp_path, tied, sharing):
    """TensorRT-RTX would copy all of it in every run; see `multiplies_in_place`."""
    make_checkpoint(tmp_path / "in", "llama", vocab_size=321, tie_word_embeddings=tied)
    request = ExportRequest(
        str(tmp_path / "in"), tmp_path / "out", target="tensorrt", precision="fp16"
    )
    manifest = export(request).manifest
    tables = {
        stage.file: shared_tables(tmp_path / "out", manifest, stage.file)
        for stage in manifest.stages
    }
    assert {Path(file).stem for file, found in tables.items() if found} == sharing


def test_plans_from_before_hold_the_head_and_are_kept_until_the_next_build(folder):
    stamp = build(folder, FakeBuilder()).stamp
    plans = {file: r.model_copy(update={"tables": ()}) for file, r in stamp.plans.items()}
    write_stamp(folder, stamp.model_copy(update={"plans": plans}))
    found = find_stamp(folder, load_manifest(folder), installed={"tensorrt": "10.15.1"}, gpu=ORIN)
    assert not any(record.tables for record in found.plans.values())
    built = build(folder, FakeBuilder()).built
    assert built == ("stages/probe.onnx", "stages/candidates.onnx")


@pytest.mark.parametrize(
    "change", [{"file": "../elsewhere.data"}, {"offset": 1 << 40}, {"offset": -256}, {"bytes": 256}]
)
def test_a_table_outside_the_folders_weights_is_refused(folder, change):
    stamp = build(folder, FakeBuilder()).stamp
    file = "stages/probe.onnx"
    table = stamp.plans[file].tables[0].model_copy(update=change)
    record = stamp.plans[file].model_copy(update={"tables": (table,)})
    write_stamp(folder, stamp.model_copy(update={"plans": {**stamp.plans, file: record}}))
    with pytest.raises(PlanError) as caught:
        find_stamp(folder, load_manifest(folder), installed={"tensorrt": "10.15.1"}, gpu=ORIN)
    assert f"the plan of {file} reads {table.file}, which is not what it was" in str(caught.value)


def test_an_interrupted_build_goes_on(folder):
    class Killed(FakeBuilder):
        def build(self, job):
            if len(self.jobs) == 3:
                raise KeyboardInterrupt
            return super().build(job)

    with pytest.raises(KeyboardInterrupt):
        build(folder, Killed())
    report = build(folder, FakeBuilder())
    assert (len(report.built), len(report.kept)) == (5, 3)


def test_a_damaged_plan_is_built_again(folder):
    stamp = build(folder, FakeBuilder()).stamp
    file = stamp.plans["stages/embed.onnx"].file
    (folder / "plans" / stamp.name / file).write_bytes(b"")
    assert build(folder, FakeBuilder()).built == ("stages/embed.onnx",)


def test_other_settings_build_anew(folder):
    build(folder, FakeBuilder())
    assert len(build(folder, FakeBuilder(), optimisation_level=5).built) == 8


def test_changed_onnx_is_stale_at_load_and_built_again(folder):
    build(folder, FakeBuilder())
    data = json.loads((folder / "manifest.json").read_text())
    data["files"]["stages/layer_002.onnx"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(data))
    manifest = load_manifest(folder)
    match = (
        r"the plan of stages/layer_002.onnx was built from another ONNX file: "
        r"run `adainfer build .* --backend tensorrt` on this device"
    )
    with pytest.raises(PlanError, match=match):
        find_stamp(folder, manifest, installed={"tensorrt": "10.15.1"}, gpu=ORIN)
    assert build(folder, FakeBuilder()).built == ("stages/layer_002.onnx",)


@pytest.mark.parametrize(
    ("version", "gpu", "message"),
    [
        (
            "10.16.0",
            ORIN,
            r"no plans for tensorrt 10.16.0 on Orin, SM 87 \(found: tensorrt-10.15.1-sm87\)",
        ),
        ("10.15.1", GpuInfo("A10", 86, 1, "12.6"), "no plans for tensorrt 10.15.1 on A10, SM 86"),
        # The same SM and name: an AGX Orin and an Orin Nano.
        (
            "10.15.1",
            dataclasses.replace(ORIN, multiprocessors=16),
            r"on Orin, 16 multiprocessors, SM 87 \(found: tensorrt-10.15.1-sm87, built on Orin\)",
        ),
    ],
)
def test_plans_of_another_version_or_gpu_are_refused(folder, version, gpu, message):
    build(folder, FakeBuilder())
    with pytest.raises(PlanError, match=message):
        find_stamp(folder, load_manifest(folder), installed={"tensorrt": version}, gpu=gpu)


BOTH = {"tensorrt": "10.16.0", "tensorrt-rtx": "10.15.1"}


def test_the_plans_that_are_there_choose_among_installed_packages(folder):
    """With both installed, plans of TensorRT-RTX are no reason to ask for TensorRT's."""
    gpu, manifest = GpuInfo("RTX", 89, 1, "13.0"), load_manifest(folder)
    stamp = build(folder, FakeBuilder(), "tensorrt-rtx").stamp
    assert find_stamp(folder, manifest, installed=BOTH, gpu=gpu) == stamp
    with pytest.raises(PlanError, match=r"tensorrt-rtx is not installed\).*--backend tensorrt` on"):
        find_stamp(folder, manifest, installed={"tensorrt": "10.16.0"}, gpu=gpu)
    (folder / "plans" / stamp.name / stamp.plans["stages/embed.onnx"].file).unlink()
    with pytest.raises(PlanError, match=r"embed.plan is missing .* --backend tensorrt-rtx` on"):
        find_stamp(folder, manifest, installed=BOTH, gpu=gpu)


def test_a_partial_stamp_hides_no_complete_one(folder):
    gpu, manifest = GpuInfo("RTX", 89, 1, "13.0"), load_manifest(folder)
    build(folder, FakeBuilder(), "tensorrt-rtx", sm=(89,), stages=("embed",))
    whole = build(folder, FakeBuilder(), "tensorrt-rtx", sm=(89, 120)).stamp
    assert find_stamp(folder, manifest, installed=BOTH, gpu=gpu) == whole


def test_stamps_hold_the_profiles_and_others_are_built_anew(folder):
    stamp = build(folder, FakeBuilder(), max_rows=64).stamp
    file = load_manifest(folder).layer_stages[0].file
    decode, prompts = load_stamp(folder, stamp.name).plans[file].profiles
    assert decode["hidden"] == ((1, 1, 64), (1, 1, 64), (1, 1, 64))
    assert prompts["hidden"] == ((1, 1, 64), (1, 64, 64), (1, 64, 64))
    plans = dict(stamp.plans)
    plans[file] = plans[file].model_copy(update={"profiles": (decode,)})
    write_stamp(folder, stamp.model_copy(update={"plans": plans}))
    assert build(folder, FakeBuilder(), max_rows=64).built == (file,)


def test_no_plans_at_all(folder):
    with pytest.raises(PlanError, match="has no TensorRT plans: run `adainfer build"):
        find_stamp(folder, load_manifest(folder), installed={"tensorrt": "10"}, gpu=ORIN)


def test_ignored_inputs_are_an_error(folder):
    outcome = Outcome(None, unused_inputs=("Unused Input: nonpad_kv_seqlen",))
    with pytest.raises(BuildError, match="inputs are ignored: Unused Input: nonpad_kv_seqlen"):
        build(folder, FakeBuilder(outcomes={"layer_001.onnx": outcome}))
    assert not list((folder / "plans").glob("*/.*.partial"))


def test_a_refused_graph_names_the_file_and_the_reason(folder):
    with pytest.raises(BuildError, match=r"layer_003.onnx: tensorrt 10.15.1: TensorRT ended"):
        build(
            folder,
            FakeBuilder(
                outcomes={"layer_003.onnx": Outcome("TensorRT ended its process with signal 8")}
            ),
        )


def test_some_stages(folder):
    report = build(folder, FakeBuilder(), stages=("layer_00[12]",))
    assert report.built == ("stages/layer_001.onnx", "stages/layer_002.onnx")
    with pytest.raises(PlanError, match="is missing"):
        find_stamp(folder, load_manifest(folder), installed={"tensorrt": "10.15.1"}, gpu=ORIN)
    with pytest.raises(BuildError, match="no stage is named like nothing; there are 8: positions"):
        build(folder, FakeBuilder(), stages=("nothing",))


def test_tensorrt_before_10_15_needs_the_basic_target(folder):
    with pytest.raises(BuildError, match=r"need TensorRT 10.15, found 10.3.0; export with --tar"):
        build(folder, FakeBuilder("10.3.0"))


def test_other_targets_are_refused(tiny):
    made = tiny("llama")
    request = BuildRequest("tensorrt-rtx")
    with pytest.raises(BuildError, match="engines for target ort-cpu hold operators that TensorRT"):
        build_plans(made.folder, made.engine.manifest, request, SilentReporter(), FakeBuilder())


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed"
)
def test_missing_package_names_what_to_install():
    with pytest.raises(DeviceError, match=r"tensorrt is not installed .*install the TensorRT of"):
        SubprocessBuilder("tensorrt")


@pytest.mark.skipif(HAS_RTX, reason="TensorRT-RTX is installed")
def test_missing_rtx_names_the_pip_line():
    match = r"pip install 'adainfer-export\[tensorrt-rtx\]'"
    with pytest.raises(DeviceError, match=match):
        SubprocessBuilder("tensorrt-rtx")


def test_tensorrt_without_a_gpu(folder, monkeypatch):
    monkeypatch.setattr("adainfer_export.build.builder.find_gpu", lambda: None)
    with pytest.raises(DeviceError, match="none was found; run this on the device, or use --back"):
        build_plans(
            folder,
            load_manifest(folder),
            BuildRequest("tensorrt"),
            SilentReporter(),
            FakeBuilder(),
        )


def test_an_ignored_input_of_an_exit_graph_names_what_mends_it(exits):
    """Classifiers of earlier versions take inputs that they do not use."""
    folder = exits("tensorrt")
    graph = load_manifest(folder).exit.classifier.graph
    outcome = Outcome(None, unused_inputs=("Unused Input: trust",))
    match = "Unused Input: trust; run `adainfer calibrate` again"
    with pytest.raises(BuildError, match=match):
        build(folder, FakeBuilder(outcomes={Path(graph).name: outcome}))


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_profiles_of_a_calibrated_folder_name_every_input(exits, target):
    folder = exits(target)
    manifest = load_manifest(folder)
    for file in engine_files(manifest):
        inputs = {value.name for value in ir.load(folder / file).graph.inputs}
        assert {*profiles_of(manifest, file, 64)[0]} == inputs, file


@needs_rtx
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_rtx_builds_exit_graphs_without_a_word(exits, target):
    """AdaInfer's own SVM and a plain threshold, which look at few of a classifier's inputs."""
    folder = exits(target)
    manifest = load_manifest(folder)
    stages = ("svm.*", "threshold.*", "translate_001.*", *adapters(manifest))
    request = BuildRequest("tensorrt-rtx", sm=(89,), stages=stages)
    report = build_plans(folder, manifest, request, SilentReporter())
    assert len(report.built) == 5
    assert report.warnings == ()


def build_with_rtx(folder, precision, stages):
    """The command's answer, for every GPU family that has the precision."""
    app = typer.Typer()
    register(app)
    families = "89,120" if precision == "fp8" else "86,89,120"
    arguments = [str(folder), "--backend", "tensorrt-rtx", "--sm", families, "--json"]
    for stage in stages:
        arguments += ["--stages", stage]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert len(data["built"]) == len(stages)
    return data["stamp"]["plans"]


@needs_rtx
@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("tensorrt", "fp16"),
        ("tensorrt", "bf16"),
        ("tensorrt", "int4"),
        ("tensorrt", "fp8"),
        ("tensorrt-basic", "fp16"),
        ("tensorrt-basic", "fp8"),
    ],
)
def test_rtx_builds_stages_of_every_kind(tiny, tmp_path, target, precision):
    """Parser and builder of TensorRT-RTX, without a GPU."""
    folder = tmp_path / "engines"
    checkpoint = str(tiny("llama").checkpoint)
    export(ExportRequest(checkpoint, folder, target=target, precision=precision))
    stages = ("positions", "layer_001", "probe", "candidates")
    plan = build_with_rtx(folder, precision, stages)["stages/layer_001.onnx"]
    assert plan["fused_attention"] == (2 if target == "tensorrt" else 0)  # one for each profile
    # At least Q, K and V; the output; gate and up; down; for each profile.
    assert plan["float8_products"] >= 8 if precision == "fp8" else plan["float8_products"] == 0


@pytest.fixture
def one_layer_of_smollm2(smollm2_gguf, monkeypatch):
    """The alias gives the first of the real model's layers, with its embedding and its head."""
    checkpoint = resolve("smollm2-135m")
    checkpoint.config.num_hidden_layers = 1
    monkeypatch.setattr(type(checkpoint), "unused", lambda *_: ())
    module = importlib.import_module("adainfer_export.export")  # its package names the function so
    monkeypatch.setattr(module, "resolve", lambda *_, **__: checkpoint)


@needs_rtx
@pytest.mark.usefixtures("one_layer_of_smollm2")
@pytest.mark.parametrize(
    ("target", "precision"), [("tensorrt", "bf16"), ("tensorrt-basic", "int4")]
)
def test_rtx_builds_stages_of_smollm2(tmp_path, target, precision):
    """What boards get by their presets, with a real model's shapes and weights."""
    folder = tmp_path / "engines"
    request = ExportRequest("smollm2-135m", folder, target=target, precision=precision)
    manifest = export(request).manifest
    assert (manifest.depth, manifest.model.hidden_size) == (1, 576)
    plans = build_with_rtx(folder, precision, ("positions", "layer_001", "probe"))
    assert plans["stages/layer_001.onnx"]["fused_attention"] == (2 if target == "tensorrt" else 0)


def test_8_bit_floats_are_built_for_gpus_that_have_them(tiny, tmp_path):
    made = tiny("llama", target="tensorrt", precision="fp8")
    folder = tmp_path / "engines"
    shutil.copytree(made.folder, folder)
    assert build(folder, FakeBuilder(), "tensorrt-rtx").stamp.sm == (89, 120)
    match = "precision fp8 needs SM 89 or later, not 80, 86; export with --precision int4 or fp16"
    with pytest.raises(BuildError, match=match):
        build(folder, FakeBuilder(), "tensorrt-rtx", sm=(80, 86, 89))
    with pytest.raises(BuildError, match="precision fp8 needs SM 89 or later, not 87; export"):
        build(folder, FakeBuilder())  # of the GPU at hand
    fp16 = tiny("llama", target="tensorrt", precision="fp16")
    shutil.copytree(fp16.folder, tmp_path / "fp16")
    assert build(tmp_path / "fp16", FakeBuilder(), "tensorrt-rtx").stamp.sm == (86, 89, 120)


def test_int4_is_built_for_gpus_that_have_it(tiny, tmp_path):
    made = tiny("llama", target="tensorrt", precision="int4")
    shutil.copytree(made.folder, tmp_path / "engines")
    match = "precision int4 needs SM 80 or later, not 75; export with --precision fp16 for older"
    with pytest.raises(BuildError, match=match):
        build(tmp_path / "engines", FakeBuilder(), "tensorrt-rtx", sm=(75, 86))


@needs_rtx
def test_rtx_refuses_contrib_operators_by_name(tiny, tmp_path):
    builder = SubprocessBuilder("tensorrt-rtx")
    made = tiny("llama", target="ort-cuda", precision="fp16")
    from adainfer_export.build.worker import Job

    job = Job(
        "tensorrt-rtx",
        str(made.folder / made.engine.manifest.cut[0].file),
        str(tmp_path / "plan"),
        (89,),
        (),
        3,
    )
    outcome = builder.build(job)
    assert outcome.error is not None
    assert "the parser refuses it" in outcome.error


def test_the_peak_is_of_the_builders_own_process():
    """Not of whoever started it: 300 MB here, which the child never had."""
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    code = "from adainfer_export.build.worker import peak_memory_bytes as p; print(p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000_000
    assert len(held) == 300_000_000
