"""Answers on a terminal, a file or a pipe: as they come, coloured by exit layer on request."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..generation_options import CancelToken
from ..manifest import Manifest
from ..results import DraftCount, GenerationResult, StreamEvent
from ..statistics import EngineStatistics
from ..tokenizer import Tokenizer

__all__ = [
    "AnswerPrinter",
    "ExitColours",
    "cancel_on_interrupt",
    "describe_logprobs",
    "describe_stages",
    "describe_statistics",
    "describe_text",
]

# From the earliest exit on; what runs all layers has the terminal's own colour.
_COLOURS = ("bright_green", "bright_cyan", "bright_yellow", "bright_magenta", "bright_blue")


class ExitColours:
    """A colour per exit layer of an engine."""

    def __init__(self, manifest: Manifest) -> None:
        self._full = manifest.depth
        layers = [layer for layer in manifest.exit_layers if layer < self._full]
        self._names = {layer: _COLOURS[i % len(_COLOURS)] for i, layer in enumerate(layers)}

    def style(self, exit_layer: int | None) -> Style | None:
        """None for text that nothing stopped early."""
        name = None if exit_layer is None else self._names.get(exit_layer)
        return None if name is None else Style.parse(name)

    def legend(self) -> Text:
        """Which colour is which layer."""
        legend = Text("exit after layer: ")
        for layer, name in self._names.items():
            legend.append(f"■ {layer}  ", name)
        return legend.append(f"■ {self._full} (all)")


class AnswerPrinter:
    """Writes events to standard output.

    On a terminal, control characters that a model may give are left out.
    """

    def __init__(self, colours: ExitColours | None = None, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        console = Console(file=self._stream)
        coloured = console.color_system is not None and not console.no_color
        self._colours = colours if coloured else None

    def print(self, events: Iterable[StreamEvent]) -> GenerationResult:
        """Writes a stream as it comes; a new line at its end."""
        result: GenerationResult | None = None
        for event in events:
            for text, exit_layer in event.spans or ((event.text, event.exit_layer),):
                self.write(text, exit_layer)
            result = event.result
        self._stream.write("\n")
        self._stream.flush()
        if result is None:
            raise AssertionError("a stream ends with its result")
        return result

    def write(self, text: str, exit_layer: int | None = None) -> None:
        """One piece."""
        if self._terminal:
            text = "".join(c for c in text if c.isprintable() or c in "\n\t")
        style = self._colours.style(exit_layer) if self._colours else None
        if style is not None and text:
            text = style.render(text, color_system=ColorSystem.STANDARD)
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def cancel_on_interrupt() -> Iterator[CancelToken]:
    """Ctrl-C ends the answer that is being given; a second one before that the program."""
    token = CancelToken()

    def handle(number: int, frame: FrameType | None) -> None:
        if token():
            raise KeyboardInterrupt
        token.cancel()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield token
    finally:
        signal.signal(signal.SIGINT, before)


def describe_text(result: GenerationResult) -> str:
    """What a text cost, on one line."""
    rate = len(result.tokens) / result.seconds if result.seconds else 0.0
    cancelled = ", cancelled" if result.finish_reason == "cancelled" else ""
    reused = result.statistics.reused_tokens
    kept = f"; {reused} prompt tokens kept" if reused else ""
    drafts = _drafts(result.statistics.drafts)
    stages = describe_stages(result.statistics.stage_seconds)
    return (
        f"{len(result.tokens)} tokens in {result.seconds:.2f} s ({rate:.0f}/s){cancelled}; "
        f"{result.layers_saved:.1%} of layers saved; tokens by exit layer of "
        f"{result.layers_total}: {_layers(Counter(result.exit_layers))}{kept}{drafts}{stages}"
    )


def describe_logprobs(result: GenerationResult, tokenizer: Tokenizer) -> str:
    """A line per token: its log-probability, then the alternatives."""
    lines = []
    for entry in result.logprobs or ():
        others = "  ".join(
            f"{tokenizer.token_text(token)!r} {logprob:.3f}"
            for token, logprob in entry.alternatives
        )
        lines.append(f"{tokenizer.token_text(entry.token)!r} {entry.logprob:.3f} | {others}")
    return "\n".join(lines)


def describe_statistics(done: EngineStatistics) -> str:
    """What an engine has done, on a few lines."""
    texts = ", ".join(f"{reason} {count}" for reason, count in sorted(done.texts.items()))
    return (
        f"answers: {texts or 'none'}\n"
        f"tokens: {done.prompt_tokens} of prompts ({done.reused_tokens} kept), "
        f"{done.new_tokens} new\n"
        f"time: {done.prompt_seconds:.2f} s prompts, {done.decode_seconds:.2f} s answers "
        f"({done.tokens_per_second:.0f} tokens/s)\n"
        f"layers: {done.layers_executed} executed, {done.layers_saved:.1%} saved, "
        f"{done.kv_fills} to fill in, {done.kv_filled} filled approximately; "
        f"tokens by exit layer: {_layers(done.exits) or 'none'}"
        f"{_drafts(done.drafts)}{describe_stages(done.stage_seconds)}"
    )


def describe_stages(seconds: Mapping[str, float]) -> str:
    """Where the time went, to be put behind a line; nothing unless it was measured."""
    parts = (f"{kind} {time * 1000:.0f}" for kind, time in sorted(seconds.items()))
    return f"; ms by stage: {', '.join(parts)}" if seconds else ""


def _drafts(drafts: DraftCount) -> str:
    if not drafts.proposed:
        return ""
    return f"; {drafts.accepted} of {drafts.proposed} drafts accepted in {drafts.passes} passes"


def _layers(exits: Mapping[int, int]) -> str:
    return ", ".join(f"{layer}: {exits[layer]}" for layer in sorted(exits))
