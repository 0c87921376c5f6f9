"""Are the planner's forecasts true here? Predicted against measured seconds, mode by mode.

python tools/plan_check.py engines/ --tasks sentiment.test.jsonl --tasks ag_news.test.jsonl

Prompts of each length are put together from the task files (many examples, then a question). An
exit mode is predicted twice: with the share of held-out prompts that left at each check, which is
all that the planner knows, and with the share that left in this run, which judges the cost model.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adainfer_runtime import Engine
from adainfer_runtime.exit_policy import ExitCheck
from adainfer_runtime.planning import ModeForecast, RequestShape, TimePredictor, pick_mode
from adainfer_runtime.tasks import read_tasks


@dataclass(frozen=True)
class Row:
    """Means over prompts of one length."""

    mode: str
    prompt_tokens: int
    new_tokens: int
    planned: bool
    predicted: float
    with_seen_shares: float
    measured: float


def make_prompts(engine: Engine, files: Sequence[Path], tokens: int, count: int) -> list[list[int]]:
    """Token ids of exactly this length: examples of one task after another, cut from the front."""
    examples = read_tasks(files)
    prompts = []
    for start in range(count):
        ids: list[int] = []
        index = start * 7
        while len(ids) < tokens:
            text = examples[index % len(examples)].prompt
            ids = engine.tokenizer.encode(text + ("\n\n" if ids else "")) + ids
            index += 1
        prompts.append(ids[-tokens:])
    return prompts


def measure(
    engine: Engine, forecast: ModeForecast, prompts: Sequence[list[int]], new_tokens: int
) -> tuple[float, Counter[int]]:
    """Mean seconds of a request, and where it left."""
    seconds, left = [], Counter[int]()
    for ids in prompts:
        with engine.borrow() as session:
            start = time.perf_counter()
            session.extend(ids)
            prediction = session.predict(forecast.policy)
            left[prediction.exit_layer] += 1
            for _ in range(new_tokens - 1):
                session.extend([prediction.result.token])
                prediction = session.predict(engine.policy("off"))
            seconds.append(time.perf_counter() - start)
    return statistics.fmean(seconds), left


def compare(engine: Engine, shape: RequestShape, prompts: Sequence[list[int]]) -> list[Row]:
    """One row per mode."""
    plan = engine.manifest.plan
    assert plan is not None  # forecasts say so first
    predictor = TimePredictor(plan.times, engine.manifest.model.num_layers, engine.backend.max_rows)
    forecasts = engine.forecasts(shape)
    best = pick_mode(forecasts)
    rows = []
    for forecast in forecasts:
        measure(engine, forecast, prompts[:2], shape.new_tokens)
        measured, left = measure(engine, forecast, prompts, shape.new_tokens)
        checks = forecast.policy.checks
        seen = _shares(checks, left, len(prompts))
        again = predictor.exits(checks, seen, shape) if checks else forecast.seconds
        rows.append(
            Row(
                forecast.mode,
                shape.prompt_tokens,
                shape.new_tokens,
                forecast is best,
                forecast.seconds,
                again,
                measured,
            )
        )
    return rows


def _shares(checks: Sequence[ExitCheck], left: Counter[int], prompts: int) -> list[float]:
    """Of two checks at one layer the first is taken for the one that let the prompt go."""
    left = left.copy()
    return [left.pop(check.layer, 0) / prompts for check in checks]


def main(
    folder: Annotated[Path, typer.Argument(help="Engine folder with a plan.")],
    tasks: Annotated[list[Path], typer.Option(help="Task file; repeatable.")],
    lengths: Annotated[str, typer.Option(help="Prompt lengths.")] = "50,200,800",
    prompts: Annotated[int, typer.Option(help="Prompts of each length.")] = 24,
    new_tokens: Annotated[int, typer.Option(help="Tokens of the decode row.")] = 64,
    json_output: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print predicted and measured seconds of every mode."""
    engine = Engine.load(folder)
    rows = []
    for length in map(int, lengths.split(",")):
        rows += compare(engine, RequestShape(length), make_prompts(engine, tasks, length, prompts))
    decode = make_prompts(engine, tasks, 50, max(1, prompts // 4))
    rows += compare(engine, RequestShape(50, new_tokens), decode)[:1]
    if json_output:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("prompt", "new", "mode", "predicted", "with seen shares", "measured", "error")
    for row in rows:
        error = row.with_seen_shares / row.measured - 1.0
        table.add_row(
            str(row.prompt_tokens),
            str(row.new_tokens),
            row.mode + (" ← auto" if row.planned else ""),
            f"{row.predicted * 1000:.1f} ms",
            f"{row.with_seen_shares * 1000:.1f} ms",
            f"{row.measured * 1000:.1f} ms",
            f"{error:+.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
