"""`adainfer batch`: a file of prompts, a file of texts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from ..batch import ContinuousBatching
from ..engine import Engine
from ..errors import RequestError
from ..generation_options import GenerationKeywords
from ..results import GenerationResult
from ..tasks import read_tasks
from .answers import describe_statistics
from .generation_arguments import takes_generation_options
from .options import DeviceOption, ProfileOption, ThreadsOption
from .progress_bar import progress_bar

__all__ = ["register"]

_EXAMPLES = """
Examples:

    adainfer batch engines/ --prompts prompts.jsonl --out texts.jsonl --max-new-tokens 128

    adainfer batch engines/ --prompts questions.jsonl --out answers.jsonl --chat --mode adaptive

    adainfer batch engines/ --prompts prompts.jsonl --out texts.jsonl --resume
"""


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="batch", epilog=_EXAMPLES)(batch)


@takes_generation_options(max_new_tokens=64)
def batch(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    prompts: Annotated[Path, typer.Option(help='JSON lines `{"prompt": "…"}`.')],
    out: Annotated[
        Path,
        typer.Option(help="Receives a JSON line per text, as texts end: index, prompt, text, …"),
    ],
    options: GenerationKeywords,
    at_once: Annotated[
        int, typer.Option(help="Texts that advance together, each with a KV cache.")
    ] = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what OUT holds already, errors too, and add the rest."),
    ] = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    profile: ProfileOption = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Generate a text for each of many prompts; passes are shared where the target allows.

    A prompt that cannot be served, or takes longer than --timeout, gets a line with its error.
    """
    scheduler = ContinuousBatching(at_once)
    texts = [example.prompt for example in read_tasks([prompts])]
    _check_out(out, resume=resume)
    engine = Engine.load(folder, device, threads, profile=profile)
    marks = [_mark(engine, text, options, chat=chat) for text in texts]
    done = set(_indices(out, marks)) if resume else set()
    missing = [place for place in range(len(texts)) if place not in done]
    requests = [_request(engine, texts[place], chat=chat) for place in missing]
    failed = 0
    console = Console(stderr=True)
    with _opened(out) as stream, progress_bar(console) as progress:
        bar = progress.add_task("generating", total=len(texts), completed=len(done), detail="")

        def write(place: int, content: dict[str, Any]) -> None:
            index = missing[place]
            line = {"index": index, "request": marks[index], "prompt": texts[index], **content}
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            progress.update(bar, advance=1)

        def write_error(place: int, error: Exception) -> None:
            nonlocal failed
            failed += 1
            write(place, {"error": str(error)})

        engine.generate_batch(
            requests,
            scheduler=scheduler,
            on_result=lambda place, result: write(place, _content(result)),
            on_error=write_error,
            **options,
        )
    if json_output:
        counts = {"prompts": len(texts), "generated": len(missing) - failed, "failed": failed}
        print(json.dumps({**counts, "statistics": asdict(engine.statistics)}))
    else:
        failures = f", {failed} failed: see their lines" if failed else ""
        summary = f"{out}: {len(texts)} prompts, {len(missing)} of them new{failures}"
        console.print(summary, highlight=False)
        if profile:
            console.print(describe_statistics(engine.statistics), highlight=False)


def _request(engine: Engine, prompt: str, *, chat: bool) -> str | Sequence[int]:
    if not chat:
        return prompt
    return engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])


def _content(result: GenerationResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "exit_layers": result.exit_layers,
        "layers_total": result.layers_total,
        "layers_saved": result.layers_saved,
        "seconds": result.seconds,
    }


def _mark(engine: Engine, prompt: str, options: GenerationKeywords, *, chat: bool) -> str:
    """What a text depends on, in few characters: a resumed run adds to its own texts alone."""
    asked = sorted((name, repr(value)) for name, value in options.items() if name != "timeout")
    timeless = engine.manifest.model_copy(update={"plan": None})  # `bench` may come in between
    what = [timeless.model_dump_json(), asked, chat, prompt]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _check_out(out: Path, *, resume: bool) -> None:
    """Raises RequestError where the file is there and is not to be resumed, or the other way."""
    if resume and not out.is_file():
        raise RequestError(f"{out} does not exist: leave --resume out to begin")
    if not resume and out.exists():
        raise RequestError(f"{out} exists: give another file, or --resume to add what is missing")


def _indices(out: Path, marks: Sequence[str]) -> Iterator[int]:
    """Prompts that have their line; one that a kill cut short is taken off the file.

    Raises:
        RequestError: a line is of another request, or the file cannot be read.
    """
    try:
        lines = out.read_bytes().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        if len(complete) < len(lines):
            os.truncate(out, sum(map(len, complete)))
    except OSError as error:
        raise RequestError(f"{out} cannot be used: {error}") from error
    for number, line in enumerate(complete, start=1):
        try:
            index, mark = (json.loads(line)[name] for name in ("index", "request"))
            known = index >= 0 and marks[index] == mark
        except (ValueError, KeyError, IndexError, TypeError):
            known = False
        if not known:
            raise RequestError(
                f"{out}:{number} is no text of these prompts by this engine and these options"
            )
        yield index


def _opened(out: Path) -> TextIO:
    try:
        return out.open("a", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{out} cannot be used: {error}") from error
