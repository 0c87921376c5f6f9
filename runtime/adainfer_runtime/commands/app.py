"""Puts the command together: the runtime's own subcommands, and those of installed packages.

Another package adds subcommands through an entry point in the group `adainfer.commands`, a function
that takes the Typer application.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import AdaInferError
from . import batch, build_tasks, chat, doctor, evaluate, inspect_folder, plan, run

__all__ = ["build_app", "main", "main_export", "run_guarded"]

_DEBUG = "--debug"
_GROUP = "adainfer.commands"


def build_app() -> typer.Typer:
    """The application with every subcommand that is installed."""
    app = typer.Typer(
        name="adainfer",
        help="Run LLMs with adaptive early exit.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option(
                "--version",
                help="Print the version and stop.",
                is_eager=True,
                callback=_print_version,
            ),
        ] = False,
    ) -> None:
        pass

    for module in (run, batch, chat, evaluate, inspect_folder, plan, doctor, build_tasks):
        module.register(app)
    for entry in entry_points(group=_GROUP):
        # A runtime without the compiler's libraries has fewer commands, and works.
        with suppress(ModuleNotFoundError):
            entry.load()(app)
    return app


def main() -> None:
    """Entry point of `adainfer`."""
    run_guarded(build_app())


def main_export() -> None:
    """Entry point of `adainfer-export`, the same as `adainfer export`."""

    def call() -> None:
        app = build_app()
        if "export" not in {command.name for command in app.registered_commands}:
            raise AdaInferError(
                "the compiler is not installed: pip install 'adainfer-export[cpu,export,gguf]'"
            )
        app(args=["export", *sys.argv[1:]], prog_name="adainfer")

    run_guarded(call)


def run_guarded(call: Callable[[], Any]) -> None:
    """Prints errors that a user can mend on one line and exits with 2.

    `--debug` anywhere on the command line shows the traceback.
    """
    debug = _DEBUG in sys.argv
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != _DEBUG]
    try:
        call()
    except AdaInferError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _print_version(value: bool) -> None:
    if value:
        print(f"adainfer {__version__}")
        raise typer.Exit
