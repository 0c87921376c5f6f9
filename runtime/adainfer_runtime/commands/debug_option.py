"""`--debug`, which every command takes: anywhere on the command line it has the same effect, so
that it is read there (see `app.run_guarded`), and the commands only show it in their help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

__all__ = ["DEBUG_FLAG", "DebugOption", "add_debug_option"]

DEBUG_FLAG = "--debug"
DebugOption = Annotated[
    bool, typer.Option(DEBUG_FLAG, help="Show the traceback of an error as well.")
]


def add_debug_option(app: typer.Typer) -> None:
    """Gives the option to every command of an application, those of its groups included."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = _with_debug(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_debug_option(group.typer_instance)


def _with_debug(command: Callable[..., Any]) -> Callable[..., Any]:
    own = inspect.signature(command, eval_str=True).parameters

    @wraps(command)
    def call(**given: Any) -> Any:
        del given["debug"]
        return command(**given)

    debug = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption
    )
    parameters = [
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()),
        debug,
    ]
    # Typer reads both.
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del call.__wrapped__
    return call
