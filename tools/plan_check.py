"""Are the planner's forecasts true here? Predicted against measured seconds, mode by mode.

python tools/plan_check.py engines/ --tasks sentiment.test.jsonl --tasks ag_news.test.jsonl

Prompts of each length are few-shot prompts of one task each: as many whole examples as bring them
nearest to the length, then a question. Stage times are measured in every round, right before its
requests, and each prompt meets all modes in turn; what is compared are medians over the rounds. (A
shared machine changes by a fifth from one minute to the next: times of another minute would be
compared with the machine, not with the model of its costs.)

An exit mode is predicted twice: with the shares of held-out prompts that left at each check, which
is all that the planner knows, and with where these prompts left, which judges the cost model. Row
`auto` is what the planner picked for each prompt. With `--probe-repeats 20` every probe is computed
twenty times: where looks cost more than they bring, mode auto should be as fast as off.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from adainfer_runtime import Engine
from adainfer_runtime.backends import Backend, ProbeResult
from adainfer_runtime.backends.base import Float32
from adainfer_runtime.few_shot import ShotPool, parse_prompt
from adainfer_runtime.mode_policies import Mode
from adainfer_runtime.plan_spec import StageTimes
from adainfer_runtime.planning import (
    ModeForecast,
    RequestShape,
    TimePredictor,
    measure_times,
    pick_mode,
)
from adainfer_runtime.tasks import read_tasks

_FURTHEST = 0.2  # a prompt's length from the one that was asked for
_BENCH_REPEATS = 3  # times the rounds


@dataclass(frozen=True)
class Request:
    """A prompt, and what the planner says of it by the first round's stage times."""

    ids: list[int]
    shape: RequestShape
    forecasts: Mapping[Mode, ModeForecast]
    picked: Mode


@dataclass
class Seen:
    """What became of one request in one mode: seconds of each round, and where it left."""

    seconds: list[float] = field(default_factory=list)
    exit_layer: int = 0


@dataclass(frozen=True)
class Row:
    """Means over prompts of about one length; `prompts` of them have the mode, or picked it."""

    mode: str
    prompt_tokens: int
    new_tokens: int
    prompts: int
    predicted: float
    with_seen_exits: float
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
    """The engine, its probes as dear as asked for."""
    engine = Engine.load(folder)
    if probe_repeats == 1:
        return engine
    backend = cast(Backend, DearProbe(engine.backend, probe_repeats))
    return Engine(engine.manifest, backend, engine.tokenizer)


def planned_by(engine: Engine, times: StageTimes) -> Engine:
    """The same engine, whose plan has these times."""
    plan = engine.manifest.plan
    if plan is None:
        raise typer.BadParameter("the folder has no plan: run `adainfer bench DIR` first")
    changed = plan.model_copy(update={"times": times})
    manifest = engine.manifest.model_copy(update={"plan": changed})
    return Engine(manifest, engine.backend, engine.tokenizer)


def median_times(measured: Sequence[StageTimes]) -> StageTimes:
    """Number by number."""
    return StageTimes.model_validate(_medians([times.model_dump() for times in measured]))


def _medians(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, float):
        return statistics.median(values)
    if isinstance(first, dict):
        return {key: _medians([value[key] for value in values]) for key in first}
    if isinstance(first, list | tuple):
        return tuple(_medians(found) for found in zip(*values, strict=True))
    return first


def make_prompts(
    engine: Engine, files: Sequence[Path], tokens: int, count: int
) -> Iterator[list[int]]:
    """Token ids of so many few-shot prompts, from each file in turn.

    Files whose prompts cannot be brought near to the length give none.
    """
    random = Random(tokens)
    by_file = [list(_prompts_of(engine, file, tokens, count, random)) for file in files]
    found = [prompts[turn] for turn in range(count) for prompts in by_file if turn < len(prompts)]
    if len(found) < count:
        raise typer.BadParameter(f"{len(found)} of {count} prompts of about {tokens} tokens found")
    yield from found[:count]


def _prompts_of(
    engine: Engine, file: Path, tokens: int, count: int, random: Random
) -> Iterator[list[int]]:
    examples = read_tasks([file])
    parsed = [parse_prompt(example) for example in examples]
    pool = ShotPool.of(examples[0].task, [shot for prompt in parsed for shot in prompt.shots])
    for prompt in random.sample(parsed, min(count, len(parsed))):
        shots = pool.draw(prompt.query, min(len(pool.blocks) // 2, tokens // 4), random)
        candidates = (
            engine.tokenizer.encode("\n\n".join([*shots[:number], prompt.query]))
            for number in range(1, len(shots) + 1)
        )
        nearest: list[int] = []
        for ids in candidates:
            if nearest and abs(len(ids) - tokens) > abs(len(nearest) - tokens):
                break
            nearest = ids
        if abs(len(nearest) - tokens) <= _FURTHEST * tokens:
            yield nearest


def plan_request(engine: Engine, ids: list[int], new_tokens: int) -> Request:
    """Asks the planner."""
    shape = RequestShape(len(ids), new_tokens)
    forecasts = engine.forecasts(shape)
    return Request(
        ids, shape, {known.mode: known for known in forecasts}, pick_mode(forecasts).mode
    )


def run_request(engine: Engine, request: Request, mode: Mode) -> tuple[float, int]:
    """Seconds, and where it left."""
    new_tokens = request.shape.new_tokens
    if mode == "verified":
        done = engine.generate(
            request.ids, mode="verified", max_new_tokens=new_tokens, ignore_eos=True
        )
        return done.seconds, engine.manifest.depth
    with engine.borrow() as session:
        start = time.perf_counter()
        session.extend(request.ids)
        prediction = session.predict(request.forecasts[mode].policy)
        exit_layer = prediction.exit_layer
        for _ in range(new_tokens - 1):
            session.extend([prediction.result.token])
            prediction = session.predict(engine.policy("off"))
        return time.perf_counter() - start, exit_layer


def measure(
    engine: Engine, groups: Sequence[Sequence[list[int]]], new_tokens: Sequence[int], rounds: int
) -> tuple[list[list[Request]], list[dict[tuple[int, Mode], Seen]], StageTimes]:
    """All groups of prompts in every round, behind stage times of the same minute."""
    measured = [measure_times(engine, repeats=_BENCH_REPEATS)]
    planner = planned_by(engine, measured[0])
    requests = [
        [plan_request(planner, ids, new) for ids in group]
        for group, new in zip(groups, new_tokens, strict=True)
    ]
    seen: list[dict[tuple[int, Mode], Seen]] = [defaultdict(Seen) for _ in groups]
    for turn in range(rounds):
        if turn:
            measured.append(measure_times(engine, repeats=_BENCH_REPEATS))
        for group, found in zip(requests, seen, strict=True):
            _warm_up(planner, group[0])
            _run_group(planner, group, found, turn)
    measured.append(measure_times(engine, repeats=_BENCH_REPEATS))
    return requests, seen, median_times(measured)


def _warm_up(engine: Engine, request: Request) -> None:
    for mode in request.forecasts:
        run_request(engine, request, mode)


def _run_group(
    engine: Engine, group: Sequence[Request], found: dict[tuple[int, Mode], Seen], turn: int
) -> None:
    for number, request in enumerate(group):
        modes = list(request.forecasts)
        first = (turn + number) % len(modes)  # none always follows the same one
        for mode in [*modes[first:], *modes[:first]]:
            seconds, exit_layer = run_request(engine, request, mode)
            one = found[number, mode]
            one.seconds.append(seconds)
            one.exit_layer = exit_layer


def compare(
    engine: Engine,
    requests: Sequence[Request],
    seen: Mapping[tuple[int, Mode], Seen],
    tokens: int,
) -> Iterator[Row]:
    """One row per mode, and one for what was picked."""
    off = [statistics.median(seen[number, "off"].seconds) for number in range(len(requests))]
    modes = sorted({mode for request in requests for mode in request.forecasts}, key=_ORDER.index)
    picks = {number: request.picked for number, request in enumerate(requests)}
    rows = [
        (mode, {n: mode for n, r in enumerate(requests) if mode in r.forecasts}) for mode in modes
    ]
    for name, chosen in [*rows, ("auto", picks)]:
        predicted, again, measured = [], [], []
        for number, mode in chosen.items():
            request, one = requests[number], seen[number, mode]
            expected = _predict(engine, request, mode, None)
            predicted.append(expected)
            again.append(_predict(engine, request, mode, one.exit_layer))
            measured.append(statistics.median(one.seconds))
        yield Row(
            name,
            tokens,
            requests[0].shape.new_tokens,
            len(chosen) if name != "auto" else sum(mode != "off" for mode in picks.values()),
            statistics.fmean(predicted),
            statistics.fmean(again),
            statistics.fmean(measured),
            statistics.fmean(off[number] for number in chosen),
        )


_ORDER: tuple[Mode, ...] = ("off", "verified", "adaptive", "context", "combined")


def _predict(engine: Engine, request: Request, mode: Mode, exit_layer: int | None) -> float:
    """By the engine's plan, with held-out shares, or for a request that left at this layer."""
    forecast = request.forecasts[mode]
    checks = forecast.policy.checks
    if not checks:
        now = {known.mode: known for known in engine.forecasts(request.shape)}
        return now.get(mode, now["off"]).seconds
    plan = engine.manifest.plan
    assert plan is not None  # `planned_by` saw to it
    predictor = TimePredictor(plan.times, engine.manifest.model.num_layers, engine.backend.max_rows)
    shares = list(forecast.shares)
    if exit_layer is not None:
        # Of two checks at one layer the first is taken for the one that let the prompt go.
        at = next((n for n, check in enumerate(checks) if check.layer == exit_layer), None)
        shares = [float(number == at) for number in range(len(checks))]
    return predictor.exits(checks, shares, request.shape)


def main(
    folder: Annotated[Path, typer.Argument(help="Engine folder with a plan.")],
    tasks: Annotated[list[Path], typer.Option(help="Task file; repeatable.")],
    lengths: Annotated[str, typer.Option(help="Prompt lengths.")] = "50,200,800",
    prompts: Annotated[int, typer.Option(help="Prompts of each length.")] = 24,
    new_tokens: Annotated[int, typer.Option(help="Tokens of the decode row.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds: stage times, then all requests.")] = 3,
    probe_repeats: Annotated[
        int, typer.Option(help="Compute every probe so many times.", min=1)
    ] = 1,
    json_output: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print predicted and measured seconds of every mode."""
    engine = load(folder, probe_repeats)
    wanted = [(int(length), prompts, 1) for length in lengths.split(",")]
    wanted.append((50, max(1, prompts // 4), new_tokens))
    groups = [list(make_prompts(engine, tasks, length, count)) for length, count, _ in wanted]
    requests, seen, times = measure(engine, groups, [new for *_, new in wanted], rounds)
    planner = planned_by(engine, times)
    rows = [
        row
        for (length, *_), group, found in zip(wanted, requests, seen, strict=True)
        for row in compare(planner, group, found, length)
    ]
    if json_output:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("prompt", "new", "mode", "prompts", "predicted", "error", "with seen exits",
                  "error", "measured", "of off")  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.prompt_tokens),
            str(row.new_tokens),
            row.mode,
            str(row.prompts),
            f"{row.predicted * 1000:.1f} ms",
            f"{row.predicted / row.measured - 1.0:+.1%}",
            f"{row.with_seen_exits * 1000:.1f} ms",
            f"{row.with_seen_exits / row.measured - 1.0:+.1%}",
            f"{row.measured * 1000:.1f} ms",
            f"{row.measured / row.off:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
