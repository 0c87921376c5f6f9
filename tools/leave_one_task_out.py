"""How exits do on tasks that calibration never saw: one fold per task.

    python tools/leave_one_task_out.py engines/ --calibration tasks/*.calibration.jsonl \
        --test tasks/*.test.jsonl --limit 1100 --log folds.jsonl

Every fold calibrates a copy of the engine folder on all tasks but one, as `adainfer calibrate`
does, and asks that one's test prompts, as `adainfer eval` does. Folds in the log are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.progress import terminal_reporter
from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.evaluation import TaskResult, evaluate, make_methods
from adainfer_runtime.evaluation.statistics import wilson_interval
from adainfer_runtime.tasks import TaskExample, read_tasks


def main() -> None:
    """Runs the folds that the log lacks, then prints all of them."""
    arguments = _arguments()
    log: Path = arguments.log
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    folds = {fold["task"]: fold for fold in map(json.loads, lines)}
    known, asked = _by_task(arguments.calibration), _by_task(arguments.test)
    for task in sorted(asked):
        if task not in folds:
            folds[task] = _fold(arguments, task, known, asked[task])
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(folds[task]) + "\n")
    _show(list(folds.values()))


def _fold(
    arguments: argparse.Namespace,
    task: str,
    known: dict[str, list[TaskExample]],
    asked: list[TaskExample],
) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as temporary:
        folder, prompts = Path(temporary) / "engines", Path(temporary) / "others.jsonl"
        shutil.copytree(arguments.folder, folder)
        others = [example for name, group in known.items() if name != task for example in group]
        prompts.write_text("\n".join(example.model_dump_json() for example in others))
        request = CalibrationRequest(
            (prompts,), limit=arguments.limit, target_agreement=arguments.target_agreement
        )
        with terminal_reporter(quiet=arguments.quiet) as reporter:
            recalibrate(folder, load_manifest(folder), request, reporter)
        engine = Engine.load(folder)
        random.Random(0).shuffle(asked)
        methods = make_methods(["adaptive"], folder, engine)
        result = evaluate(methods, asked[: arguments.test_limit])["adaptive"].mean
    return {"task": task, **_figures(result)}


def _figures(result: TaskResult) -> dict[str, float]:
    names = ("examples", "agreement", "layers_saved", "accuracy_difference")
    return {name: getattr(result, name) for name in names}


def _show(folds: list[dict[str, object]]) -> None:
    print(f"{'task not calibrated on':28} {'prompts':>8} {'agreement':>10} {'saved':>7}")
    for fold in folds:
        saved = f"{fold['layers_saved']:.1%}"
        print(f"{fold['task']:28} {fold['examples']:8} {fold['agreement']:10.3f} {saved:>7}")
    prompts = sum(int(str(fold["examples"])) for fold in folds)
    agreed = sum(float(str(f["agreement"])) * int(str(f["examples"])) for f in folds) / prompts
    saved = sum(float(str(f["layers_saved"])) for f in folds) / len(folds)
    low, high = wilson_interval(agreed, prompts)
    print(f"pooled: agreement {agreed:.4f} ({low:.3f}-{high:.3f}), layers saved {saved:.1%} (mean)")


def _by_task(paths: list[Path]) -> dict[str, list[TaskExample]]:
    groups: dict[str, list[TaskExample]] = defaultdict(list)
    for example in read_tasks(paths):
        groups[example.task].append(example)
    return groups


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, help="calibration prompts of each fold")
    parser.add_argument("--test-limit", type=int, help="test prompts of each fold")
    parser.add_argument("--target-agreement", type=float, default=0.985)
    parser.add_argument("--log", type=Path, required=True, help="one JSON line per fold")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
