"""What an engine folder is compared with."""

from __future__ import annotations

import shutil

import pytest

from adainfer_export import ExportRequest, export
from adainfer_export import validate as validate_module
from adainfer_export.errors import SourceError
from adainfer_export.validate import validate_folder
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.manifest import SourceSpec


def test_a_local_checkpoint_must_be_named(tiny, tmp_path, monkeypatch):
    """Its name alone may be another folder's here, or an alias."""
    made = tiny("llama")
    shutil.copytree(made.checkpoint, tmp_path / made.checkpoint.name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as caught:
        validate_folder(made.folder)
    assert str(caught.value) == (
        f"{made.folder} was exported from a local checkpoint, checkpoint: say where it is with "
        "--reference CHECKPOINT"
    )
    assert validate_folder(made.folder, str(made.checkpoint)).passed


def test_a_decoder_in_onnx_is_no_reference(tiny, tmp_path):
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(SourceError, match="give the checkpoint that it was made of"):
        validate_folder(tiny("llama").folder, str(tmp_path))


@pytest.mark.parametrize(
    ("source", "fetched"),
    [
        (SourceSpec(kind="huggingface", id="a/b", revision="123"), True),
        (SourceSpec(kind="gguf", id="smollm2-135m", revision="package==1"), True),
        (SourceSpec(kind="gguf", id="m.gguf"), False),
        (SourceSpec(kind="onnx", id="engines"), False),
    ],
)
def test_what_was_fetched_is_fetched_again(tiny, tmp_path, monkeypatch, source, fetched):
    made, asked = tiny("llama"), []
    shutil.copytree(made.folder, tmp_path / "engines")
    manifest = load_manifest(made.folder).model_copy(update={"source": source})
    write_manifest(tmp_path / "engines", manifest)
    resolve = validate_module.resolve

    def resolved(model, *, revision=None):
        asked.append((model, revision))
        return resolve(str(made.checkpoint))

    monkeypatch.setattr(validate_module, "resolve", resolved)
    if fetched:
        assert validate_folder(tmp_path / "engines").passed
        # Packages have no revisions to ask for.
        assert asked == [(source.id, "123" if source.kind == "huggingface" else None)]
    else:
        with pytest.raises(SourceError, match="--reference CHECKPOINT"):
            validate_folder(tmp_path / "engines")


def test_the_working_directory_has_a_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint)
    manifest = export(ExportRequest(".", tmp_path / "out", precision="fp32")).manifest
    assert manifest.source.id == "checkpoint"
