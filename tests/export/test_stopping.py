"""Commands that are stopped."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import typer
from typer.testing import CliRunner

from adainfer_export.stopping import stoppable
from adainfer_runtime.commands.app import build_app


def stop_by(number):
    os.kill(os.getpid(), number)
    time.sleep(10)  # the signal comes first
    pytest.fail("not stopped")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_with_one_line(capsys, number, status):
    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as caught, stoppable():
        try:
            stop_by(number)
        except KeyboardInterrupt as stop:
            stop.add_note("nothing was kept")
            raise
    assert caught.value.exit_code == status
    assert capsys.readouterr().err == "stopped; nothing was kept\n"
    assert signal.getsignal(number) == before


def test_an_import_that_a_signal_ends_is_no_error(capsys):
    """Compiled modules turn the interrupt into an ImportError."""
    with pytest.raises(typer.Exit) as caught, stoppable():
        try:
            stop_by(signal.SIGTERM)
        except KeyboardInterrupt as stop:
            raise ImportError("initialization failed") from stop
    assert caught.value.exit_code == 143
    assert capsys.readouterr().err == "stopped\n"


def test_other_errors_are_the_commands_own():
    with pytest.raises(ImportError), stoppable():
        raise ImportError("missing")


def test_threads_have_no_signals():
    seen = []

    def work():
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], "nothing was kept: --resume keeps what is finished"),
        (["--resume"], "what is finished was kept for --resume"),
    ],
)
def test_an_export_that_is_terminated_says_what_it_keeps(
    checkpoint, tmp_path, monkeypatch, options, kept
):
    from adainfer_export import writer

    def terminated(self, plan):
        stop_by(signal.SIGTERM)

    # Not in another thread: the interrupt is the main one's.
    monkeypatch.setattr(
        writer.DataWriter, "write_all", lambda self, plans, *_: terminated(self, plans)
    )
    command = ["export", str(checkpoint), "--out", str(tmp_path / "out"), "--calibration", "none"]
    done = CliRunner().invoke(build_app(), [*command, *options])
    assert done.exit_code == 143
    assert done.stderr.endswith(f"stopped; {kept}\n")
    assert len(list(tmp_path.glob(".out.*"))) == len(options)


def test_a_calibration_that_is_stopped_leaves_the_folder(tiny, monkeypatch):
    from adainfer_export.calibrate import pipeline

    def interrupted(*_):
        stop_by(signal.SIGINT)

    monkeypatch.setattr(pipeline, "calibrate", interrupted)
    folder = tiny("llama").folder
    done = CliRunner().invoke(build_app(), ["calibrate", str(folder)])
    assert done.exit_code == 130
    assert done.stderr == f"stopped; {folder} was left as it is\n"
