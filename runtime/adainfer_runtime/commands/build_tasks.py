"""`adainfer tasks`: makes task files, from other task files or from datasets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..dataset_tasks import DATASETS, build_dataset_tasks
from ..errors import TaskFileError
from ..few_shot import recombine
from ..tasks import TaskExample, read_tasks, write_tasks

__all__ = ["register"]

_SHOTS_EXAMPLES = """
Examples:

    adainfer tasks shots news.jsonl --shots 10 --out news-10.jsonl

    adainfer tasks shots a.jsonl b.jsonl --shots 3 --copies 4 --out fitting.jsonl

    adainfer tasks shots news.test.jsonl --from news.calibration.jsonl --shots 20 --out test.jsonl
"""
_DATASET_EXAMPLES = """
Examples:

    adainfer tasks dataset sst2 --shots 5 --out sst2.jsonl --limit 500

    adainfer tasks dataset mmlu --split validation --shots 5 --out mmlu.jsonl
"""

ShotsOption = Annotated[int, typer.Option(help="Solved examples in each prompt.", min=0)]
OutOption = Annotated[Path, typer.Option(help="Task file to write.")]
SeedOption = Annotated[int, typer.Option(help="Seed of all draws.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the group of subcommands."""
    group = typer.Typer(name="tasks", help="Make files of few-shot prompts.", no_args_is_help=True)
    group.command(name="shots", epilog=_SHOTS_EXAMPLES)(run_shots)
    group.command(name="dataset", epilog=_DATASET_EXAMPLES)(run_dataset)
    app.add_typer(group)


def run_shots(
    files: Annotated[list[Path], typer.Argument(help="Task files.", metavar="FILE…")],
    shots: ShotsOption,
    out: OutOption,
    copies: Annotated[
        int, typer.Option(help="Prompts per query, with different draws.", min=1)
    ] = 1,
    shots_from: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Task files that shots are drawn from instead; repeatable."),
    ] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json_output: JsonOption = False,
) -> None:
    """Recombine few-shot prompts: each query again, with shots drawn anew from its task.

    Every solved example of the files may become a shot, queries with their answers too: keep
    files for fitting and for testing in different calls, or name with `--from` those that shots
    may come from.

    Prompts that share a query are not independent: calibration keeps copies in one part of its
    data and certifies with one of them. Copies give more to fit on, not a stronger certificate.
    """
    _check_out(out, force)
    pool = read_tasks(shots_from) if shots_from else None
    examples = recombine(read_tasks(files), shots=shots, copies=copies, seed=seed, shots_from=pool)
    _write(out, examples, shots, seed, json_output)


def run_dataset(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(DATASETS)}.", metavar="NAME")],
    shots: ShotsOption,
    out: OutOption,
    split: Annotated[
        str | None, typer.Option(help="Split of the questions; default: the dataset's own choice.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions at most (a seeded sample).", min=1)
    ] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json_output: JsonOption = False,
) -> None:
    """Build few-shot prompts from a Hugging Face dataset, shots from its training split.

    One prompt per question. Prompts share shots, so they are not quite independent.
    """
    _check_out(out, force)
    examples = build_dataset_tasks(name, shots=shots, split=split, limit=limit, seed=seed)
    _write(out, examples, shots, seed, json_output)


def _check_out(out: Path, force: bool) -> None:
    """Refuses before anything is read or downloaded."""
    if out.is_dir():
        raise TaskFileError(f"{out} is a folder; give --out the name of a file")
    if not out.parent.is_dir():
        raise TaskFileError(f"{out} cannot be written: there is no folder {out.parent}")
    if out.exists() and not force:
        raise TaskFileError(f"{out} exists; give another --out, or --force to replace it")


def _write(
    out: Path, examples: Sequence[TaskExample], shots: int, seed: int, json_output: bool
) -> None:
    write_tasks(out, examples)
    tasks = Counter(example.task for example in examples)
    if json_output:
        summary = {"out": str(out), "prompts": len(examples), "shots": shots, "seed": seed}
        print(json.dumps(summary | {"tasks": tasks}))
        return
    counts = ", ".join(f"{task} {count}" for task, count in tasks.items())
    print(f"{out}: {len(examples)} prompts with {shots} shots ({counts})")
