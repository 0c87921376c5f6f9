"""Exports that were killed go on where they stopped, and end in the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from adainfer_export import ExportRequest, export
from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.errors import OutputError, UnsupportedError
from adainfer_export.storage import StorageRequest
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.engine_folder import load_manifest

from ..checkpoints import edit_config, make_checkpoint

# Kills itself after so many writes to data files: before, in the middle of, and after a file.
KILLED = """
import os, signal, sys
from pathlib import Path
from adainfer_export import ExportRequest, export, writer
left = int(sys.argv[3])
write = writer._DataFile._write
def counted(self, content):
    global left
    write(self, content)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
writer._DataFile._write = counted
export(ExportRequest(sys.argv[1], Path(sys.argv[2]), resume=True, workers=1))
"""


def kill_export(checkpoint, out, after):
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(out), str(after)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()


def remains(tmp_path):
    return [path for path in tmp_path.iterdir() if ".partial-" in path.name]


def run(checkpoint, out, **settings):
    return export(ExportRequest(str(checkpoint), out, **settings)).manifest


class Spy:
    """Names of the data files that are really written."""

    def __init__(self, monkeypatch):
        from adainfer_export import writer

        self.written = []
        open_file = writer._DataFile.__init__

        def opened(file, path):
            self.written.append(path.name)
            open_file(file, path)

        monkeypatch.setattr(writer._DataFile, "__init__", opened)


def test_killed_again_and_again_then_finished(checkpoint, tmp_path, monkeypatch):
    """Three kills at other places, each by an export that resumed the one before."""
    whole = run(checkpoint, tmp_path / "whole")
    out = tmp_path / "out"
    for after in (7, 19, 26):
        kill_export(checkpoint, out, after)
        assert len(remains(tmp_path)) == 1
    spy = Spy(monkeypatch)
    resumed = run(checkpoint, out, resume=True)
    assert resumed == whole
    assert spy.written
    assert len(spy.written) < 7  # embed, shared, 4 layers, probe
    for name in whole.files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not remains(tmp_path)
    assert not (out / "journal.jsonl").exists()


@pytest.fixture
def stopped(checkpoint, tmp_path, monkeypatch):
    """An export with --resume that an interrupt stopped before its probe."""
    from adainfer_export import writer

    write = writer.DataWriter._find_or_write

    def interrupted(self, plan):
        if "probe" in plan.file:
            raise KeyboardInterrupt
        return write(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(writer.DataWriter, "_find_or_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, tmp_path / "out", resume=True, workers=1)
    (folder,) = remains(tmp_path)
    return folder


def test_workers_write_the_same_bytes_and_keep_what_is_finished(checkpoint, tmp_path, monkeypatch):
    """A file that fails ends the export; what others finished meanwhile is not lost."""
    from adainfer_export import writer

    whole = run(checkpoint, tmp_path / "whole", workers=1)
    assert run(checkpoint, tmp_path / "out", workers=4) == whole
    for name in whole.files:
        content = (tmp_path / "out" / name).read_bytes()
        assert content == (tmp_path / "whole" / name).read_bytes()
    write, other = writer.DataWriter._find_or_write, threading.Event()

    def failing(self, plan):
        if "layer_002" in plan.file:
            assert other.wait(60)
            raise OSError(28, "No space left on device")
        written = write(self, plan)
        if "layer_003" in plan.file:
            other.set()
        return written

    with monkeypatch.context() as patch:
        patch.setattr(writer.DataWriter, "_find_or_write", failing)
        with pytest.raises(OutputError, match="what is finished was kept for --resume"):
            run(checkpoint, tmp_path / "third", resume=True, workers=2)
    spy = Spy(monkeypatch)
    assert run(checkpoint, tmp_path / "third", resume=True) == whole
    assert "layer_002.data" in spy.written
    assert not {"embed.data", "layer_001.data", "layer_003.data"} & set(spy.written)
    with pytest.raises(UnsupportedError, match="--workers must be at least 1"):
        run(checkpoint, tmp_path / "fourth", workers=0)


def test_only_what_is_missing_is_written(stopped, checkpoint, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run(checkpoint, tmp_path / "out", resume=True)
    assert spy.written == ["probe.data"]


def test_a_finished_file_that_was_damaged_is_written_again(
    stopped, checkpoint, tmp_path, monkeypatch
):
    path = stopped / "stages" / "layer_002.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    spy = Spy(monkeypatch)
    run(checkpoint, tmp_path / "out", resume=True)
    assert sorted(spy.written) == ["layer_002.data", "probe.data"]


def test_a_line_that_the_kill_cut_short_is_no_line(stopped, checkpoint, tmp_path, monkeypatch):
    journal = stopped / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    spy = Spy(monkeypatch)
    run(checkpoint, tmp_path / "out", resume=True)
    assert len(spy.written) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "it had precision int4, now int8 is asked for"),
        ({"max_seq_len": 64}, "it had max_seq_len 128, now 64 is asked for"),
        ({"layers_per_engine": 2}, "it had layers_per_engine None, now 2 is asked for"),
        ({"storage": StorageRequest(int8_layers=frozenset({2}))}, "it had quantisation"),
        ({"storage": StorageRequest(rounding="gptq")}, "it had quantisation"),
    ],
)
def test_other_settings_are_refused(stopped, checkpoint, tmp_path, settings, message):
    with pytest.raises(OutputError, match=f"cannot be resumed: {message}.*begin anew") as caught:
        run(checkpoint, tmp_path / "out", resume=True, **settings)
    assert "\n" not in str(caught.value)
    run(checkpoint, tmp_path / "out", resume=True)  # nothing was lost


def test_a_changed_source_is_refused(stopped, checkpoint, tmp_path):
    make_checkpoint(checkpoint, seed=1)
    with pytest.raises(OutputError, match="the source's files changed since"):
        run(checkpoint, tmp_path / "out", resume=True)
    run(checkpoint, tmp_path / "out")
    assert not remains(tmp_path)


def test_without_resume_nothing_stays(checkpoint, tmp_path, monkeypatch):
    from adainfer_export import writer

    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer._DataFile, "_write", full)
        with pytest.raises(OutputError, match="what is finished was kept for --resume"):
            run(checkpoint, tmp_path / "out", resume=True)
        assert remains(tmp_path)
        with pytest.raises(OutputError, match="nothing was kept"):
            run(checkpoint, tmp_path / "out")
    assert not remains(tmp_path)


def test_layers_are_restored(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    manifest = run(checkpoint, out)
    before = {name: (out / name).read_bytes() for name in manifest.files}
    for name in ("layer_002", "layer_003"):
        (out / "stages" / f"{name}.data").write_bytes(b"damaged")
    spy = Spy(monkeypatch)
    run(checkpoint, out, layers=(2, 3))
    assert spy.written == ["layer_002.data", "layer_003.data"]
    assert {name: (out / name).read_bytes() for name in manifest.files} == before
    assert load_manifest(out) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_restored_layers_say_nothing_of_calibration(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert export(ExportRequest(str(checkpoint), out)).warnings
    command = ["export", str(checkpoint), "--out", str(out), "--layers", "2-3"]
    done = CliRunner().invoke(build_app(), [*command, "--workers", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["warnings"] == []
    assert export(ExportRequest(str(checkpoint), out, layers=(2, 3))).warnings == ()
    for options in (["--force"], ["--resume"], ["--calibration", "builtin"], ["--entropy"]):
        done = CliRunner().invoke(build_app(), [*command, *options])
        assert isinstance(done.exception, UnsupportedError)
        assert str(done.exception).endswith(f"{options[0]} does not go with it")
    for settings in ({"force": True}, {"resume": True}, {"calibration": CalibrationRequest()}):
        with pytest.raises(UnsupportedError, match="--force, --resume and --calibration do not"):
            run(checkpoint, out, layers=(2, 3), **settings)


def test_layers_of_another_export_are_refused(checkpoint, tmp_path):
    out = tmp_path / "out"
    run(checkpoint, out)
    with pytest.raises(OutputError, match="has precision int4, not int8; give its settings"):
        run(checkpoint, out, layers=(1, 1), precision="int8")
    with pytest.raises(UnsupportedError, match="--layers 4-5: this model has 4"):
        run(checkpoint, out, layers=(4, 5))
    edit_config(checkpoint, bos_token_id=5)
    with pytest.raises(OutputError, match="was exported from other files than"):
        run(checkpoint, out, layers=(1, 1))


def test_layers_of_an_older_exporter_are_refused(checkpoint, tmp_path):
    out = tmp_path / "out"
    run(checkpoint, out)
    path = out / "manifest.json"
    data = json.loads(path.read_text())
    data["files"]["stages/layer_001.onnx"]["sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(OutputError, match="written by other versions"):
        run(checkpoint, out, layers=(1, 1))
