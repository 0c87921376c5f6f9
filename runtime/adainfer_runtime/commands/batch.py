"""`adainfer batch`: a file of prompts, a file of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..batch import ContinuousBatching
from ..engine import Engine
from ..errors import RequestError
from ..generation_options import GenerationKeywords
from ..results import GenerationResult
from ..tasks import read_tasks
from .answers import describe_statistics
from .batch_file import check_out, open_to_add, read_lines, write_again
from .generation_arguments import takes_generation_options
from .options import DeviceOption, ProfileOption, ThreadsOption
from .progress_bar import progress_bar

__all__ = ["register"]

_EXAMPLES = """
Examples:

    adainfer batch engines/ --prompts prompts.jsonl --out texts.jsonl --max-new-tokens 128

    adainfer batch engines/ --prompts questions.jsonl --out answers.jsonl --chat --mode adaptive

    adainfer batch engines/ --prompts prompts.jsonl --out texts.jsonl --resume

    adainfer batch engines/ --prompts prompts.jsonl --out texts.jsonl --resume \\
        --retry-errors --timeout 60
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
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="With --resume: try again what has an error in OUT."),
    ] = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    profile: ProfileOption = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Generate a text for each of many prompts; passes are shared where the target allows.

    A prompt that cannot be served, or takes longer than --timeout, gets a line with its error. The
    exit status is 1 where no prompt has a text in the end, whatever the reasons.
    """
    if retry_errors and not resume:
        raise RequestError("--retry-errors goes with --resume")
    scheduler = ContinuousBatching(at_once)
    texts = [example.prompt for example in read_tasks([prompts])]
    check_out(out, resume=resume)
    engine = Engine.load(folder, device, threads, profile=profile)
    marks = [_mark(engine, text, options, chat=chat) for text in texts]
    lines = list(read_lines(out, marks)) if resume else []
    kept = [line for line in lines if not (retry_errors and line.failed)]
    done = {line.index for line in kept}
    missing = [place for place in range(len(texts)) if place not in done]
    requests = [_request(engine, texts[place], chat=chat) for place in missing]
    failed = 0
    console = Console(stderr=True)
    if len(kept) < len(lines):
        write_again(out, kept)
    with open_to_add(out) as stream, progress_bar(console) as progress:
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
    if failed == len(missing) and all(line.failed for line in kept):
        raise typer.Exit(1)


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
