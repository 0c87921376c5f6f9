"""Are the planner's forecasts true here? Predicted against measured seconds, mode by mode.

python tools/plan_check.py engines/ --tasks sentiment.test.jsonl --tasks ag_news.test.jsonl

Prompts of each length are put together from the task files (many examples, then a question). An
exit mode is predicted twice: with the share of held-out prompts that left at each check, which is
all that the planner knows, and with the share that left in this run, which judges the cost model.
With `--probe-repeats 20` every probe is computed twenty times, and the plan is measured with that:
where looks cost more than they bring, mode auto should be as fast as off.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from adainfer_runtime import Engine
from adainfer_runtime.backends import Backend, ProbeResult
from adainfer_runtime.backends.base import Float32
from adainfer_runtime.exit_policy import ExitCheck
from adainfer_runtime.planning import (
    ModeForecast,
    RequestShape,
    TimePredictor,
    measure_times,
    pick_mode,
)
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
    off: float


class DearProbe:
    """A back end that computes every probe several times."""

    def __init__(self, inner: Backend, repeats: int) -> None:
        self._inner, self._repeats = inner, repeats

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def probe(self, hidden: Float32) -> ProbeResult:
        """The last of them."""
        for _ in range(self._repeats - 1):
            self._inner.probe(hidden)
        return self._inner.probe(hidden)


def load(folder: Path, probe_repeats: int) -> Engine:
    """The engine, its probes as dear as asked for, and its plan by what is measured then."""
    engine = Engine.load(folder)
    plan = engine.manifest.plan
    if probe_repeats == 1 or plan is None:
        return engine
    backend = cast(Backend, DearProbe(engine.backend, probe_repeats))
    times = measure_times(Engine(engine.manifest, backend, engine.tokenizer), repeats=3)
    spec = plan.model_copy(update={"times": times})
    manifest = engine.manifest.model_copy(update={"plan": spec})
    return Engine(manifest, backend, engine.tokenizer)


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
        if forecast.mode == "verified":
            done = engine.generate(ids, mode="verified", max_new_tokens=new_tokens, ignore_eos=True)
            seconds.append(done.seconds)
            continue
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
        off = rows[0].measured if rows else measured
        rows.append(
            Row(
                forecast.mode,
                shape.prompt_tokens,
                shape.new_tokens,
                forecast is best,
                forecast.seconds,
                again,
                measured,
                off,
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
    probe_repeats: Annotated[
        int, typer.Option(help="Compute every probe so many times.", min=1)
    ] = 1,
    json_output: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print predicted and measured seconds of every mode."""
    engine = load(folder, probe_repeats)
    rows = []
    for length in map(int, lengths.split(",")):
        rows += compare(engine, RequestShape(length), make_prompts(engine, tasks, length, prompts))
    decode = make_prompts(engine, tasks, 50, max(1, prompts // 4))
    rows += compare(engine, RequestShape(50, new_tokens), decode)
    if json_output:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table(
        "prompt",
        "new",
        "mode",
        "predicted",
        "error",
        "with seen shares",
        "error",
        "measured",
        "of off",
    )
    for row in rows:
        table.add_row(
            str(row.prompt_tokens),
            str(row.new_tokens),
            row.mode + (" ← auto" if row.planned else ""),
            f"{row.predicted * 1000:.1f} ms",
            f"{row.predicted / row.measured - 1.0:+.1%}",
            f"{row.with_seen_shares * 1000:.1f} ms",
            f"{row.with_seen_shares / row.measured - 1.0:+.1%}",
            f"{row.measured * 1000:.1f} ms",
            f"{row.measured / row.off:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
