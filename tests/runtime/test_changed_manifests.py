"""Manifests with one field changed: an error meant for the user, or an engine that works."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_runtime import AdaInferError, DecodeOptions, Engine
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.errors import ManifestError, PromptTooLongError, StageError, UnsafePathError
from adainfer_runtime.plan_spec import PlanSpec
from adainfer_runtime.planning import RequestShape, machine, measure_times
from tests.export.exit_folder import make_exit_folder

PROMPT = "7 3: x 2: y 1: and"
MODES = ("off", "adaptive", "context", "combined", "auto", "verified")
# What a field may be changed to: of every type, at and beyond every bound.
VALUES = (
    None, True, 0, 1, 2, 3, 5, -1, 127, 129, 1 << 20, 1 << 31, 1 << 63, 10**30, -0.5, 0.25, 1e308,
    float("nan"), float("inf"), "", ".", "x", "\0", "a\nb", "hidden", "rows", "x" * 5000, "../x",
    "stages/probe.onnx", "float16", "prefix", [], [0], [1, 2], ["x"], {}, {"x": 1}, {"1": [0.5]},
)  # fmt: skip
# Said of an export, and read by nobody who runs it.
UNREAD = {"exporter", "source", "calibration"}


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """One with exits of every kind and a plan, one of another dialect; and their manifests."""
    root = tmp_path_factory.mktemp("changed")
    full, plain = root / "full", root / "plain"
    make_exit_folder(tiny("llama").folder, full)
    write_manifest(full, measured(full, with_shares(load_manifest(full))))
    shutil.copytree(tiny("llama", target="onnx-std").folder, plain)
    return {
        folder.name: (folder, json.loads((folder / "manifest.json").read_text()))
        for folder in (full, plain)
    }


def with_shares(manifest):
    """What a calibration writes of thresholds, so that modes can be forecast."""

    def shared(spec):
        rows = [[0.1] * len(spec.points), [0.2] * len(spec.points)]
        by_length = [{"tokens": n, "prompts": 60, "exit_shares": rows} for n in (4, 9)]
        given = {"thresholds": [1.0, 0.0], "exit_shares": rows, "length_shares": by_length}
        return spec.model_validate(spec.model_dump() | given)

    return manifest.model_copy(
        update={
            "exit": shared(manifest.exit),
            "choice_exit": shared(manifest.choice_exit),
            "context_exit": shared(manifest.context_exit),
        }
    )


def measured(folder, manifest):
    times = measure_times(Engine.load(folder), repeats=1, most_rows=4)
    return manifest.model_copy(update={"plan": PlanSpec(machine=machine(None), times=times)})


def places(value, path=()):
    """Paths of everything in a manifest that a runtime reads."""
    if path and path[-1] in UNREAD:
        return
    if path:
        yield path
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in inner:
            yield from places(part, (*path, key))


def changed(data, path, value):
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


def use(engine):
    """Whatever requests do; each is answered, or refused by an error meant for the user."""
    for mode in MODES:
        with suppress(AdaInferError):
            engine.generate(PROMPT, max_new_tokens=3, mode=mode, ignore_eos=True)
    for kv_policy in ("propagate", "translated"):
        decode = DecodeOptions(kv_policy=kv_policy)
        with suppress(AdaInferError):
            engine.generate(PROMPT, max_new_tokens=3, mode="adaptive", decode=decode)
    for request in (
        lambda: engine.generate_batch([PROMPT, PROMPT + " 5"], max_new_tokens=3),
        lambda: engine.choose(PROMPT, labels=["x", "y"], mode="adaptive"),
        lambda: engine.generate([5] * 129, max_new_tokens=1),
        lambda: engine.forecasts(RequestShape(20, 3)),
        engine.decode_forecasts,
    ):
        with suppress(AdaInferError):
            request()
    repr(engine)


def try_out(folder, data):
    (folder / "manifest.json").write_text(json.dumps(data))
    try:
        engine = Engine.load(folder)
    except AdaInferError as error:
        assert str(error)
        return
    use(engine)


def test_folders_work_as_they_are(folders):
    for folder, data in folders.values():
        (folder / "manifest.json").write_text(json.dumps(data))
        with Engine.load(folder) as engine:
            assert len(engine.generate(PROMPT, max_new_tokens=3, ignore_eos=True).tokens) == 3
            modes = MODES if folder.name == "full" else MODES[:1]
            for mode in modes:
                engine.generate(PROMPT, max_new_tokens=3, mode=mode)


@settings(max_examples=300)
@given(data=st.data())
@pytest.mark.parametrize("name", ["full", "plain"])
def test_a_changed_field_is_refused_or_does_no_harm(folders, name, data):
    folder, manifest = folders[name]
    path = data.draw(st.sampled_from(list(places(manifest))))
    try_out(folder, changed(manifest, path, data.draw(st.sampled_from(VALUES))))


def refused(folders, path, value, error, match, name="full"):
    folder, manifest = folders[name]
    (folder / "manifest.json").write_text(json.dumps(changed(manifest, path, value)))
    with pytest.raises(error, match=match):
        Engine.load(folder)


@pytest.mark.parametrize("value", [0, -1, 10**30, "x", None])
@pytest.mark.parametrize(
    "path",
    [
        ("max_seq_len",),
        *(("model", name) for name in ("num_layers", "hidden_size", "vocab_size")),
        *(("kv", name) for name in ("num_heads", "head_dim", "max_length")),
    ],
)
def test_sizes_that_no_model_has(folders, path, value):
    refused(folders, path, value, ManifestError, r"\.".join(path))


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("model", "hidden_size"), 65, r"the graph has \[.*64\], the manifest \[.*65\]"),
        (("model", "vocab_size"), 321, r"probe\.logits\.onnx: logits: the graph has \[.*320\]"),
        (("kv", "num_heads"), 3, "past_key.1: the graph has"),
        (("kv", "head_dim"), 17, "past_key.1: the graph has"),
        (("kv", "dtype"), "float16", r"the graph has tensor\(float\), the manifest float16"),
        (("stages", 1, "inputs"), ["hidden"], "inputs: the graph has .*, the manifest hidden"),
        (("stages", 1, "outputs"), [], "outputs: the graph has .*, the manifest none"),
        (("stages", 0, "file"), "stages/probe.onnx", "inputs: the graph has hidden"),
        (("exit", "classifier", "state_size"), 4, "next_state: the graph has"),
        (("context_exit", "points", 0, "translate_inputs"), [], "inputs: the graph has hidden"),
    ],
)
def test_graphs_are_held_against_the_manifest(folders, path, value, match):
    refused(folders, path, value, StageError, match)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("kv", "max_length"), 129, r"the graph has \[.*128, 16\], the manifest \[.*129, 16\]"),
        (("pass_tensors", 0, "dtype"), "float32", r"mask: the graph has tensor\(bool\)"),
        (("pass_tensors", 1, "shape"), [1, "rows", 9], "cos: the graph has"),
        (("stages", 0, "inputs"), ["x"], "inputs: the graph has"),
    ],
)
def test_graphs_of_standard_operators_too(folders, path, value, match):
    refused(folders, path, value, StageError, match, "plain")


def test_positions_that_caches_do_not_hold(folders):
    refused(folders, ("max_seq_len",), 129, ManifestError, "129 does not fit caches of 128")
    folder, manifest = folders["full"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PromptTooLongError, match="129 prompt tokens and 1 new ones do not fit"):
        Engine.load(folder).generate([5] * 129, max_new_tokens=1)


@pytest.mark.parametrize("bad", ["stages/\0", "\0"])
def test_paths_that_no_system_has(folders, bad):
    refused(folders, ("stages", 0, "file"), bad, UnsafePathError, "leaves the engine folder")


def test_a_number_that_python_does_not_read(folders):
    folder, manifest = folders["full"]
    text = json.dumps(changed(manifest, ("max_seq_len",), "BIG"))
    (folder / "manifest.json").write_text(text.replace('"BIG"', "9" * 5000))
    with pytest.raises(ManifestError, match="cannot be read"):
        Engine.load(folder)


def test_a_run_that_fails_names_its_stage(folders):
    """`rows` fixed to one number: no graph says so, and no pass has as many."""
    folder, manifest = folders["plain"]
    bad = changed(manifest, ("pass_tensors", 1, "shape"), [1, 5, 8])
    (folder / "manifest.json").write_text(json.dumps(bad))
    with pytest.raises(StageError, match=r"positions\.onnx cannot be run by ONNX Runtime"):
        Engine.load(folder).generate(PROMPT, max_new_tokens=1)


def test_context_exits_that_were_not_measured_are_not_forecast(folders):
    folder, manifest = folders["full"]
    newer = changed(manifest, ("plan", "times", "context"), {})
    (folder / "manifest.json").write_text(json.dumps(newer))
    forecasts = Engine.load(folder).forecasts(RequestShape(20, 1))
    assert {forecast.mode for forecast in forecasts} == {"off", "adaptive"}
