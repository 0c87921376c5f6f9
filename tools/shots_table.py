"""Methods side by side at several numbers of shots, in one table.

    python tools/shots_table.py engines/ --calibration tasks/*.calibration.jsonl \
        --test tasks/*.test.jsonl --shots 5 10 20 --work build/shots

Prompts are put together anew: queries of the test files, shots from the calibration files alone.
Two copies of the engine folder are calibrated on prompts of all numbers of shots: one with adapters
(svm, crf and threshold) and context exits, one as plain AdaInfer (`--adapters none`; svm, crf).
Every query is there at every number of shots: calibration keeps them in one part of the data, and
certifies with one of them. Beside them stand, at the savings of the first, always stopping after
one layer and layers left out for good (ShortGPT). What is finished in the work folder is not done
again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.progress import terminal_reporter
from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.evaluation import AnswerLog, TaskResult, evaluate, make_methods
from adainfer_runtime.few_shot import recombine
from adainfer_runtime.tasks import TaskExample, read_tasks, write_tasks

_KINDS = ("svm", "crf", "threshold")
_VANILLA = ("svm", "crf")
_CONTEXT = "context"


@dataclass(frozen=True)
class Row:
    """A method's figures at every number of shots; None where there is no such exit graph."""

    name: str
    results: tuple[TaskResult | None, ...]


def main() -> None:
    """Calibrates twice, asks all methods at all numbers of shots, prints the table."""
    arguments = _arguments()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    known, asked = read_tasks(arguments.calibration), read_tasks(arguments.test)
    fitting = work / "calibration.jsonl"
    mixed = [
        made for shots in arguments.shots for made in recombine(known, shots=shots, seed=shots)
    ]
    write_tasks(fitting, mixed)
    plain_adainfer = CalibrationRequest(
        files=(fitting,),
        limit=arguments.calibration_limit,
        target_agreement=arguments.target_agreement,
        adapters="none",
        classifiers=_VANILLA,
    )
    with_adapters = replace(
        plain_adainfer,
        adapters="ridge",
        classifiers=_KINDS,
        context_exit=True,
        translators="ridge",
    )
    adapted = _calibrated(arguments, "adapted", with_adapters)
    vanilla = _calibrated(arguments, "vanilla", plain_adainfer)
    tests = [
        _sampled(recombine(asked, shots=shots, shots_from=known, seed=shots), arguments.limit)
        for shots in arguments.shots
    ]
    sets = [(str(shots), test) for shots, test in zip(arguments.shots, tests, strict=True)]
    kinds = [_kinds(work, adapted, shots, test) for shots, test in sets]
    plain = [_kinds(work, vanilla, shots, test) for shots, test in sets]
    fixed = [
        _equal_savings(work, adapted, shots, test, by_kind)
        for (shots, test), by_kind in zip(sets, kinds, strict=True)
    ]
    rows = [Row("off", tuple(by_kind["off"] for by_kind in kinds))]
    rows += [Row(f"{kind}, adapters", tuple(k.get(kind) for k in kinds)) for kind in _KINDS]
    rows += [Row(f"{kind}, plain AdaInfer", tuple(k.get(kind) for k in plain)) for kind in _VANILLA]
    rows += [Row("context exits", tuple(k.get(_CONTEXT) for k in kinds))]
    rows += [Row(name, tuple(f[name] for f in fixed)) for name in ("one layer for all", "shortgpt")]
    print(_table(arguments.shots, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(_records(arguments.shots, rows), indent=1))


def _calibrated(arguments: argparse.Namespace, name: str, request: CalibrationRequest) -> Path:
    folder: Path = arguments.work / name
    if folder.exists() and load_manifest(folder).exit is not None:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(arguments.folder, folder)
    with terminal_reporter(quiet=arguments.quiet) as reporter:
        recalibrate(folder, load_manifest(folder), request, reporter)
    return folder


def _kinds(
    work: Path, folder: Path, shots: str, test: Sequence[TaskExample]
) -> dict[str, TaskResult]:
    engine = Engine.load(folder)
    graphs = tuple(kind for kind, spec in engine.manifest.exit_graphs.items() if spec.points)
    context = engine.manifest.context_exit
    if context is not None and context.points:
        graphs = (*graphs, _CONTEXT)
    return _evaluated(work, engine, folder, shots, test, graphs)


def _equal_savings(
    work: Path,
    folder: Path,
    shots: str,
    test: Sequence[TaskExample],
    by_kind: dict[str, TaskResult],
) -> dict[str, TaskResult]:
    """At the savings of the first kind, in whole layers, of which there is one at least."""
    engine = Engine.load(folder)
    layers = engine.manifest.model.num_layers
    saved = by_kind[_KINDS[0]].layers_saved if _KINDS[0] in by_kind else 0.0
    count = max(1, round(saved * layers))
    names = (f"fixed:{layers - count}", f"shortgpt:{count}")
    found = _evaluated(work, engine, folder, shots, test, names)
    return {"one layer for all": found[names[0]], "shortgpt": found[names[1]]}


def _evaluated(
    work: Path,
    engine: Engine,
    folder: Path,
    shots: str,
    test: Sequence[TaskExample],
    names: Sequence[str],
) -> dict[str, TaskResult]:
    log = AnswerLog.open(work / f"{folder.name}-{shots}.jsonl", engine.manifest, {"shots": shots})
    methods = make_methods(names, folder, engine)
    result = evaluate(methods, test, log=log)
    return {method.method: method.mean for method in result.methods}


def _table(shots: Sequence[int], rows: Sequence[Row]) -> str:
    heads = [f"{n} shots: accuracy | agreement | saved" for n in shots]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * 3 * len(shots)]
    for row in rows:
        cells = [cell for result in row.results for cell in _cells(result)]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(result: TaskResult | None) -> tuple[str, str, str]:
    if result is None:
        return "no exits", "1.000", "0.0%"
    accuracy = "–" if result.accuracy is None else f"{result.accuracy:.3f}"
    low, high = result.agreement_interval
    agreement = f"{result.agreement:.3f} ({low:.3f}–{high:.3f})"
    return accuracy, agreement, f"{result.layers_saved:.1%}"


def _records(shots: Sequence[int], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Everything that is known of every cell."""
    return [
        {"method": row.name, "shots": count, "result": asdict(result) if result else None}
        for row in rows
        for count, result in zip(shots, row.results, strict=True)
    ]


def _sampled(examples: Sequence[TaskExample], limit: int) -> list[TaskExample]:
    groups: dict[str, list[TaskExample]] = defaultdict(list)
    for example in examples:
        groups[example.task].append(example)
    chosen = (random.Random(0).sample(group, min(limit, len(group))) for group in groups.values())
    return [example for group in chosen for example in group]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="an engine folder; its exits do not matter")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--work", type=Path, required=True, help="copies, prompts and answers")
    parser.add_argument("--calibration-limit", type=int, default=1200, help="prompts in all")
    parser.add_argument("--limit", type=int, default=20, help="test prompts of each task")
    parser.add_argument("--target-agreement", type=float, default=0.985)
    parser.add_argument("--json", type=Path, help="all figures of every cell, in this file")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
