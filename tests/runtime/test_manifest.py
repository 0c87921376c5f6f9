"""Damaged, tampered and foreign engine folders."""

from __future__ import annotations

import json
import shutil

import pytest

from adainfer_runtime import AdaInferError, Engine
from adainfer_runtime.engine_folder import load_manifest, replace_manifest, verify_files
from adainfer_runtime.errors import (
    DeviceError,
    IntegrityError,
    ManifestError,
    OutputError,
    SchemaVersionError,
    StageError,
    UnsafePathError,
)


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny("llama").folder, tmp_path / "engines")
    return tmp_path / "engines"


def edit(folder, change):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def fails(expected, folder, match, **settings):
    with pytest.raises(expected, match=match) as caught:
        Engine.load(folder, **settings)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AdaInferError)


def test_round_trip(folder):
    manifest = load_manifest(folder)
    verify_files(folder, manifest, sha256=True)
    assert manifest.boundaries == (1, 2, 3, 4)
    assert type(manifest).model_validate_json(manifest.model_dump_json()) == manifest
    listed = {f"{p.relative_to(folder)}" for p in folder.rglob("*") if p.is_file()}
    assert listed == {*manifest.files, "manifest.json"}


def test_no_engine_folder(tmp_path):
    fails(ManifestError, tmp_path, "is no engine folder: manifest.json is missing")


def test_manifest_that_is_no_json(folder):
    (folder / "manifest.json").write_text("{")
    fails(ManifestError, folder, "cannot be read")


def test_unknown_schema_version(folder):
    edit(folder, lambda data: data.update(schema_version=99))
    fails(SchemaVersionError, folder, "schema version 99 is unknown, this runtime reads 5")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_manifest_that_is_no_object(folder, content):
    (folder / "manifest.json").write_text(content)
    fails(ManifestError, folder, r"manifest\.json is no JSON object")


def test_the_manifest_in_place_of_its_folder(folder):
    match = f"manifest.json is a file, no engine folder: give the folder that it is in, {folder}$"
    fails(ManifestError, folder / "manifest.json", match)
    other = folder.parent / "other.json"
    other.touch()
    fails(ManifestError, other, r"other\.json is a file, no engine folder$")


@pytest.mark.parametrize("token", [-1, 999999, 320])
def test_ends_that_are_no_tokens(folder, token):
    edit(folder, lambda data: data["model"].update(eos_token_ids=[1, token]))
    fails(ManifestError, folder, f"eos_token_ids: {token} is no token of 320")


@pytest.mark.parametrize(
    ("precision", "bits"), [("fp32", 4), ("keep", 8), ("int8", 4), ("int4", None)]
)
def test_precision_and_quantisation_go_together(folder, precision, bits):
    def change(data):
        data["precision"] = precision
        data["quantisation"] = None if bits is None else {"bits": bits, "block_size": 32}

    edit(folder, change)
    fails(ManifestError, folder, f"precision {precision} with quantisation of {bits} bits")


def test_unknown_key(folder):
    edit(folder, lambda data: data.update(surprise=1))
    fails(ManifestError, folder, "surprise: Extra inputs are not permitted")


def test_wrong_checksum(folder):
    def change(data):
        data["files"]["stages/probe.onnx"]["sha256"] = "0" * 64

    edit(folder, change)
    fails(IntegrityError, folder, r"probe\.onnx has sha256 .*, expected 0000", verify=True)


def test_tampered_weights(folder):
    path = folder / "stages" / "layer_002.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    Engine.load(folder)  # sizes alone do not show it
    fails(IntegrityError, folder, r"layer_002\.data has sha256", verify=True)


def test_truncated_and_missing_files(folder):
    path = folder / "stages" / "layer_002.data"
    path.write_bytes(path.read_bytes()[:-1])
    fails(IntegrityError, folder, r"layer_002\.data has \d+ bytes, expected")
    path.unlink()
    fails(IntegrityError, folder, r"layer_002\.data is missing")


@pytest.mark.parametrize("bad", ["../outside.onnx", "/etc/passwd", "stages\\..\\x", "a/../../b"])
def test_path_that_leaves_the_folder(folder, bad):
    edit(folder, lambda data: data["stages"][1].update(file=bad))
    fails(UnsafePathError, folder, "leaves the engine folder")


def test_link_that_leaves_the_folder(folder, tmp_path):
    (tmp_path / "outside").write_text("x")
    (folder / "stages" / "probe.onnx").unlink()
    (folder / "stages" / "probe.onnx").symlink_to(tmp_path / "outside")
    fails(UnsafePathError, folder, "leaves the engine folder")


def test_stages_that_do_not_fit_together(folder):
    edit(folder, lambda data: data["stages"].pop(2))
    fails(ManifestError, folder, "kv_fill stages for 3 of 4 layers")


def test_a_layer_that_is_missing(folder):
    edit(folder, lambda data: data["stages"].pop(3))
    fails(ManifestError, folder, "does not continue at layer 2")


def test_exit_point_between_no_engines(folder):
    spec = {"points": [{"exit_layer": 4}], "target_agreement": 0.9, "threshold": 0.0,
            "classifier": {"kind": "svm", "graph": "g", "reference": "r", "state_size": 1,
                           "features": ["gap"]}}  # fmt: skip
    edit(folder, lambda data: data.update(exit=spec))
    fails(ManifestError, folder, "exit point 4 is no boundary")


def test_unknown_device(folder):
    fails(DeviceError, folder, "run on cpu, not on 'cuda'", device="cuda")


def test_stage_that_is_no_graph(folder):
    path = folder / "stages" / "layer_001.onnx"
    path.write_bytes(b"x" * path.stat().st_size)
    fails(StageError, folder, r"layer_001\.onnx cannot be loaded by ONNX Runtime")


def test_damaged_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text("x" * path.stat().st_size)
    fails(ManifestError, folder, "is no tokenizer")


def test_layers_have_heads_of_their_own(tiny):
    manifest = tiny("llama-pruned").engine.manifest
    assert [manifest.kv.heads(layer) for layer in (1, 2, 3, 4)] == [2, 1, 2, 2]
    assert [manifest.model.attention_heads(layer) for layer in (1, 2, 3, 4)] == [4, 2, 4, 4]
    assert tiny("llama").engine.manifest.kv.layer_heads == ()


def test_heads_of_too_few_layers(folder):
    edit(folder, lambda data: data["kv"].update(layer_heads=[2, 2]))
    fails(ManifestError, folder, "heads of 2 layers, expected 4")


def test_a_manifest_that_cannot_be_written(folder, monkeypatch):
    manifest, before = load_manifest(folder), (folder / "manifest.json").read_bytes()

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(
        OutputError, match="cannot be written: No space left on device; it was left"
    ):
        replace_manifest(folder, manifest)
    assert (folder / "manifest.json").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_a_folder_in_a_files_place(folder):
    (folder / "stages" / "layer_002.data").unlink()
    (folder / "stages" / "layer_002.data").mkdir()
    fails(IntegrityError, folder, r"layer_002\.data is missing")
