"""`adainfer batch`: a file of prompts, a file of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..batch import ContinuousBatching
from ..engine import Engine
from ..errors import RequestError
from ..generation_options import GenerationKeywords
from ..results import GenerationResult
from ..tasks import read_tasks
from .generation_arguments import takes_generation_options
from .options import DeviceOption, ThreadsOption

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
        bool, typer.Option("--resume", help="Keep what OUT holds already, and add what is missing.")
    ] = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    json_output: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Generate a text for each of many prompts; passes are shared where the target allows."""
    scheduler = ContinuousBatching(at_once)
    texts = [example.prompt for example in read_tasks([prompts])]
    done = _open(out, texts, resume=resume)
    engine = Engine.load(folder, device, threads)
    missing = [place for place in range(len(texts)) if place not in done]
    console = Console(stderr=True)
    with _progress(console) as progress, out.open("a", encoding="utf-8") as stream:
        bar = progress.add_task("generating", total=len(texts), completed=len(done))

        def write(place: int, result: GenerationResult) -> None:
            index = missing[place]
            stream.write(json.dumps(_line(index, texts[index], result)) + "\n")
            stream.flush()
            progress.update(bar, advance=1)

        engine.generate_batch(
            [_request(engine, texts[place], chat=chat) for place in missing],
            scheduler=scheduler,
            on_result=write,
            **options,
        )
    if json_output:
        counts = {"prompts": len(texts), "generated": len(missing)}
        print(json.dumps({**counts, "statistics": asdict(engine.statistics)}))
    else:
        console.print(f"{out}: {len(texts)} texts, {len(missing)} of them new", highlight=False)


def _request(engine: Engine, prompt: str, *, chat: bool) -> str | Sequence[int]:
    if not chat:
        return prompt
    return engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])


def _line(index: int, prompt: str, result: GenerationResult) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": prompt,
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "exit_layers": result.exit_layers,
        "layers_total": result.layers_total,
        "layers_saved": result.layers_saved,
        "seconds": result.seconds,
    }


def _open(out: Path, prompts: Sequence[str], *, resume: bool) -> set[int]:
    """Creates the file, or says which prompts it has texts of.

    Raises:
        RequestError: it exists and is not to be resumed, is of other prompts, or cannot be used.
    """
    try:
        if not resume:
            out.open("x", encoding="utf-8").close()
            return set()
        if not out.exists():
            raise RequestError(f"{out} does not exist: leave --resume out to begin")
        return set(_indices(out, prompts))
    except FileExistsError:
        raise RequestError(
            f"{out} exists: give another file, or --resume to add what is missing"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{out} cannot be used: {error}") from error


def _indices(out: Path, prompts: Sequence[str]) -> Iterator[int]:
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]
    for number, line in enumerate(complete, start=1):
        try:
            index, prompt = (json.loads(line)[name] for name in ("index", "prompt"))
            known = prompts[index] == prompt
        except (ValueError, KeyError, IndexError, TypeError):
            known = False
        if not known:
            raise RequestError(f"{out}:{number} is no text of these prompts")
        yield index
    if len(complete) < len(lines):  # killed in the middle of a line
        out.write_text("".join(complete), encoding="utf-8")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
