"""`adainfer eval`: methods side by side on task files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..engine import Engine
from ..evaluation import (
    AnswerLog,
    Evaluation,
    TaskResult,
    evaluate,
    make_methods,
    summary_rows,
)
from ..fitted_on import FittedOn
from ..output_files import require_writable_file, writing
from ..tasks import PlacedExample, TaskExample, read_placed
from .options import DeviceOption, LevelOption, ThreadsOption, ThresholdOption
from .progress_bar import progress_bar

__all__ = ["register"]

_EXAMPLES = """
Examples:

    adainfer eval engines/ --tasks sentiment.test.jsonl --limit 200

    adainfer eval engines/ --tasks a.jsonl --tasks b.jsonl --json report.json --log answers.jsonl

    adainfer eval engines/ --tasks a.jsonl --methods svm,crf,fixed:24,shortgpt:3 --plots plots/
"""


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="eval", epilog=_EXAMPLES)(run_eval)


def run_eval(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    tasks: Annotated[list[Path], typer.Option(help="Task file (JSON lines); repeatable.")],
    methods: Annotated[
        str,
        typer.Option(
            help="What is compared with `off`, by commas: adaptive, context, combined, auto (as "
            "--mode of run), the kind of an exit graph (svm, crf …), fixed:L (stop after layer L), "
            "shortgpt:N (leave N layers out)."
        ),
    ] = "adaptive",
    limit: Annotated[
        int | None, typer.Option(help="Examples per task at most (a seeded sample).", min=1)
    ] = None,
    labels_only: Annotated[
        bool, typer.Option("--labels-only", help="Choose among each example's labels.")
    ] = False,
    threshold: ThresholdOption = None,
    level: LevelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log",
            help="Append every answer to this file; a run that was stopped goes on from it.",
        ),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            help="Folder for saved-against-agreement curves and exit histograms (one more full "
            "run per prompt; needs the extra `plots`)."
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Also write the results here; `-` prints them. `methods` holds every figure of "
            "each method; with adaptive among them, `summary` has a flat row per task, the mean "
            "last: task, examples, accuracy_off, accuracy_adaptive, agreement, mean_layers, "
            "layers_deviation, layers_saved, seconds_off, seconds_adaptive (of the mean: sums); "
            "`fitted_on` counts prompts that the exits were fitted on.",
        ),
    ] = None,
) -> None:
    """Accuracy, agreement, layers, multiply-adds and time, per task and in the mean."""
    _check_outputs(json_file, plots)
    placed = _limited(read_placed(tasks), limit)
    examples = [each.example for each in placed]
    engine = Engine.load(folder, device, threads)
    known = _count_fitted(folder, engine, examples)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    chosen = make_methods(
        names, folder, engine, labels_only=labels_only, threshold=threshold, level=level
    )
    question: dict[str, object] = {
        "labels_only": labels_only,
        "threshold": threshold,
        "level": level,
    }
    if device != "cpu":
        question["device"] = device
    log = AnswerLog.open(log_file, engine.manifest, question) if log_file else None
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("evaluating", total=len(examples), detail="")
        result = evaluate(
            chosen,
            examples,
            labels_only=labels_only,
            log=log,
            places=[each.where for each in placed],
            on_example=lambda example: progress.update(bar, advance=1, detail=example.task),
        )
    _show(result, known, json_file, console)
    if plots is not None:
        _draw(plots, result, engine, examples, console)


def _check_outputs(json_file: Path | None, plots: Path | None) -> None:
    """Raises before the work what would be raised after it."""
    if json_file is not None and str(json_file) != "-":
        require_writable_file(json_file)
    if plots is not None:
        from ..evaluation.plots import require_plots

        require_plots(plots)


def _count_fitted(folder: Path, engine: Engine, examples: Sequence[TaskExample]) -> int:
    """How many the exits were fitted on, with a warning: they would look better than they are."""
    fitted = FittedOn.read(folder, engine.manifest)
    known = sum(example in fitted for example in examples)
    if known:
        Console(stderr=True).print(
            f"warning: the exits were fitted on {known} of these {len(examples)} prompts, or on "
            "what they ask: agreement on them says little about others",
            style="yellow",
        )
    return known


def _show(result: Evaluation, known: int, json_file: Path | None, console: Console) -> None:
    """Tables first: they are there even if the disk is full by now."""
    content = json.dumps({**_as_json(result), "fitted_on": known}, indent=1)
    if json_file is not None and str(json_file) == "-":
        print(content)
        return
    output = Console(width=None if console.is_terminal else 160)
    for table in _tables(result):
        output.print(table)
    if json_file is not None:
        with writing(json_file):
            json_file.write_text(content + "\n", encoding="utf-8")


def _as_json(result: Evaluation) -> dict[str, object]:
    rows = [asdict(row) for row in summary_rows(result)]
    return asdict(result) | ({"summary": rows} if rows else {})


def _draw(
    plots: Path, result: Evaluation, engine: Engine, examples: list[TaskExample], console: Console
) -> None:
    from ..evaluation.curves import measure_curves
    from ..evaluation.plots import draw_plots

    with progress_bar(console) as progress:
        bar = progress.add_task("measuring curves", total=len(examples), detail="")
        curves = measure_curves(
            engine,
            examples,
            on_example=lambda example: progress.update(bar, advance=1, detail=example.task),
        )
    for path in draw_plots(plots, result, curves):
        console.print(f"wrote {path}")


def _limited(examples: list[PlacedExample], limit: int | None) -> list[PlacedExample]:
    if limit is None:
        return examples
    by_task: dict[str, list[PlacedExample]] = {}
    for placed in examples:
        by_task.setdefault(placed.example.task, []).append(placed)
    chosen: list[PlacedExample] = []
    for group in by_task.values():
        count = min(limit, len(group))
        chosen += random.Random(0).sample(group, count)
    return chosen


def _tables(result: Evaluation) -> list[Table]:
    """One method: a row per task. Several: a row per method, of the mean over tasks."""
    labels = " (labels only)" if result.labels_only else ""
    compared = result.methods[1:] or result.methods
    if len(compared) == 1:
        rows = [*compared[0].tasks, compared[0].mean]
        table = _table(f"{compared[0].method} against off{labels}", "task")
        for row in rows:
            table.add_row(row.task, *_cells(row), style="bold" if row is rows[-1] else None)
        return [table]
    table = _table(f"methods against off, mean of {len(compared[0].tasks)} tasks{labels}", "method")
    for method in result.methods:
        table.add_row(method.method, *_cells(method.mean))
    return [table]


def _table(title: str, first: str) -> Table:
    table = Table(title=title)
    headings = (
        first, "examples", "accuracy", "difference (95%)", "agreement", "95% interval",
        "minority", "mean layers", "layers saved", "compute saved", "time of off",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == first else "right")
    return table


def _cells(result: TaskResult) -> tuple[str, ...]:
    low, high = result.agreement_interval
    return (
        str(result.examples),
        _share(result.accuracy),
        _difference(result),
        _share(result.agreement),
        f"{low:.3f}–{high:.3f}",
        f"{_share(result.minority_agreement)} of {result.minority_examples}",
        f"{result.mean_layers:.2f} ± {result.layers_deviation:.1f}",
        f"{result.layers_saved:.1%}",
        f"{result.compute_saved:.1%}",
        f"{result.relative_time:.2f}",
    )


def _difference(result: TaskResult) -> str:
    if result.accuracy_difference is None or result.accuracy_interval is None:
        return "–"
    low, high = result.accuracy_interval
    return f"{result.accuracy_difference:+.3f} ({low:+.3f} {high:+.3f})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
