"""`adainfer eval`: both modes over task files."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..engine import Engine
from ..evaluate import Evaluation, TaskResult, evaluate
from ..tasks import TaskExample, read_tasks
from .options import LevelOption, ThreadsOption, ThresholdOption

__all__ = ["register"]

_EXAMPLES = """
Examples:

    adainfer eval engines/ --tasks sentiment.test.jsonl --limit 200

    adainfer eval engines/ --tasks a.jsonl --tasks b.jsonl --json report.json
"""


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="eval", epilog=_EXAMPLES)(run_eval)


def run_eval(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    tasks: Annotated[list[Path], typer.Option(help="Task file (JSON lines); repeatable.")],
    limit: Annotated[
        int | None, typer.Option(help="Examples per task at most (a seeded sample).")
    ] = None,
    labels_only: Annotated[
        bool, typer.Option("--labels-only", help="Choose among each example's labels.")
    ] = False,
    threshold: ThresholdOption = None,
    level: LevelOption = None,
    threads: ThreadsOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results here; `-` prints them.")
    ] = None,
) -> None:
    """Accuracy, agreement, layers and time of `off` and `adaptive`, per task and in the mean."""
    examples = _limited(read_tasks(tasks), limit)
    engine = Engine.load(folder, threads=threads)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("evaluating", total=len(examples))
        result = evaluate(
            engine,
            examples,
            labels_only=labels_only,
            policy=engine.policy("adaptive", threshold=threshold, level=level),
            on_example=lambda: progress.advance(bar),
        )
    content = json.dumps(asdict(result), indent=1)
    if json_file is not None and str(json_file) == "-":
        print(content)
        return
    Console(width=None if console.is_terminal else 140).print(_table(result))
    if json_file is not None:
        json_file.write_text(content + "\n", encoding="utf-8")


def _limited(examples: list[TaskExample], limit: int | None) -> list[TaskExample]:
    if limit is None:
        return examples
    by_task: dict[str, list[TaskExample]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    chosen: list[TaskExample] = []
    for group in by_task.values():
        count = min(limit, len(group))
        chosen += random.Random(0).sample(group, count)
    return chosen


def _table(result: Evaluation) -> Table:
    table = Table(title="adaptive against off" + (" (labels only)" if result.labels_only else ""))
    headings = (
        "task", "examples", "accuracy off", "adaptive", "agreement", "95% interval",
        "minority", "mean layers", "layers saved", "s off", "s adaptive",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in result.tasks:
        table.add_row(*_row(task))
    table.add_section()
    table.add_row(*_row(result.mean), style="bold")
    return table


def _row(result: TaskResult) -> tuple[str, ...]:
    low, high = result.agreement_interval
    return (
        result.task,
        str(result.examples),
        _share(result.accuracy_off),
        _share(result.accuracy_adaptive),
        _share(result.agreement),
        f"{low:.3f}–{high:.3f}",
        f"{_share(result.minority_agreement)} of {result.minority_examples}",
        f"{result.mean_layers:.2f}",
        f"{result.layers_saved:.1%}",
        f"{result.seconds_off:.2f}",
        f"{result.seconds_adaptive:.2f}",
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
