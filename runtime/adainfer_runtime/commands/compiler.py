"""The compiler's commands where they cannot be loaded: they exist, and say why they do not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Never

import typer

from ..errors import AdaInferError, one_line

__all__ = ["EXTRA_MODULES", "describe_missing", "register_missing"]

_COMMANDS = ("export", "calibrate", "certify", "validate", "list")
_INSTALL = "pip install 'adainfer-export[cpu,export,gguf]'"
# Building plans takes little of it: a device need not have the rest.
_INSTALL_BUILDER = "pip install 'adainfer-export[tensorrt]'"

# What the extras `export` and `gguf` bring, as it is imported.
EXTRA_MODULES = frozenset(
    {
        "gguf",
        "huggingface_hub",
        "ml_dtypes",
        "mobius",
        "onnx",
        "onnx_ir",
        "platformdirs",
        "psutil",
        "pycrfsuite",
        "safetensors",
        "scipy",
        "sentencepiece",
        "skl2onnx",
        "sklearn",
        "threadpoolctl",
        "torch",
        "transformers",
    }
)


def describe_missing(error: ImportError | None, install: str = _INSTALL) -> str:
    """What to do where the compiler's import ended in this error; None: there is no compiler.

    A library of its extras is just not installed. Anything else is a broken installation, which
    must not pass for one without the compiler.
    """
    if error is None:
        return f"the compiler is not installed: {install}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        library = error.name.partition(".")[0]
        if library in EXTRA_MODULES:
            return f"the compiler is not installed ({library} is missing): {install}"
    reason = one_line(error)
    return f"the compiler is installed but cannot be loaded: {reason}; --debug shows where"


def register_missing(app: typer.Typer, failures: Mapping[str, ImportError]) -> None:
    """Adds those of the compiler's commands that the application does not have.

    Args:
        failures: by entry point; `export` stands for all commands but `build`.
    """
    wanted = {name: failures.get("export") for name in _COMMANDS} | dict(failures)
    known = {command.name for command in app.registered_commands}
    for name, error in wanted.items():
        if name not in known:
            _register(app, name, error)


def _register(app: typer.Typer, name: str, error: ImportError | None) -> None:
    message = describe_missing(error, _INSTALL_BUILDER if name == "build" else _INSTALL)

    def missing(
        arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    ) -> Never:
        raise AdaInferError(message) from error

    settings = {"ignore_unknown_options": True}  # whatever the command was given, this is why
    app.command(
        name=name,
        help=f"Unavailable: {message}.",
        short_help="Unavailable: call it to see why.",
        context_settings=settings,
    )(missing)
