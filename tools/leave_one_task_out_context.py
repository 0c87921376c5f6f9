"""How context exits do on tasks that calibration never saw: one fold per task.

    python tools/leave_one_task_out_context.py engines/ --calibration tasks/*.calibration.jsonl \
        --test tasks/*.test.jsonl --limit 1800 --test-limit 40

Each fold fits translators (in closed form) and a classifier, and chooses points and threshold, on
the other tasks' prompts, and is asked the left-out task's: test prompts, and those calibration
prompts that would have certified. Every prompt runs once; at an exit point it looks through the
translators of every fold in turn. The last table chooses a target by a rule, see
`leave_one_task_out.py`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from leave_one_task_out import (
    add_fold_arguments,
    by_task,
    others,
    outcome_row,
    report,
    report_chosen,
    sampled,
)

from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.classifiers import CLASSIFIERS
from adainfer_export.calibrate.context import draft_context
from adainfer_export.calibrate.data import Parts, load_examples, split_parts
from adainfer_export.calibrate.exit_files import Files
from adainfer_export.calibrate.predictions import Predictions, predict_layers
from adainfer_export.calibrate.scored import score_predictions
from adainfer_export.calibrate.select import choose_threshold, evaluate, select_classifiers
from adainfer_export.calibrate.traces import AnswerCollector, AnswerTraces
from adainfer_export.calibrate.translate import (
    Rotary,
    TracedContexts,
    Unrotated,
    read_rotary,
    solve_translators,
    trace_contexts_above,
    translator_layers,
)
from adainfer_export.progress import Reporter, terminal_reporter
from adainfer_runtime import Engine
from adainfer_runtime.backends.base import Backend
from adainfer_runtime.backends.ort_cpu import load
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.tasks import TaskExample, read_tasks
from adainfer_runtime.tokenizer import load_tokenizer

# By part of the data, fold (its left-out task) and task.
LookedThrough = dict[str, dict[str, dict[str, AnswerTraces]]]


class FoldBackend:
    """A loaded folder whose context exits go by the translators of the fold at hand."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self.use(next(iter(backends)))

    def use(self, fold: str) -> None:
        """From now on, the translators of this fold."""
        self.translate = self._backends[fold].translate

    def __getattr__(self, name: str) -> Any:
        return getattr(next(iter(self._backends.values())), name)


class Folds:
    """Prompts looked at through every fold's translators.

    Args:
        manifests: per left-out task, with its translators as context exits.
    """

    def __init__(self, folder: Path, manifests: Mapping[str, Manifest]) -> None:
        manifest = next(iter(manifests.values()))
        self._backend = FoldBackend(
            {task: load(folder, m, threads=None, low_memory=True) for task, m in manifests.items()}
        )
        self._layers = tuple(manifest.context_points)
        tokenizer = load_tokenizer(folder, manifest)
        self.engine = Engine(manifest, self._backend, tokenizer)  # type: ignore[arg-type]
        self.tasks = tuple(manifests)

    def trace(
        self, examples: Sequence[TaskExample], folds: Sequence[str], reporter: Reporter
    ) -> dict[str, AnswerTraces]:
        """Per fold, what the last position of every prompt comes to over its translated context."""
        kept = {fold: AnswerCollector(self.engine, self._layers) for fold in folds}
        for example in examples:
            self._add(example, kept)
            reporter.step(example.task)
        return {fold: collector.traces() for fold, collector in kept.items()}

    def _add(self, example: TaskExample, kept: Mapping[str, AnswerCollector]) -> None:
        ids = self.engine.tokenizer.encode(example.prompt)
        if len(ids) < 2:
            return
        seen: dict[str, dict[int, Any]] = {fold: {} for fold in kept}
        start = time.perf_counter()
        with self.engine.borrow() as session:
            session.extend(ids)
            for layer in self._layers:
                for fold in kept:
                    self._backend.use(fold)
                    seen[fold][layer] = session.answers_over_context(layer, (len(ids) - 1,))
            session.complete()
            final = session.hidden()[-1:].copy()
        for fold, collector in kept.items():
            collector.seconds += time.perf_counter() - start
            collector.add(example, seen[fold], final)


def main() -> None:
    """Fits every fold's translators, looks through them, prints the folds of every setting."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name) / "engines"
        shutil.copytree(arguments.folder, folder)
        with terminal_reporter(quiet=arguments.quiet) as reporter:
            engine, seen = _look(folder, arguments, reporter)
    kind = arguments.classifier
    folds = [Fold.of(task, engine, seen) for task in seen["test"]]
    by_target = {}
    for target in arguments.target_agreement:
        print(f"\ncontext exits ({kind}), target agreement {target}")
        by_target[target] = [fold.outcome(kind, target) for fold in folds]
        report(by_target[target])
    report_chosen(by_target, arguments.agreement)


def _look(
    folder: Path, arguments: argparse.Namespace, reporter: Reporter
) -> tuple[Engine, LookedThrough]:
    """An engine for probes, and the traces."""
    request = CalibrationRequest(files=tuple(arguments.calibration), limit=arguments.limit)
    parts = split_parts(load_examples(request))
    folds = Folds(folder, _fit_folds(folder, parts, request, arguments.exit_layers, reporter))
    test = sampled(read_tasks(arguments.test), arguments.test_limit)
    wanted = {
        "classifier": parts.classifier,
        "selection": parts.selection,
        "certification": parts.certification,
        "test": tuple(test),
    }
    found: LookedThrough = {}
    for part, examples in wanted.items():
        reporter.begin(f"looking ({part})", len(examples))
        found[part] = {fold: {} for fold in folds.tasks}
        for task, group in by_task(examples).items():
            chosen = (task,) if part == "test" else folds.tasks
            for fold, traces in folds.trace(group, chosen, reporter).items():
                found[part][fold][task] = traces
    return folds.engine, found


def _predictions(engine: Engine, traces: Sequence[AnswerTraces]) -> Predictions:
    """Checks count nothing here: savings are in layers, as everywhere else."""
    predictions = predict_layers(engine, AnswerTraces.concatenate(traces), {})
    free = (0.0,) * len(predictions.layers)
    return replace(predictions, check_layers=free, exit_check_layers=free)


def _fit_folds(
    folder: Path,
    parts: Parts,
    request: CalibrationRequest,
    layers: Sequence[int] | None,
    reporter: Reporter,
) -> dict[str, Manifest]:
    """Per left-out task the manifest whose context exits the other tasks' prompts taught."""
    bare = load_manifest(folder)
    rotary = read_rotary(folder, bare)
    if rotary is None:
        raise SystemExit("this model has no context exits")
    engine = Engine.of_manifest(folder, bare)
    reporter.begin("tracing contexts", len(parts.adapters))
    trace = partial(
        trace_contexts_above,
        engine,
        rotary,
        layers=layers or translator_layers(bare),
        reporter=reporter,
        held_out=parts.held_out,
    )
    traced = {task: trace(examples=group) for task, group in by_task(parts.adapters).items()}
    return {
        task: _manifest(folder, bare, rotary, others(traced, task), request)
        for task in sorted(traced)
    }


def _manifest(
    folder: Path,
    bare: Manifest,
    rotary: Rotary | Unrotated,
    traced: Sequence[TracedContexts],
    request: CalibrationRequest,
) -> Manifest:
    translators = solve_translators(bare, TracedContexts.concatenate(traced).moments)
    draft = draft_context(Files(folder), bare, translators, rotary, request)
    return bare.model_copy(update={"context_exit": draft})


@dataclass(frozen=True)
class Fold:
    """What a left-out task's fold fits on, chooses by, takes its threshold from and is asked."""

    task: str
    classifier: Predictions
    selection: Predictions
    certification: Predictions
    asked: Mapping[str, Predictions]

    @classmethod
    def of(cls, task: str, engine: Engine, seen: LookedThrough) -> Fold:
        """Predictions over the translators that never saw the task."""
        parts = {
            part: _predictions(engine, others(seen[part][task], task))
            for part in ("classifier", "selection", "certification")
        }
        asked = {
            "held_out": _predictions(engine, [seen["certification"][task][task]]),
            "test": _predictions(engine, [seen["test"][task][task]]),
        }
        return cls(task, **parts, asked=asked)

    def outcome(self, kind: str, target: float) -> dict[str, Any]:
        """A row of the report."""
        entries = {kind: CLASSIFIERS[kind]}
        found = select_classifiers(self.classifier, self.selection, target, 0, entries).get(kind)
        row: dict[str, Any] = {"task": self.task}
        for name, predictions in self.asked.items():
            outcome = None
            if found is not None:
                scored = score_predictions(found, self.certification)
                threshold = choose_threshold(scored, target).threshold
                outcome = evaluate(score_predictions(found, predictions), threshold)
            row[name] = outcome_row(len(predictions.final), outcome)
        return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_fold_arguments(parser)
    parser.add_argument(
        "--exit-layers",
        type=int,
        nargs="+",
        help="points to choose from (default: all that a calibration would try; fewer are faster)",
    )
    parser.add_argument("--classifier", default="svm", choices=tuple(CLASSIFIERS))
    parser.add_argument(
        "--work",
        type=Path,
        help="where the copy of the folder goes (default: among temporary files)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
