"""Puts the command together: the runtime's own subcommands, and those of installed packages.

Another package adds subcommands through an entry point in the group `adainfer.commands`, a function
that takes the Typer application.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import AdaInferError
from . import batch, build_tasks, chat, doctor, evaluate, inspect_folder, plan, run
from .compiler import EXTRA_MODULES, describe_missing, register_missing
from .debug_option import DEBUG_FLAG, DebugOption, add_debug_option

__all__ = ["build_app", "main", "main_export", "run_guarded"]

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
        debug: DebugOption = False,
    ) -> None:
        pass

    for module in (run, batch, chat, evaluate, inspect_folder, plan, doctor, build_tasks):
        module.register(app)
    failures: dict[str, ImportError] = {}
    for entry in entry_points(group=_GROUP):
        # Without a package's libraries the runtime has fewer commands, and works.
        try:
            entry.load()(app)
        except ImportError as error:
            failures[entry.name] = error
    register_missing(app, failures)
    add_debug_option(app)
    return app


def main() -> None:
    """Entry point of `adainfer`."""
    run_guarded(build_app())


def main_export() -> None:
    """Entry point of `adainfer-export`, the same as `adainfer export`."""

    run_guarded(lambda: build_app()(args=["export", *sys.argv[1:]], prog_name="adainfer"))


def run_guarded(call: Callable[[], Any]) -> None:
    """Prints errors that a user can mend on one line and exits with 2.

    `--debug` anywhere on the command line shows the traceback.
    """
    debug = DEBUG_FLAG in sys.argv
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != DEBUG_FLAG]
    try:
        call()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (AdaInferError, ModuleNotFoundError, OSError) as error:
        message = _message(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def _message(error: Exception) -> str | None:
    """What a user can do about an error; None: nothing, the program is at fault."""
    if isinstance(error, ModuleNotFoundError):  # a library that a command imports as it runs
        library = (error.name or "").partition(".")[0]
        return describe_missing(error) if library in EXTRA_MODULES else None
    return str(error)


def _print_version(value: bool) -> None:
    if value:
        print(f"adainfer {__version__}")
        raise typer.Exit
