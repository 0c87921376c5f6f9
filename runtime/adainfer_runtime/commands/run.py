"""`adainfer run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..engine import Engine
from ..errors import RequestCancelledError, RequestError
from ..generation_options import GenerationKeywords
from ..results import ChoiceResult
from ..text_request import finish
from .answers import (
    AnswerPrinter,
    ExitColours,
    cancel_on_interrupt,
    describe_logprobs,
    describe_stages,
    describe_text,
)
from .generation_arguments import changed_flags, takes_generation_options
from .options import DeviceOption, ProfileOption, ThreadsOption
from .standard_input import input_text

__all__ = ["register"]

_NEW_TOKENS = 64
_CHOICE_TAKES = frozenset({"--mode", "--threshold", "--level", "--timeout"})
_INTERRUPTED = 130  # what shells expect after Ctrl-C
_EXAMPLES = """
Examples:

    adainfer run engines/ --prompt "The capital of France is" --max-new-tokens 16

    adainfer run engines/ --prompt "Name three fruits." --chat --temperature 0.7 --top-p 0.9

    adainfer run engines/ --prompt "1, 2, 3," --stop 9 --mode adaptive --show-exits

    adainfer run engines/ --mode adaptive --labels positive,negative \\
        --prompt "Review: a delight. Sentiment: positive. Review: dull. Sentiment:"

    adainfer run engines/ --prompt "Once upon a time" --mode verified --draft-layer 24 --drafts 4

    adainfer run engines/ --prompt "1, 2, 3," --mode adaptive --exit-looks always \\
        --kv-policy propagate --probe shortlist

    adainfer run engines/ --prompt - --json < prompt.txt
"""


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="run", epilog=_EXAMPLES)(run)


@takes_generation_options(_NEW_TOKENS)
def run(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    prompt: Annotated[str, typer.Option(help="Text; `-` reads standard input.")],
    options: GenerationKeywords,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    labels: Annotated[
        str | None, typer.Option(help="Choose among these instead (comma-separated).")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Show log-probabilities, with this many alternatives.")
    ] = None,
    show_exits: Annotated[
        bool, typer.Option("--show-exits", help="Colour the text by exit layer.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(help="Print text as it comes; default: on a terminal.", show_default=False),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    profile: ProfileOption = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate text, or choose a label, from one prompt."""
    if labels is not None:
        shown = {
            "--logprobs": logprobs is not None,
            "--show-exits": show_exits,
            "--stream": bool(stream),
        }
        _check_choice(options, [flag for flag, given in shown.items() if given])
    engine = Engine.load(folder, device, threads, profile=profile)
    text = input_text() if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty")
    request: str | Sequence[int] = text
    if chat:
        request = engine.tokenizer.encode_chat([{"role": "user", "content": text}])
    if labels is not None:
        _choose(engine, request, labels, options, json_output)
        return
    with cancel_on_interrupt() as cancel:
        asked: GenerationKeywords = {**options, "logprobs": logprobs, "cancel": cancel}
        events = engine.stream(request, **asked)
        if json_output:
            result = finish(events)
            print(json.dumps(asdict(result)))
        else:
            colours = ExitColours(engine.manifest) if show_exits else None
            piecemeal = sys.stdout.isatty() if stream is None else stream
            result = AnswerPrinter(colours).print(events if piecemeal else list(events))
            if colours is not None:
                Console(stderr=True).print(colours.legend(), highlight=False)
            if logprobs is not None:
                print(describe_logprobs(result, engine.tokenizer), file=sys.stderr)
            _print_summary(describe_text(result))
    if cancel():
        raise typer.Exit(_INTERRUPTED)


def _check_choice(options: GenerationKeywords, shown: Sequence[str]) -> None:
    """Raises RequestError for options that speak of a text."""
    changed = changed_flags(options, _NEW_TOKENS)
    unused = [*shown, *(flag for flag in changed if flag not in _CHOICE_TAKES)]
    if unused:
        raise RequestError(
            f"--labels chooses one of them and generates no text: leave {', '.join(unused)} out"
        )


def _choose(
    engine: Engine,
    prompt: str | Sequence[int],
    labels: str,
    options: GenerationKeywords,
    json_output: bool,
) -> None:
    names = [label for label in labels.split(",") if label]
    try:
        with cancel_on_interrupt() as cancel:
            choice = engine.choose(
                prompt,
                names,
                mode=options["mode"],
                threshold=options["threshold"],
                level=options["level"],
                timeout=options["timeout"],
                cancel=cancel,
            )
    except RequestCancelledError:
        raise typer.Exit(_INTERRUPTED) from None
    if json_output:
        print(json.dumps(asdict(choice) | {"text": choice.label}))
        return
    print(choice.label)
    stages = describe_stages(engine.statistics.stage_seconds)
    _print_summary(f"{_describe_choice(choice)}{stages}")


def _print_summary(summary: str) -> None:
    Console(stderr=True).print(summary, style="dim", highlight=False)


def _describe_choice(choice: ChoiceResult) -> str:
    return (
        f"exit after layer {choice.exit_layer} of {choice.layers_total}; "
        f"{choice.layers_saved:.1%} of layers saved; {choice.seconds * 1000:.0f} ms"
    )
