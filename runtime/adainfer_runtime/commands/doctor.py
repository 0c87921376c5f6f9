"""`adainfer doctor`: what this machine can run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..doctor import Diagnosis, diagnose

__all__ = ["register"]

_EXAMPLES = """
Examples:

    adainfer doctor

    adainfer doctor --json
"""


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="doctor", epilog=_EXAMPLES)(doctor)


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what this machine can run and build, and what is missing for the rest."""
    found = diagnose()
    if json_output:
        abilities = [asdict(ability) | {"works": ability.works} for ability in found.abilities]
        print(json.dumps(asdict(found) | {"abilities": abilities}))
        return
    _print(found)


def _print(found: Diagnosis) -> None:
    console = Console()
    board = f", {found.jetson}" if found.jetson else ""
    console.print(f"{found.system}{board}, Python {found.python}", highlight=False)
    if found.gpu is None:
        console.print("GPU: none (no NVIDIA driver, or no device)", highlight=False)
    else:
        gpu = found.gpu
        console.print(
            f"GPU: {gpu.name}, SM {gpu.sm}, {gpu.memory_bytes / 1e9:.1f} GB, "
            f"driver for CUDA {gpu.driver}",
            highlight=False,
        )
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    console.print(f"packages: {packages or 'none'}", highlight=False)
    table = Table("", "works", "missing")
    for ability in found.abilities:
        missing = escape("; ".join(ability.missing))  # extras stand in brackets
        table.add_row(ability.what, "yes" if ability.works else "no", missing)
    console.print(table)
