"""`adainfer chat`: a conversation on the terminal, or from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..conversation import Conversation
from ..engine import Engine
from ..errors import AdaInferError, one_line
from ..generation_options import GenerationKeywords
from ..text_request import finish
from .answers import (
    AnswerPrinter,
    ExitColours,
    cancel_on_interrupt,
    describe_statistics,
    describe_text,
)
from .generation_arguments import takes_generation_options
from .options import DeviceOption, ProfileOption, ThreadsOption
from .standard_input import input_lines

__all__ = ["register"]

_EXAMPLES = """
Examples:

    adainfer chat engines/

    adainfer chat engines/ --system "Answer in one sentence." --temperature 0.7 --show-exits

    adainfer chat engines/ --mode adaptive --exit-looks always --kv-policy propagate --show-exits

    printf 'Name a fruit.\\nAnother one.\\n' | adainfer chat engines/ --json
"""
_HELP = "/reset forgets the conversation, /stats shows what it cost, /exit leaves"


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="chat", epilog=_EXAMPLES)(chat)


@takes_generation_options(max_new_tokens=256)
def chat(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    options: GenerationKeywords,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    show_exits: Annotated[
        bool, typer.Option("--show-exits", help="Colour answers by exit layer.")
    ] = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    profile: ProfileOption = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per answer.")
    ] = False,
) -> None:
    """Talk to an instruction-tuned model, a line at a time; Ctrl-C ends an answer.

    In a conversation: /reset, /stats, /exit.
    """
    engine = Engine.load(folder, device, threads, profile=profile)
    beginning = [] if system is None else [{"role": "system", "content": system}]
    talk = engine.conversation(beginning)
    colours = ExitColours(engine.manifest) if show_exits else None
    chatter = _Chatter(engine, talk, options, colours, json_output)
    for line in _lines(chatter.note):
        if line.startswith("/"):
            if not chatter.obey(line):
                return
        elif line:
            chatter.answer(line)


class _Chatter:
    """One session of the command: answers go to standard output, all else beside it."""

    def __init__(
        self,
        engine: Engine,
        talk: Conversation,
        options: GenerationKeywords,
        colours: ExitColours | None,
        json_output: bool,
    ) -> None:
        self._engine = engine
        self._talk = talk
        self._options = options
        self._json_output = json_output
        self._printer = AnswerPrinter(colours)
        self._console = Console(stderr=True)
        if colours is not None and not json_output:
            self._console.print(colours.legend(), highlight=False)

    def note(self, text: str) -> None:
        """Something that is no answer."""
        self._console.print(text, style="dim", highlight=False, markup=False)

    def obey(self, line: str) -> bool:
        """A line that begins with a slash; False to leave."""
        commands: dict[str, Callable[[], None]] = {
            "/reset": self._talk.reset,
            "/stats": lambda: self.note(describe_statistics(self._engine.statistics)),
            "/help": lambda: self.note(_HELP),
        }
        if line == "/exit":
            return False
        commands.get(line, lambda: self.note(f"{line} is no command: {_HELP}"))()
        return True

    def answer(self, content: str) -> None:
        """A turn. On a terminal a refused one is told, and the next may follow."""
        try:
            with cancel_on_interrupt() as cancel:
                options: GenerationKeywords = {**self._options, "cancel": cancel}
                events = self._talk.stream(content, **options)
                if self._json_output:
                    print(json.dumps(asdict(finish(events))), flush=True)
                else:
                    self.note(describe_text(self._printer.print(events)))
        except AdaInferError as error:
            if not sys.stdin.isatty():
                raise
            self.note(f"error: {error} (/reset begins anew)")


def _lines(note: Callable[[str], None]) -> Iterator[str]:
    """Lines of standard input; with a prompt and a history of lines on a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in input_lines())
        return
    with suppress(ImportError):
        import_module("readline")  # `input` uses it once it is there
    note(_HELP)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            note(f"that was no text: {one_line(error)}")
        except KeyboardInterrupt:
            print()
            note("/exit or Ctrl-D leaves")
