"""Outputs that cannot be written are found out before the work."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adainfer_runtime.commands import evaluate as eval_command
from adainfer_runtime.commands import plan as plan_command
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.engine_folder import load_manifest, replace_manifest
from adainfer_runtime.errors import OutputError, RequestError
from adainfer_runtime.evaluation import AnswerLog
from adainfer_runtime.evaluation.answers import Answer, ask
from adainfer_runtime.evaluation.methods import Method
from adainfer_runtime.output_files import require_writable_file, require_writable_folder
from adainfer_runtime.tasks import TaskExample

NOWHERE = Path("/proc/adainfer/out")


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny("llama").folder, tmp_path / "engines")
    return tmp_path / "engines"


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"x {n}:"}) + "\n" for n in range(3)))
    return path


@pytest.fixture
def answer(tiny) -> Answer:
    engine = tiny("llama").engine
    method = Method.of("off", engine, engine.policy("off"))
    return ask(method, TaskExample(prompt="x:", task="x"), labels_only=False)


def never(*arguments, **settings):
    raise AssertionError("the work began")


def full_disk(monkeypatch, name):
    """Writing the text of files of this name fails."""
    write = Path.write_text

    def refuse(self, *arguments, **settings):
        if self.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments, **settings)

    monkeypatch.setattr(Path, "write_text", refuse)


def test_a_check_leaves_no_trace(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("kept")
    for path in (new, old):
        require_writable_file(path)
    require_writable_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert old.read_text() == "kept"


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    require_writable_file(tmp_path / "pipe")  # opening it would wait for a reader


def test_what_cannot_be_written(tmp_path):
    for path in (NOWHERE, tmp_path):
        with pytest.raises(OutputError, match=f"{path} cannot be written: "):
            require_writable_file(path)
    with pytest.raises(OutputError, match=r"cannot be written: No such file"):
        require_writable_folder(NOWHERE)


@pytest.mark.parametrize("option", ["--json", "--plots"])
def test_eval_checks_its_outputs_first(folder, tasks, monkeypatch, option):
    monkeypatch.setattr(eval_command, "evaluate", never)
    arguments = ["eval", str(folder), "--tasks", str(tasks), option, str(NOWHERE)]
    done = CliRunner().invoke(build_app(), arguments)
    assert isinstance(done.exception, OutputError)


def test_eval_shows_its_tables_even_if_the_disk_is_full(folder, tasks, tmp_path, monkeypatch):
    full_disk(monkeypatch, "report.json")
    arguments = ["eval", str(folder), "--tasks", str(tasks), "--methods", "fixed:2"]
    done = CliRunner().invoke(build_app(), [*arguments, "--json", str(tmp_path / "report.json")])
    assert isinstance(done.exception, OutputError)
    assert "layers saved" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "engines", "--tasks", "x", "--limit", "-1"],
        ["eval", "engines", "--tasks", "x", "--threads", "0"],
        ["export", "x", "--out", "y", "--max-seq-len", "0"],
        ["export", "x", "--out", "y", "--block-size", "0"],
        ["export", "x", "--out", "y", "--workers", "0"],
    ],
)
def test_counts_have_minimums(arguments):
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[-2]}'" in done.output


def test_a_full_disk_keeps_the_manifest(folder, monkeypatch):
    manifest = load_manifest(folder)
    full_disk(monkeypatch, ".manifest.json.partial")
    with pytest.raises(OutputError, match="No space left on device; it was left as it is"):
        replace_manifest(folder, manifest)
    assert load_manifest(folder) == manifest


def test_bench_checks_the_folder_first(folder, monkeypatch):
    monkeypatch.setattr(plan_command, "measure_times", never)

    def refuse(folder):
        raise OutputError("read-only")

    monkeypatch.setattr(plan_command, "require_writable_folder", refuse)
    done = CliRunner().invoke(build_app(), ["bench", str(folder)])
    assert isinstance(done.exception, OutputError)


def test_a_log_that_cannot_be_added_to(tmp_path, tiny, answer, monkeypatch):
    log = AnswerLog.open(tmp_path / "log.jsonl", tiny("llama").engine.manifest, {})

    def refuse(self, *arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match="No space left"):
        log.add(answer)


def test_a_log_is_tried_when_it_is_opened(tmp_path, tiny, monkeypatch):
    path, manifest = tmp_path / "log.jsonl", tiny("llama").engine.manifest
    AnswerLog.open(path, manifest, {})
    opened = Path.open

    def refuse(self, mode="r", *arguments, **settings):
        if "a" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(self, mode, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RequestError, match="cannot be used as a log"):
        AnswerLog.open(path, manifest, {})
