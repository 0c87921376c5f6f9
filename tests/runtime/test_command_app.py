"""How the command is put together: what all subcommands have, and what is missing."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner

from adainfer_runtime.commands.app import build_app, main, run_guarded
from adainfer_runtime.errors import AdaInferError

COMPILER = ("export", "calibrate", "certify", "validate", "list")


@pytest.fixture
def without(monkeypatch):
    """As if a module were not installed, and the compiler not imported yet."""

    def remove(name):
        for known in [known for known in sys.modules if known.startswith("adainfer_export")]:
            monkeypatch.delitem(sys.modules, known)
        monkeypatch.setitem(sys.modules, name, None)

    return remove


def fails(call, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["adainfer", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_guarded(call)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [(), ("run",), ("eval",), ("plan",), ("tasks", "shots"), ("build",), ("export",)]
)
def test_every_command_shows_debug(command):
    assert "--debug" in CliRunner().invoke(build_app(), [*command, "--help"]).output


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_works_anywhere(capsys, monkeypatch, place):
    arguments = ["inspect", "nowhere"]
    arguments.insert(place, "--debug")
    shown = fails(build_app(), capsys, monkeypatch, *arguments)
    assert "Traceback" in shown


def test_plans_are_built_without_the_compilers_libraries(without, capsys, monkeypatch):
    """Of them a device has `onnx` alone (extra `tensorrt`)."""
    for name in ("torch", "transformers", "mobius", "onnx_ir", "scipy", "sklearn", "onnxruntime"):
        without(name)
    error = fails(build_app(), capsys, monkeypatch, "build", "nowhere")
    assert error.startswith("error: nowhere")
    assert import_module("adainfer_export.build.worker")


def test_building_without_onnx_asks_for_no_compiler(without):
    without("onnx")
    done = CliRunner().invoke(build_app(), ["build", "engines"])
    assert str(done.exception) == (
        "the compiler is not installed (onnx is missing): pip install 'adainfer-export[tensorrt]'"
    )


@pytest.mark.parametrize("command", COMPILER)
def test_commands_of_a_missing_compiler_say_what_to_install(without, command):
    without("onnx_ir")
    done = CliRunner().invoke(build_app(), [command, "engines", "--adapters", "none"])
    assert isinstance(done.exception, AdaInferError)
    assert str(done.exception) == (
        "the compiler is not installed (onnx_ir is missing): "
        "pip install 'adainfer-export[cpu,export,gguf]'"
    )


def test_a_broken_compiler_is_told_from_a_missing_one(without):
    without("adainfer_export.cost")
    app = build_app()
    done = CliRunner().invoke(app, ["calibrate", "engines"])
    assert isinstance(done.exception, AdaInferError)
    assert "cannot be loaded: import of adainfer_export.cost halted" in str(done.exception)
    assert isinstance(done.exception.__cause__, ModuleNotFoundError)
    assert CliRunner().invoke(app, ["inspect", "--help"]).exit_code == 0


def test_a_library_that_a_command_imports_late(capsys, monkeypatch):
    def call():
        raise ModuleNotFoundError("No module named 'sklearn.svm'", name="sklearn.svm")

    assert "(sklearn is missing): pip install" in fails(call, capsys, monkeypatch)


def test_other_modules_are_no_matter_of_extras(monkeypatch):
    def call():
        raise ModuleNotFoundError("No module named 'ours'", name="ours")

    monkeypatch.setattr(sys, "argv", ["adainfer"])
    with pytest.raises(ModuleNotFoundError):
        run_guarded(call)


def test_errors_of_the_system_are_one_line(capsys, monkeypatch):
    def call():
        raise OSError(28, "No space left on device")

    assert fails(call, capsys, monkeypatch) == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "x", "--new-tokens", "many"], "Invalid value for '--new-tokens': "),
        (["run", "x"], "Missing option '--prompt'"),
        (["run", "x", "--promt", "y"], "No such option: --promt"),
        (["rum", "x"], "No such command 'rum'"),
    ],
)
def test_errors_of_the_command_line_are_one_line(capsys, monkeypatch, arguments, message):
    shown = fails(main, capsys, monkeypatch, *arguments)
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1
    assert shown.endswith(" --help`)\n")


@pytest.mark.parametrize("arguments", [[], ["tasks"]])
def test_help_in_place_of_a_command_is_no_error(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["adainfer", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "Usage: " in shown.out + shown.err
    assert "error:" not in shown.err


def test_a_commands_exit_status_is_the_programs(monkeypatch):
    app = typer.Typer()

    @app.command()
    def leave() -> None:
        raise typer.Exit(7)

    monkeypatch.setattr(sys, "argv", ["adainfer"])
    with pytest.raises(SystemExit) as caught:
        run_guarded(partial(app, standalone_mode=False))
    assert caught.value.code == 7


def test_closed_streams_are_empty(monkeypatch):
    def call():
        assert sys.stdin.read() == ""
        print("nobody reads this")
        print("nor this", file=sys.stderr)
        assert not sys.stdout.isatty()
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.close()

    monkeypatch.setattr(sys, "argv", ["adainfer"])
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    run_guarded(call)


def test_eval_names_every_method():
    shown = CliRunner().invoke(build_app(), ["eval", "--help"], env={"COLUMNS": "200"}).output
    for method in ("adaptive", "context", "combined", "auto", "fixed:L", "shortgpt:N"):
        assert method in shown
