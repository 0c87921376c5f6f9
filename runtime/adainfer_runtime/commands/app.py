"""Puts the command together: the runtime's own subcommands, and those of installed packages.

Another package adds subcommands through an entry point in the group `adainfer.commands`, a function
that takes the Typer application.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
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
# Typer carries a click of its own since 0.29, and shows this class under no name.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


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
    run_guarded(partial(build_app(), standalone_mode=False))


def main_export() -> None:
    """Entry point of `adainfer-export`, the same as `adainfer export`."""

    run_guarded(
        lambda: build_app()(
            args=["export", *sys.argv[1:]], prog_name="adainfer", standalone_mode=False
        )
    )


def run_guarded(call: Callable[[], Any]) -> None:
    """Prints errors that a user can mend on one line and exits with 2.

    `--debug` anywhere on the command line shows the traceback. A closed standard stream is as good
    as an empty one. A whole number that the call returns is the exit status.
    """
    _open_closed_streams()
    debug = DEBUG_FLAG in sys.argv
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != DEBUG_FLAG]
    try:
        done = call()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except typer.Abort:
        sys.exit(1)
    except (AdaInferError, ModuleNotFoundError, OSError, _CommandLineError) as error:
        message = _message(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        if not message:  # `no_args_is_help`: the help was the message
            sys.exit(2)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    if isinstance(done, int):
        sys.exit(done)


def _open_closed_streams() -> None:
    """Python has None for a standard stream that was closed when it began."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123, SIM115 - it stays
            setattr(sys, name, stream)


def _message(error: Exception) -> str | None:
    """What a user can do about an error; None: nothing, the program is at fault."""
    if isinstance(error, _CommandLineError):
        return _usage_message(error)
    if isinstance(error, ModuleNotFoundError):  # a library that a command imports as it runs
        library = (error.name or "").partition(".")[0]
        return describe_missing(error) if library in EXTRA_MODULES else None
    return str(error)


def _usage_message(error: Any) -> str:
    if type(error).__name__ == "NoArgsIsHelpError":  # by now rich has printed it, or it is here
        print(error.format_message(), end="", file=sys.stderr)
        return ""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context else ""
    return f"{error.format_message().rstrip('.')}{hint}"


def _print_version(value: bool) -> None:
    if value:
        print(f"adainfer {__version__}")
        raise typer.Exit
