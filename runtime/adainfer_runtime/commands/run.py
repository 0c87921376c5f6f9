"""`adainfer run`: one prompt, one answer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..engine import ChoiceResult, Engine, GenerationResult
from ..errors import RequestError
from .options import DeviceOption, LevelOption, ThreadsOption, ThresholdOption

__all__ = ["register"]

_EXAMPLES = """
Examples:

    adainfer run engines/ --prompt "The capital of France is" --max-new-tokens 16

    adainfer run engines/ --mode adaptive --labels positive,negative \\
        --prompt "Review: a delight. Sentiment: positive. Review: dull. Sentiment:"

    adainfer run engines/ --prompt - --json < prompt.txt
"""


class ModeChoice(str, Enum):
    """Values of --mode."""

    off = "off"
    adaptive = "adaptive"
    context = "context"


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="run", epilog=_EXAMPLES)(run)


def run(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    prompt: Annotated[str, typer.Option(help="Text; `-` reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    mode: Annotated[ModeChoice, typer.Option(help="Run all layers, or exit early.")] = (
        ModeChoice.off
    ),
    labels: Annotated[
        str | None, typer.Option(help="Choose among these instead (comma-separated).")
    ] = None,
    threshold: ThresholdOption = None,
    level: LevelOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    timeout: Annotated[float | None, typer.Option(help="Deadline in seconds.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate text, or choose a label, from one prompt."""
    engine = Engine.load(folder, device, threads)
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty")
    if labels is not None:
        names = [label for label in labels.split(",") if label]
        choice = engine.choose(text, names, mode=mode.value, threshold=threshold, level=level)
        _print(asdict(choice) | {"text": choice.label}, json_output, _describe_choice(choice))
        return
    result = engine.generate(
        text,
        max_new_tokens=max_new_tokens,
        mode=mode.value,
        threshold=threshold,
        level=level,
        timeout=timeout,
    )
    _print(asdict(result), json_output, _describe(result))


def _print(data: dict[str, object], as_json: bool, description: tuple[str, str]) -> None:
    if as_json:
        print(json.dumps(data))
        return
    text, summary = description
    print(text)
    Console(stderr=True).print(summary, style="dim", highlight=False)


def _describe(result: GenerationResult) -> tuple[str, str]:
    rate = len(result.tokens) / result.seconds
    exits = Counter(result.exit_layers)
    layers = ", ".join(f"{layer}: {exits[layer]}" for layer in sorted(exits))
    return result.text, (
        f"{len(result.tokens)} tokens in {result.seconds:.2f} s ({rate:.0f}/s); "
        f"{result.layers_saved:.1%} of layers saved; tokens by exit layer of "
        f"{result.layers_total}: {layers}"
    )


def _describe_choice(choice: ChoiceResult) -> tuple[str, str]:
    return choice.label, (
        f"exit after layer {choice.exit_layer} of {choice.layers_total}; "
        f"{choice.layers_saved:.1%} of layers saved; {choice.seconds * 1000:.0f} ms"
    )
