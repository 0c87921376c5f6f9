"""The chain over TensorRT's session protocol, on a device that is none but checks everything."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from adainfer_export.build import profiles_of
from adainfer_export.build.shared_tables import shared_tables, with_inputs
from adainfer_runtime import Engine, NoExit, certificate
from adainfer_runtime import engine as engine_module
from adainfer_runtime.backends import tensorrt
from adainfer_runtime.backends.device_backend import DeviceBackend
from adainfer_runtime.backends.device_memory import DeviceRows, Tensor, from_storage, to_storage
from adainfer_runtime.backends.device_sequence import BoundRun
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.backends.tensorrt import PlanStages
from adainfer_runtime.backends.tensorrt_graphs import GraphRecorder
from adainfer_runtime.backends.tensorrt_stage import PlanStage
from adainfer_runtime.backends.tensorrt_tables import SharedTables
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.devices import GpuInfo
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.errors import (
    DeviceError,
    DeviceMemoryError,
    ExitUnavailableError,
    PlanError,
    StageError,
)
from adainfer_runtime.planning import Machine, RequestShape, bench, measure_times
from adainfer_runtime.plans import BuildStamp, PlanRecord, engine_files
from adainfer_runtime.profile import ProfiledBackend, StageClock
from adainfer_runtime.session import Session

from ..scripted import ScriptedExit
from .fake_device import FakeDriver, FakeLoader

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8]
TARGETS = [("onnx-std", "fp32"), ("tensorrt", "fp16"), ("tensorrt-basic", "fp32")]


def plan_record(folder, manifest, file, share):
    """The ONNX file as its own plan, given what it shares with others as inputs."""
    tables = shared_tables(folder, manifest, file) if share else ()
    source = folder / file
    if tables:
        source = source.with_suffix(".shared.onnx")
        onnx.save(with_inputs(folder / file, [table.name for table in tables]), source)
    return PlanRecord(
        file=f"../../{source.relative_to(folder)}",
        bytes=0,
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        source="",
        seconds=0,
        peak_memory_bytes=0,
        fused_attention=0,
        tables=tables,
    )


def fake_backend(made, max_rows=16, aliases=True, single=False, capture_fails=None, share=True):
    manifest = made.engine.manifest
    driver = FakeDriver(capture_fails=capture_fails)
    records = {
        file: plan_record(made.folder, manifest, file, share) for file in engine_files(manifest)
    }
    stamp = BuildStamp(
        backend="tensorrt",
        version="0",
        sm=(0,),
        max_rows=max_rows,
        optimisation_level=3,
        plans=records,
    )

    def profiles(path):
        file = path.resolve().relative_to(made.folder.resolve()).as_posix()
        file = file.replace(".shared.onnx", ".onnx")
        return profiles_of(manifest, file, max_rows, single=single)

    (made.folder / "plans" / stamp.name).mkdir(parents=True, exist_ok=True)
    loader = FakeLoader(driver, profiles, aliases)
    stages = PlanStages(made.folder, stamp, loader, driver)
    stages.load_all(manifest)
    return DeviceBackend(manifest, stages, driver, max_rows), driver


def tokens_of(backend, manifest, prompt, count):
    session = Session(backend, manifest)
    session.extend(prompt)
    found = []
    for _ in range(count):
        found.append(session.predict(NoExit()).result.token)
        session.extend([found[-1]])
    return found, session


@pytest.mark.parametrize(
    ("variant", "target", "precision"),
    [
        *(("llama", target, precision) for target, precision in TARGETS),
        # Heads of each layer, learned positions, two kinds of layers.
        *(
            (variant, target, "fp32")
            for variant in ("llama-pruned", "opt", "gemma3")
            for target in ("onnx-std", "tensorrt-basic")
        ),
    ],
)
def test_tokens_and_caches_equal_those_of_the_cpu(tiny, variant, target, precision):
    made = tiny(variant, target=target, precision=precision)
    backend, _ = fake_backend(made)
    prompt = PROMPT * 3  # more than one pass carries
    mine, session = tokens_of(backend, made.engine.manifest, prompt, 6)
    theirs, reference = tokens_of(made.engine.backend, made.engine.manifest, prompt, 6)
    assert mine == theirs
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for layer in range(1, 5):
        for a, b in zip(session.kv(layer), reference.kv(layer), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance)


@settings(max_examples=10, deadline=None)
@given(
    exits=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    target=st.sampled_from(["onnx-std", "tensorrt-basic"]),
)
def test_deferred_fills_stay_exact_on_the_device(tiny, exits, target):
    made = tiny("llama", target=target)
    manifest = made.engine.manifest
    backend, _ = fake_backend(made)
    random = np.random.default_rng(len(exits))
    policy = ScriptedExit(exits, manifest.boundaries[:-1])
    session = Session(backend, manifest)
    session.extend(PROMPT)
    for _ in exits:
        policy.next()
        session.predict(policy)
        session.extend([int(random.integers(2, 320))])
    session.complete()
    off = made.engine.session()
    off.extend(session.tokens)
    off.complete()
    for layer in range(1, 5):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-4)
    np.testing.assert_allclose(np.asarray(session.hidden()), off.hidden(), atol=1e-4)


def test_decoding_reads_back_a_few_bytes_and_replays_graphs(tiny):
    made = tiny("llama", target="tensorrt", precision="fp16")
    backend, driver = fake_backend(made)
    session = Session(backend, made.engine.manifest)
    session.extend(PROMPT)
    for _ in range(3):
        session.extend([session.predict(NoExit()).result.token])
    driver.log.clear()
    session.extend([session.predict(NoExit()).result.token])
    downloads = [size for kind, _, size in driver.log if kind == "download"]
    assert len(downloads) == 1
    assert downloads[0] <= 2048
    uploads = [size for kind, _, size in driver.log if kind == "upload"]
    assert max(uploads) <= 64  # a token, a position
    # Embedding, positions and every layer stage are one graph each by now.
    graphs = [entry for entry in driver.log if entry[0] == "graph"]
    assert len(graphs) == 2 + len(made.engine.manifest.layer_stages)


def test_prefix_caches_are_not_recorded_for_their_places_move(tiny):
    made = tiny("llama", target="tensorrt-basic", precision="fp32")
    backend, driver = fake_backend(made)
    _, session = tokens_of(backend, made.engine.manifest, PROMPT, 4)
    driver.log.clear()
    session.extend([session.predict(NoExit()).result.token])
    # The embedding's places do not: one graph for each token that was put in.
    assert len([entry for entry in driver.log if entry[0] == "graph"]) == 1


def test_a_context_is_told_only_what_changed(tiny):
    """With a prefix cache: places and shapes of the cache, mask and positions; no weights' own."""
    made = tiny("llama", target="tensorrt-basic", precision="fp32")
    manifest = made.engine.manifest
    backend, _ = fake_backend(made)
    _, session = tokens_of(backend, manifest, PROMPT, 4)
    layer, probe = (
        backend._stages.load(stage.file)._plan.contexts
        for stage in (manifest.layer_stages[1], manifest.probe)
    )
    for context in (*layer, *probe):
        context.told.clear()
    session.extend([session.predict(NoExit()).result.token])
    session.predict(NoExit())
    caches = {f"{kind}_{part}.2" for kind in ("past", "present") for part in ("key", "value")}
    assert {name for context in layer for name in context.told} == {*caches, "mask"}
    # The probe reads the last position's row where it lies; its outputs stay in their places.
    assert {name for context in probe for name in context.told} <= {"hidden"}


class FakeSessions:
    """ONNX Runtime's stages of `ort_cuda`, on the fake device."""

    def __init__(self, folder, driver):
        self._folder, self._driver = folder, driver

    def close(self):
        pass

    def load(self, file):
        session = open_session(self._folder / file)
        driver = self._driver

        class Stage:
            def bind(self, run):
                for before, after in run.aliases:
                    assert run.inputs[before] == run.outputs[after], "not in place"
                assert {value.name for value in session.get_inputs()} == {*run.inputs, *run.host}

                def execute():
                    # Bound where they lie: in place, GroupQueryAttention leaves the cache behind
                    # the new positions as it is, which a copy of past to present does not.
                    binding = session.io_binding()
                    arrays = {name: view(tensor) for name, tensor in run.inputs.items()}
                    for name, array in {**arrays, **run.host}.items():
                        binding.bind_input(name, "cpu", 0, *place(array))
                    for name, tensor in run.outputs.items():
                        binding.bind_output(name, "cpu", 0, *place(view(tensor)))
                    session.run_with_iobinding(binding)

                def place(array):
                    return array.dtype.type, array.shape, array.ctypes.data

                def view(tensor):
                    raw = driver.view(tensor.address, tensor.bytes)
                    return raw.view(tensor.dtype).reshape(tensor.shape)

                # Host inputs are read at launch, before the host goes on.
                return lambda: (driver.enqueue(("run", file, None), execute), driver.wait())

        return Stage()


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_cuda_dialect_runs_over_device_memory(tiny, precision):
    made = tiny("llama", target="ort-cuda", precision=precision)
    driver = FakeDriver()
    backend = DeviceBackend(
        made.engine.manifest, FakeSessions(made.folder, driver), driver, max_rows=16
    )
    prompt = PROMPT * 2
    mine, _ = tokens_of(backend, made.engine.manifest, prompt, 5)
    theirs, _ = tokens_of(made.engine.backend, made.engine.manifest, prompt, 5)
    assert mine == theirs


def test_two_sequences_share_plans_without_sharing_memory(tiny):
    made = tiny("llama", target="onnx-std")
    manifest = made.engine.manifest
    backend, _ = fake_backend(made)
    sessions = [Session(backend, manifest) for _ in range(2)]
    prompts = [PROMPT, PROMPT[::-1]]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.extend(prompt)
    found = [[], []]
    for _ in range(5):  # interleaved, graphs and all
        for index, session in enumerate(sessions):
            found[index].append(session.predict(NoExit()).result.token)
            session.extend([found[index][-1]])
    for prompt, tokens in zip(prompts, found, strict=True):
        assert (
            tuple(tokens) == made.engine.generate(prompt, max_new_tokens=5, ignore_eos=True).tokens
        )


def test_memory_is_given_back_with_the_sequence(tiny):
    made = tiny("llama", target="onnx-std")
    backend, driver = fake_backend(made)
    tokens_of(backend, made.engine.manifest, PROMPT, 2)  # loads what is the engine's own
    driver.wait()
    before = len(driver.blocks)
    tokens_of(backend, made.engine.manifest, PROMPT, 2)
    driver.download(np.empty(1, np.float32), next(iter(driver.blocks)))  # waits
    assert len(driver.blocks) == before


def table_addresses(backend):
    """Of what plans share, by file: the addresses that their contexts were given."""
    stages, found = backend._stages, {}
    for file, stage in stages._loaded.items():
        for table in stages.stamp.plans[file].tables:
            contexts = stage._plan.contexts
            found[file] = {context._addresses[table.name] for context in contexts}
    return found


@pytest.mark.parametrize(
    ("variant", "sharing"),
    [("llama-tied", ["candidates", "embed", "probe"]), ("llama", ["candidates", "probe"])],
)
@pytest.mark.parametrize(("target", "precision"), TARGETS)
def test_the_head_lies_once_for_all_that_read_it(tiny, variant, sharing, target, precision):
    made = tiny(variant, target=target, precision=precision)
    backend, driver = fake_backend(made)
    expected, _ = tokens_of(made.engine.backend, made.engine.manifest, PROMPT, 4)
    assert tokens_of(backend, made.engine.manifest, PROMPT, 4)[0] == expected
    hidden = np.random.default_rng(0).normal(size=64).astype(np.float32)
    some = np.array([3, 99, 17])
    mine, theirs = (b.probe_candidates(hidden, some) for b in (backend, made.engine.backend))
    np.testing.assert_allclose(mine.logits, theirs.logits, atol=2e-2)
    found = table_addresses(backend)
    assert sorted(Path(file).stem for file in found) == sharing
    (address,) = set().union(*found.values())
    record = next(iter(backend._stages.stamp.plans[file] for file in found)).tables[0]
    stored = (made.folder / record.file).read_bytes()[record.offset :][: record.bytes]
    assert [place for place, b in driver.blocks.items() if b.tobytes() == stored] == [address]
    del backend, mine
    gc.collect()
    driver.wait()
    assert address not in driver.blocks


def test_plans_that_hold_the_head_themselves_run_as_well(tiny):
    made = tiny("llama-tied", target="tensorrt", precision="fp16")
    backend, _ = fake_backend(made, share=False)
    assert not table_addresses(backend)
    expected, _ = tokens_of(made.engine.backend, made.engine.manifest, PROMPT, 4)
    assert tokens_of(backend, made.engine.manifest, PROMPT, 4)[0] == expected


@pytest.mark.parametrize("change", ["missing", "renamed", "shape"])
def test_a_wrong_binding_of_a_table_is_refused(tiny, change):
    made = tiny("llama-tied", target="onnx-std")
    backend, _ = fake_backend(made)
    file = made.engine.manifest.probe.file
    stages = backend._stages
    stamp, record = stages.stamp, stages.stamp.plans[file]
    del stages._loaded[file]
    (table,) = record.tables
    tables = {
        "missing": (),
        "renamed": (table.model_copy(update={"name": "other"}),),
        "shape": (table.model_copy(update={"shape": table.shape[::-1]}),),
    }[change]
    stamp.plans[file] = record.model_copy(update={"tables": tables})
    with pytest.raises(StageError, match=r"the plan has inputs|no profile of the plan takes"):
        backend.probe(np.zeros(64, np.float32)).token  # noqa: B018 - reads it


def test_a_table_that_does_not_fit_or_is_gone(tiny, tmp_path):
    made = tiny("llama-tied", target="onnx-std")
    manifest = made.engine.manifest
    (table,) = shared_tables(made.folder, manifest, manifest.probe.file)
    with pytest.raises(DeviceMemoryError):
        SharedTables(made.folder, FakeDriver(room=table.bytes - 1)).tensor(table)
    driver = FakeDriver()
    with pytest.raises(PlanError, match=r"embed\.data cannot be read: "):
        SharedTables(tmp_path, driver).tensor(table)
    (tmp_path / "stages").mkdir()
    (tmp_path / table.file).write_bytes(b"short")
    with pytest.raises(PlanError, match=r"embed\.data cannot be read: "):
        SharedTables(tmp_path, driver).tensor(table)
    assert driver.live_bytes == 0


def test_probe_functions_equal_those_of_the_cpu(tiny):
    made = tiny("llama", target="onnx-std")
    backend, _ = fake_backend(made)
    random = np.random.default_rng(0)
    hidden = random.normal(size=(40, 64)).astype(np.float32)  # more than one probe takes
    reference = made.engine.backend
    np.testing.assert_allclose(
        backend.probe_logits(hidden), reference.probe_logits(hidden), atol=1e-5
    )
    for mine, theirs in zip(
        backend.probe_features(hidden), reference.probe_features(hidden), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    candidates = np.array([3, 99, 17])
    mine = backend.probe_candidates(hidden[0], candidates)
    theirs = reference.probe_candidates(hidden[0], candidates)
    assert mine.token == theirs.token
    np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-5)


def test_an_unread_prediction_survives_the_next_probe(tiny):
    made = tiny("llama", target="onnx-std")
    backend, _ = fake_backend(made)
    random = np.random.default_rng(0)
    rows = random.normal(size=(2, 64)).astype(np.float32)
    first, second = backend.probe(rows[0]), backend.probe(rows[1])
    for result, row in ((first, rows[0]), (second, rows[1])):
        expected = made.engine.backend.probe(row)
        assert result.token == expected.token
        assert result.gap == pytest.approx(expected.gap, abs=1e-6)
        np.testing.assert_allclose(result.logits, expected.logits, atol=1e-5)


def test_a_plan_without_the_alias_is_refused(tiny):
    made = tiny("llama", target="tensorrt", precision="fp16")
    backend, _ = fake_backend(made, aliases=False)
    session = Session(backend, made.engine.manifest)
    session.extend(PROMPT)
    match = (
        r"TensorRT does not update past_key.1 in place \(it reports no alias for present_key.1\)"
    )
    with pytest.raises(StageError, match=match):
        session.predict(NoExit())


@pytest.fixture
def layer_run(tiny):
    """A correct binding of one layer stage, to be broken."""
    made = tiny("llama", target="onnx-std")
    backend, driver = fake_backend(made)
    sequence = backend.open_sequence()
    seen = []
    stage = backend._stages.load(made.engine.manifest.layer_stages[0].file)
    original = stage.bind
    stage.bind = lambda run: seen.append(run) or original(run)
    sequence.embed(np.array([5, 6]), 0)
    sequence.run_stage(0, 2, 0)
    stage.bind = original
    yield stage, seen[0], driver
    del sequence  # its memory was needed until here


def broken(run, side, name, **changes):
    tensors = dict(getattr(run, side))
    tensors[name] = dataclasses.replace(tensors[name], **changes)
    return dataclasses.replace(run, **{side: tensors})


@pytest.mark.parametrize(
    ("side", "name", "change", "message"),
    [
        ("inputs", "hidden", {"offset": 4}, "hidden at .* is not aligned to 256"),
        (
            "inputs",
            "hidden",
            {"shape": (1, 17, 64)},
            r"no profile of the plan takes hidden \[1, 17",
        ),
        ("outputs", "present_key.1", {"offset": 256}, "past_key.1 and present_key.1 are bound to"),
    ],
)
def test_wrong_bindings_are_refused(layer_run, side, name, change, message):
    stage, run, _ = layer_run
    changes = dict(change)
    if "offset" in changes:
        changes = {"address": getattr(run, side)[name].address + changes["offset"]}
    with pytest.raises(StageError, match=message):
        stage.bind(broken(run, side, name, **changes))


def test_other_names_than_the_plans_are_refused(layer_run):
    stage, run, _ = layer_run
    inputs = {name: tensor for name, tensor in run.inputs.items() if name != "mask"}
    with pytest.raises(StageError, match=r"the plan has inputs .*mask.*; build the plans again"):
        stage.bind(dataclasses.replace(run, inputs=inputs))


def test_the_fake_device_notices_wrong_addresses(layer_run):
    """What the tests above rely on."""
    stage, run, driver = layer_run
    outside = dataclasses.replace(run.inputs["cos"], address=0x1000)
    stage.bind(dataclasses.replace(run, inputs={**run.inputs, "cos": outside}))()
    with pytest.raises(AssertionError, match="0x1000 is no allocated address"):
        driver.download(np.empty(1, np.float32), run.inputs["hidden"].address)


def test_rows_behave_like_an_array():
    driver = FakeDriver()
    rows = DeviceRows(driver, driver.allocate(4 * 6 * 3), 6, 3)
    table = np.arange(18, dtype=np.float32).reshape(6, 3)
    rows[:] = table
    rows[0:2] = rows[4:6].copy()
    table[0:2] = table[4:6]
    rows[5] = np.ones(3, np.float32)
    table[5] = 1.0
    np.testing.assert_array_equal(np.asarray(rows), table)
    np.testing.assert_array_equal(np.asarray(rows[-1])[0], table[-1])
    with pytest.raises(ValueError, match="2 rows do not fit 3"):
        rows[0:3] = rows[4:6]
    with pytest.raises(IndexError, match="row 6 of 6"):
        rows[6]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_bfloat16_storage_keeps_eight_digits(values):
    array = np.array(values, np.float32)
    back = from_storage(to_storage(array, "bfloat16"), "bfloat16")
    assert (np.abs(back - array) <= np.abs(array) * 2.0**-8 + 1e-37).all()


def test_without_a_gpu_the_error_is_one_clear_line(tiny, monkeypatch):
    made = tiny("llama", target="tensorrt", precision="fp16")
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: None)
    match = "device cuda: no NVIDIA GPU was found .* use device cpu, and see `adainfer doctor`"
    with pytest.raises(DeviceError, match=match):
        Engine.load(made.folder, device="cuda")


class Plain:
    """A plan of one input and one output, whose contexts count."""

    def __init__(self, capturable=True):
        self.contexts = []
        self._capturable = capturable

    def inputs(self):
        return ("x",)

    def outputs(self):
        return ("y",)

    def profiles(self):
        return 1

    def accepts(self, profile, name, shape):
        return True

    def context(self, profile, *, fixed_shapes):
        context = SimpleNamespace(told=[], runs=0, capturable=lambda: self._capturable)
        context.set_input_shape = lambda name, shape: context.told.append((name, shape))
        context.set_address = lambda name, address: context.told.append((name, address))
        context.enqueue = lambda: setattr(context, "runs", context.runs + 1)
        self.contexts.append(context)
        return context


@pytest.fixture
def run():
    driver = FakeDriver()
    tensor = Tensor(driver.allocate(256), "float32", (1,))
    return driver, BoundRun({"x": tensor}, {"y": tensor}, (), True)


def test_a_graph_is_recorded_after_one_plain_run(run):
    driver, bound = run
    plan = Plain()
    call = PlanStage("s", plan, GraphRecorder(driver)).bind(bound)
    for _ in range(5):
        call()
    (context,) = plan.contexts
    place = bound.inputs["x"].address
    assert context.told == [("x", (1,)), ("x", place), ("y", place)]  # before the first run
    assert context.runs == 2  # one plain, one while recording
    assert len([entry for entry in driver.log if entry[0] == "graph"]) == 4


def test_what_tensorrt_cannot_capture_runs_plainly(run):
    driver, bound = run
    plan = Plain(capturable=False)
    call = PlanStage("s", plan, GraphRecorder(driver)).bind(bound)
    for _ in range(5):
        call()
    assert plan.contexts[0].runs == 5
    assert driver.log == []


def test_every_graph_has_a_context_of_its_own(run):
    driver, bound = run
    plan = Plain()
    stage = PlanStage("s", plan, GraphRecorder(driver))
    passing = dataclasses.replace(bound, repeatable=False)
    for call in [stage.bind(bound), stage.bind(bound), stage.bind(passing), stage.bind(passing)]:
        for _ in range(3):
            call()
    assert [context.runs for context in plan.contexts] == [2, 2, 6]


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_a_prompt_after_decoding_leaves_captured_contexts_alone(tiny, target):
    """Embedding and positions have one profile for prompts and decoding; and so have all plans
    that were built with --single-profile. The fake device fails where a captured context changes.
    """
    made = tiny("llama", target=target, precision="fp16")
    manifest = made.engine.manifest
    backend, _ = fake_backend(made, single=True)
    for _ in range(2):
        mine, session = tokens_of(backend, manifest, PROMPT, 4)
        session.extend(PROMPT)
        session.predict(NoExit())
    theirs, _ = tokens_of(made.engine.backend, manifest, PROMPT, 4)
    assert mine == theirs


def test_the_fake_device_notices_what_graphs_forbid(layer_run):
    """What the tests above rely on."""
    stage, bound, driver = layer_run
    context = stage._plan.context(stage._profile(bound), fixed_shapes=True)
    for name, tensor in bound.inputs.items():
        context.set_input_shape(name, tensor.shape)
    for name, tensor in (*bound.inputs.items(), *bound.outputs.items()):
        context.set_address(name, tensor.address)
    with pytest.raises(AssertionError, match="the first run after a change of shapes is captured"):
        driver.record(context.enqueue)
    driver._recording = None
    context.enqueue()
    with pytest.raises(AssertionError, match="hidden is set within a capture"):
        driver.record(lambda: context.set_address("hidden", bound.inputs["hidden"].address))
    driver._recording = None
    driver.record(context.enqueue)
    for change in (
        lambda: context.set_input_shape("hidden", bound.inputs["hidden"].shape),
        lambda: context.set_address("hidden", bound.inputs["hidden"].address),
        context.enqueue,
    ):
        with pytest.raises(AssertionError, match="a graph was captured from"):
            change()


def test_a_plan_that_was_changed_is_not_loaded(tiny):
    made = tiny("llama", target="tensorrt", precision="fp16")
    backend, _ = fake_backend(made)
    stages, file = backend._stages, made.engine.manifest.embed.file
    del stages._loaded[file]
    record = stages.stamp.plans[file].model_copy(update={"sha256": "0" * 64})
    stages.stamp = stages.stamp.model_copy(update={"plans": {file: record}})
    match = r"embed.onnx is not the plan that was built .*: remove it, then run `adainfer build"
    with pytest.raises(PlanError, match=match):
        stages.load(file)


def test_what_the_device_does_not_have_is_said(tiny):
    made = tiny("llama", target="onnx-std")
    backend, _ = fake_backend(made)
    hidden = np.zeros(64, np.float32)
    with pytest.raises(ExitUnavailableError, match="target onnx-std has no shortlist"):
        backend.shortlist(hidden)
    with pytest.raises(ExitUnavailableError, match="target onnx-std has no kv_fill stages"):
        backend.kv_fill(1, hidden[None], 0)


def test_a_profiled_device_gives_the_same(tiny):
    made = tiny("llama", target="onnx-std")
    backend, _ = fake_backend(made)
    clock, seconds = StageClock(), {}
    with clock.into(seconds):
        mine, _ = tokens_of(ProfiledBackend(backend, clock), made.engine.manifest, PROMPT, 4)
    theirs, _ = tokens_of(backend, made.engine.manifest, PROMPT, 4)
    assert mine == theirs
    assert set(seconds) == {"embed", "layers", "probe"}


def on_a_device(monkeypatch, made):
    """`--device cuda` of the folder gives the fake device, which calls itself an Orin."""
    backend, driver = fake_backend(made)
    orin = GpuInfo("Orin", 87, 8 << 30, "12.6")
    for module in (bench, certificate):
        monkeypatch.setattr(module, "find_gpu", lambda: orin)
    load = engine_module.load_backend

    def load_backend(folder, manifest, *, device, **rest):
        return backend if device == "cuda" else load(folder, manifest, device=device, **rest)

    monkeypatch.setattr(engine_module, "load_backend", load_backend)
    return driver


def test_stage_times_are_taken_from_an_idle_device_to_an_idle_device(tiny, monkeypatch):
    made = tiny("llama", target="tensorrt", precision="fp16")
    driver = on_a_device(monkeypatch, made)
    engine = Engine.load(made.folder, "cuda")
    read = []

    def clock():
        assert not driver.busy, "the clock is read while work is still on the stream"
        read.append(len(driver.log))
        return float(len(driver.log))

    monkeypatch.setattr(bench.time, "perf_counter", clock)
    times = measure_times(engine, repeats=1)
    assert len(read) > 20
    assert all(seconds > 0 for seconds in (*times.layer, times.step, times.probe, times.candidates))
    assert times.rows[-1] == 16  # what a pass on the device carries


def test_bench_on_a_device_is_what_its_planner_reads(tiny, tmp_path, monkeypatch):
    made = tiny("llama", target="tensorrt", precision="fp16")
    folder = tmp_path / "engines"
    shutil.copytree(made.folder, folder)
    on_a_device(monkeypatch, made)
    run, app = CliRunner().invoke, build_app()
    done = run(app, ["bench", str(folder), "--device", "cuda", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    known = load_manifest(folder).plan
    assert known.machine == Machine(device_class="gpu-sm87", processor="Orin", threads=1)
    done = run(app, ["plan", str(folder), "--device", "cuda", "--prompt-tokens", "8", "--json"])
    assert json.loads(done.stdout)[0]["modes"]["off"]["seconds"] > 0
    assert Engine.load(folder, "cuda").policy("auto", shape=RequestShape(8)).checks == ()
    # The same folder on the CPU: these times say nothing there.
    match = r"times are of gpu-sm87, this is cpu-\w+: run `adainfer bench DIR`$"
    with pytest.raises(ExitUnavailableError, match=match):
        Engine.load(folder).policy("auto", shape=RequestShape(8))
