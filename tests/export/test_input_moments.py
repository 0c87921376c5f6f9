"""What linear layers are given, against transformers, and exports that round by it."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adainfer_export import ExportRequest, export, input_moments
from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.errors import OutputError, UnsupportedError
from adainfer_export.input_moments import InputMoments
from adainfer_export.lower import PRECISIONS
from adainfer_export.sources import resolve
from adainfer_export.storage import StorageRequest
from adainfer_runtime import Engine
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.engine_folder import QUANTISATION_REPORT, load_manifest

from ..checkpoints import VARIANTS, make_checkpoint
from .test_resume import Spy, remains

PROMPTS = [[5, 17, 200, 43, 9, 120, 77], [31, 250, 8, 61], [13]]
GPTQ = StorageRequest(rounding="gptq")


def hooked(model):
    """Second moments of the inputs of a reference model's linear layers, by weight."""
    moments = {}

    def add(name):
        def hook(_, given, __):
            rows = given[0].reshape(-1, given[0].shape[-1]).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        return hook

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(add(f"{name}.weight"))
    with torch.no_grad():
        for prompt in PROMPTS:
            model(torch.tensor([prompt]))
    return moments


def close(found, expected):
    if found.shape != expected.shape:
        return False
    return bool(np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_moments_are_those_of_transformers(variant, tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    by_name = {name: moment.numpy() for name, moment in hooked(model).items()}
    expected = list(by_name.values())
    monkeypatch.setattr(
        input_moments.ErrorFeedback, "of", classmethod(lambda _, second: second.copy())
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    precision = replace(PRECISIONS["int4"], block_size=16)
    moments = InputMoments(resolve(str(tmp_path / "checkpoint")), precision, 16, scratch)
    seen = {}
    for names, second in moments.feedbacks(PROMPTS, moments.tensors):
        seen |= dict.fromkeys(names, second)
    assert seen.keys() == moments.tensors
    same = seen.keys() & by_name.keys()  # all but views: parts of a fused matrix, a tied head
    assert all(close(seen[name], by_name[name]) for name in same)
    assert len(same) >= 8 or model.config.model_type == "gpt_neox"
    assert all(any(close(found, moment) for found in seen.values()) for moment in expected)
    assert all(any(close(found, moment) for moment in expected) for found in seen.values())
    assert {path.name for path in scratch.rglob("*.data")} <= {"shared.data"}


def test_only_what_is_wanted_is_run(checkpoint, tmp_path):
    (tmp_path / "scratch").mkdir()
    source = resolve(str(checkpoint))
    moments = InputMoments(source, PRECISIONS["int4"], 64, tmp_path / "scratch")
    wanted = {"model.layers.1.mlp.down_proj.weight"}
    assert [set(names) for names, _ in moments.feedbacks(PROMPTS, wanted)] == [wanted]
    assert not list(moments.feedbacks(PROMPTS, set()))


def rounded(checkpoint, out, **settings):
    return export(ExportRequest(str(checkpoint), out, **{"storage": GPTQ, **settings})).manifest


def logits_error(folder, model):
    engine, total = Engine.load(folder), 0.0
    for example in builtin_examples(7)[::100]:
        prompt = engine.tokenizer.encode(example.prompt)[:100]
        with engine.borrow() as session, torch.no_grad():
            session.extend(prompt)
            session.complete()
            found = engine.backend.probe_logits(session.hidden())
            total += float(np.square(found - model(torch.tensor([prompt])).logits[0].numpy()).sum())
    return total


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gpt2", "phi3-pruned"])
def test_an_export_is_nearer_to_its_checkpoint(variant, tmp_path):
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    manifest = rounded(tmp_path / "checkpoint", tmp_path / "gptq")
    assert manifest.quantisation.rounding == "gptq"
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "nearest"))
    errors = [logits_error(tmp_path / name, model) for name in ("nearest", "gptq")]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic", "ort-cuda"])
def test_other_targets_round_so_as_well(target, checkpoint, tmp_path):
    made = rounded(checkpoint, tmp_path / "gptq", target=target)
    nearest = export(ExportRequest(str(checkpoint), tmp_path / "nearest", target=target)).manifest
    names = [name for name in made.files if name.startswith("stages/layer") and "data" in name]
    assert names
    assert all(made.files[name].bytes == nearest.files[name].bytes for name in names)
    assert all(made.files[name].sha256 != nearest.files[name].sha256 for name in names)


def matrices(folder):
    report = json.loads((folder / QUANTISATION_REPORT).read_text())
    return {tuple(m["tensors"]): m["relative_error"] for m in report["matrices"]}


def test_layers_of_one_file_are_rounded_as_those_of_their_own(checkpoint, tmp_path):
    rounded(checkpoint, tmp_path / "one")
    rounded(checkpoint, tmp_path / "three", layers_per_engine=3)
    nearest = export(ExportRequest(str(checkpoint), tmp_path / "nearest"))
    found = matrices(tmp_path / "one")
    assert matrices(tmp_path / "three") == found != matrices(nearest.out)


def test_padded_widths(tmp_path):
    """Feed-forward networks of 96 in blocks of 64: 32 inputs of `down` are always zero."""
    model = make_checkpoint(tmp_path / "checkpoint", intermediate_size=96)
    errors = []
    for rounding in ("nearest", "gptq"):
        out = tmp_path / rounding
        storage = StorageRequest(block_size=64, rounding=rounding)
        rounded(tmp_path / "checkpoint", out, storage=storage)
        errors.append(logits_error(out, model))
    assert errors[1] < 0.8 * errors[0]


def test_files_are_given_up_as_they_come(checkpoint, tmp_path, monkeypatch):
    """No more than a layer's factors are alive while the next layer runs."""
    made, run = [], input_moments.InputMoments._run
    make, most = input_moments.ErrorFeedback.of.__func__, []

    def of(cls, second):
        feedback = make(cls, second)
        made.append(weakref.ref(feedback))
        return feedback

    def counted(self, *arguments):
        most.append(sum(one() is not None for one in made))
        return run(self, *arguments)

    monkeypatch.setattr(input_moments.ErrorFeedback, "of", classmethod(of))
    monkeypatch.setattr(input_moments.InputMoments, "_run", counted)
    rounded(checkpoint, tmp_path / "out", workers=1)
    assert len(made) > 12
    assert max(most) == 0


def test_resumed_in_the_same_bytes_without_running_finished_layers(
    checkpoint, tmp_path, monkeypatch
):
    whole = rounded(checkpoint, tmp_path / "whole")
    write = input_moments.InputMoments._run
    ran = []

    def stops(self, stage, states, taps):
        ran.append((stage.name, len(taps)))
        if stage.name == "layer_003" and len(ran) < 6:
            raise KeyboardInterrupt
        return write(self, stage, states, taps)

    monkeypatch.setattr(input_moments.InputMoments, "_run", stops)
    with pytest.raises(KeyboardInterrupt):
        rounded(checkpoint, tmp_path / "out", resume=True)
    (left,) = remains(tmp_path)
    assert not list(left.glob("rounding-*"))
    ran.clear()
    ran += [("", 0)] * 6
    spy = Spy(monkeypatch)
    resumed = rounded(checkpoint, tmp_path / "out", resume=True)
    assert resumed.files == whole.files
    assert {"layer_001.data", "layer_002.data"} <= set(spy.written)  # the float ones, to run them
    assert [taps for name, taps in ran if name in ("layer_001", "layer_002")] == [0, 0]


def test_another_rounding_cannot_be_restored(checkpoint, tmp_path):
    manifest = rounded(checkpoint, tmp_path / "out")
    damaged = tmp_path / "out" / "stages" / "layer_002.data"
    content = damaged.read_bytes()
    damaged.write_bytes(b"x" * len(content))
    with pytest.raises(OutputError, match="has quantisation"):
        export(ExportRequest(str(checkpoint), tmp_path / "out", layers=(2, 2)))
    rounded(checkpoint, tmp_path / "out", layers=(2, 2))
    assert damaged.read_bytes() == content
    assert load_manifest(tmp_path / "out") == manifest


def test_needs_a_tokenizer_and_four_bits(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    with pytest.raises(UnsupportedError) as caught:
        rounded(tmp_path / "checkpoint", tmp_path / "out")
    assert str(caught.value) == (
        "--rounding gptq runs the model on prompts, and the checkpoint has no tokenizer; export "
        "with --rounding nearest"
    )
    assert not (tmp_path / "out").exists()
    arguments = ["export", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(
        build_app(), [*arguments, "--precision", "int8", "--rounding", "gptq"]
    )
    assert str(done.exception) == "--rounding gptq is for int4, not int8"


def test_sensitive_layers_go_to_their_nearest_codes(checkpoint, tmp_path):
    storage = replace(GPTQ, int8_layers=frozenset({2}))
    made = rounded(checkpoint, tmp_path / "gptq", storage=storage)
    plain = replace(storage, rounding="nearest")
    nearest = rounded(checkpoint, tmp_path / "nearest", storage=plain)
    same = {name for name in made.files if made.files[name] == nearest.files[name]}
    assert "stages/layer_002.data" in same
    assert "stages/layer_001.data" not in same
