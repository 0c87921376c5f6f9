"""How exits do on tasks that calibration never saw: one fold per task.

    python tools/leave_one_task_out.py engines/ --calibration tasks/*.calibration.jsonl \
        --test tasks/*.test.jsonl --limit 1300 --test-limit 60 --target-agreement 0.985 0.99

Every prompt runs once, through all layers; each fold then fits adapters, classifier and exit
points, and chooses the threshold, on the other tasks' prompts, as `adainfer calibrate` does, and
is asked the left-out task's prompts. Beside test prompts it is asked those of the left-out task's
calibration prompts that would have certified.

Which target gives the wanted agreement on a task that nobody has seen? The last table answers by a
rule: each fold takes the loosest target at which the *other* folds' left-out calibration prompts
show the wanted agreement (`--agreement`) at 95% confidence, and nothing exits where none does.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.data import Parts, load_examples, split_parts
from adainfer_export.calibrate.fitting import Fitted, FittedGraph, TracedParts, fit_traced
from adainfer_export.calibrate.predictions import predict_layers
from adainfer_export.calibrate.scored import Scored, score_predictions
from adainfer_export.calibrate.select import Outcome, choose_threshold, evaluate
from adainfer_export.calibrate.traces import (
    AnswerTraces,
    PromptTraces,
    candidate_layers,
    trace_answers,
    trace_prompts,
)
from adainfer_export.calibrate.trust import with_trust
from adainfer_export.progress import Reporter, SilentReporter, terminal_reporter
from adainfer_runtime import Engine
from adainfer_runtime.evaluation.statistics import wilson_interval
from adainfer_runtime.tasks import TaskExample, read_tasks

_Part = TypeVar("_Part")
_CHANCE = 0.05  # of supporting a target that does not keep the agreement

Fold = Mapping[str, Any]  # a task's outcomes: see `run_folds`


@dataclass(frozen=True)
class TracedTasks:
    """Every prompt's inside, by task."""

    adapters: Mapping[str, PromptTraces]
    classifier: Mapping[str, AnswerTraces]
    selection: Mapping[str, AnswerTraces]
    certification: Mapping[str, AnswerTraces]
    test: Mapping[str, AnswerTraces]

    def without(self, task: str) -> tuple[TracedParts, AnswerTraces]:
        """What a fold may see: to fit on, and to choose the threshold on."""
        prompts = PromptTraces.concatenate(others(self.adapters, task))
        classifier, selection, certification = (
            AnswerTraces.concatenate(others(part, task))
            for part in (self.classifier, self.selection, self.certification)
        )
        return TracedParts(prompts, classifier, selection), certification


def main() -> None:
    """Traces, then prints the folds of every setting."""
    arguments = _arguments()
    engine = Engine.load(arguments.folder)
    with terminal_reporter(quiet=arguments.quiet) as reporter:
        traced = trace_tasks(engine, arguments, reporter)
    for classifier in arguments.classifier:
        by_target = {}
        for target in arguments.target_agreement:
            request = CalibrationRequest(
                target_agreement=target, adapters=arguments.adapters, classifiers=(classifier,)
            )
            folds = by_target[target] = run_folds(engine, arguments.folder, traced, request)
            print(f"\n{classifier}, target agreement {target}")
            report(folds)
            if arguments.json:
                with arguments.json.open("a", encoding="utf-8") as stream:
                    setting = {"classifier": classifier, "target": target}
                    stream.write(json.dumps({**setting, "folds": folds}) + "\n")
        report_chosen(by_target, arguments.agreement)


def trace_tasks(engine: Engine, arguments: argparse.Namespace, reporter: Reporter) -> TracedTasks:
    """Runs all prompts once; exits are looked for above the first two thirds of the layers."""
    request = CalibrationRequest(files=tuple(arguments.calibration), limit=arguments.limit)
    parts = split_parts(load_examples(request))
    least = engine.manifest.model.num_layers * 2 // 3
    layers = tuple(layer for layer in candidate_layers(engine) if layer >= least)

    def answers(examples: Sequence[TaskExample], *, in_context: bool) -> dict[str, AnswerTraces]:
        reporter.begin("tracing answers", len(examples))
        return {
            task: trace_answers(
                engine,
                group,
                reporter,
                in_context=in_context,
                layers=layers,
                held_out=parts.held_out,
            )
            for task, group in by_task(examples).items()
        }

    reporter.begin("tracing prompts", len(parts.adapters))
    adapters = {
        task: trace_prompts(engine, group, reporter, request.seed, layers, parts.held_out)
        for task, group in by_task(parts.adapters).items()
    }
    return TracedTasks(
        adapters,
        answers(parts.classifier, in_context=True),
        answers(parts.selection, in_context=False),
        answers(parts.certification, in_context=False),
        answers(sampled(read_tasks(arguments.test), arguments.test_limit), in_context=False),
    )


def run_folds(
    engine: Engine, folder: Path, traced: TracedTasks, request: CalibrationRequest
) -> list[dict[str, Any]]:
    """One fold per task: its outcome on calibration prompts of that task, and on test prompts."""
    return [_fold(engine, folder, traced, request, task) for task in sorted(traced.test)]


def _fold(
    engine: Engine, folder: Path, traced: TracedTasks, request: CalibrationRequest, task: str
) -> dict[str, Any]:
    seen, certification = traced.without(task)
    no_parts = Parts((), (), (), ())
    fitted = fit_traced(folder, engine, no_parts, seen, request, SilentReporter())
    asked = {"held_out": traced.certification[task], "test": traced.test[task]}
    # Where the kind asked for finds no exits, another takes its place in a calibration; not here.
    (kind,) = request.classifiers
    graph = next((graph for graph in fitted.graphs if graph.name == kind), None)
    threshold = math.inf
    if graph is not None:
        scored = _score(engine, fitted, graph, certification)
        threshold = choose_threshold(scored, request.target_agreement).threshold
    row: dict[str, Any] = {"task": task}
    for name, traces in asked.items():
        outcome = None
        if graph is not None and math.isfinite(threshold):
            outcome = evaluate(_score(engine, fitted, graph, traces), threshold)
        row[name] = outcome_row(len(traces.token), outcome)
    return row


def outcome_row(prompts: int, outcome: Outcome | None) -> dict[str, Any]:
    """Figures of a fold; without an outcome nothing exits."""
    if outcome is None:
        return {"prompts": prompts, "wrong": 0, "saved": 0.0}
    saved = outcome.layers_saved
    return {"prompts": prompts, "wrong": outcome.disagreements, "saved": saved}


def _score(engine: Engine, fitted: Fitted, graph: FittedGraph, traces: AnswerTraces) -> Scored:
    """The fold's own exit graph on other prompts."""
    adapters = {layer: adapter for layer, (adapter, _) in fitted.adapters.items()}
    trusts = {layer: trust for layer, (_, trust) in fitted.adapters.items()}
    predictions = predict_layers(engine, traces, adapters)
    if trusts:
        predictions = with_trust(traces, predictions, trusts)
    return score_predictions(graph.classifier, predictions)


def report(folds: Sequence[Fold]) -> None:
    """A row per task, and pooled figures."""
    for name in ("held_out", "test"):
        print(f"{name:28} {'prompts':>8} {'agreement':>10} {'saved':>7}")
        rows = [fold[name] for fold in folds]
        for fold, row in zip(folds, rows, strict=True):
            share = 1 - row["wrong"] / row["prompts"]
            target = f"   target {fold['target']}" if "target" in fold else ""
            print(f"{fold['task']:28} {row['prompts']:8} {share:10.3f} {row['saved']:7.1%}{target}")
        prompts, wrong = (sum(row[key] for row in rows) for key in ("prompts", "wrong"))
        low, high = wilson_interval(1 - wrong / prompts, prompts)
        saved = float(np.mean([row["saved"] for row in rows]))
        print(
            f"pooled: agreement {1 - wrong / prompts:.4f} ({low:.3f}-{high:.3f}) of {prompts}, "
            f"layers saved {saved:.1%} (mean of tasks)"
        )


def report_chosen(by_target: Mapping[float, Sequence[Fold]], agreement: float) -> None:
    """The folds, each at the target that the others support; see the module."""
    print(f"\neach fold at the target that the others support for {agreement}")
    report([_chosen(task, by_target, agreement) for task in _tasks(by_target)])


def _tasks(by_target: Mapping[float, Sequence[Fold]]) -> list[str]:
    return [fold["task"] for fold in next(iter(by_target.values()))]


def _chosen(task: str, by_target: Mapping[float, Sequence[Fold]], agreement: float) -> Fold:
    own = {
        target: next(fold for fold in folds if fold["task"] == task)
        for target, folds in by_target.items()
    }
    for target in sorted(own):
        seen = [fold["held_out"] for fold in by_target[target] if fold["task"] != task]
        wrong, prompts = (sum(row[key] for row in seen) for key in ("wrong", "prompts"))
        if stats.binom.cdf(wrong, prompts, 1.0 - agreement) <= _CHANCE:
            return {**own[target], "target": target}
    _, strictest = max(own.items())
    nothing = {name: outcome_row(strictest[name]["prompts"], None) for name in ("held_out", "test")}
    return {"task": task, **nothing}


def others(parts: Mapping[str, _Part], task: str) -> list[_Part]:
    """All tasks' but one's."""
    return [part for name, part in parts.items() if name != task]


def by_task(examples: Sequence[TaskExample]) -> dict[str, list[TaskExample]]:
    """Examples by their task."""
    groups: dict[str, list[TaskExample]] = defaultdict(list)
    for example in examples:
        groups[example.task].append(example)
    return groups


def sampled(examples: Sequence[TaskExample], limit: int | None) -> list[TaskExample]:
    """A seeded sample of so many examples of each task."""
    chosen: list[TaskExample] = []
    for group in by_task(examples).values():
        chosen += group if limit is None else random.Random(0).sample(group, min(limit, len(group)))
    return chosen


def add_fold_arguments(parser: argparse.ArgumentParser) -> None:
    """What every kind of fold is made from."""
    parser.add_argument("folder", type=Path, help="an engine folder without calibrated exits")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, help="calibration prompts in all")
    parser.add_argument("--test-limit", type=int, help="test prompts of each task")
    parser.add_argument(
        "--target-agreement",
        type=float,
        nargs="+",
        default=[0.985, 0.99, 0.993, 0.995, 0.997],
        help="targets of the calibration, each of which gives tables (default: %(default)s)",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.985,
        help="wanted on tasks unseen: a target is chosen for it (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_fold_arguments(parser)
    parser.add_argument("--classifier", nargs="+", default=["svm"])
    parser.add_argument("--adapters", default="distilled", choices=("distilled", "ridge", "none"))
    parser.add_argument("--json", type=Path, help="one line per setting is added to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
