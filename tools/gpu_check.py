"""Checks an NVIDIA GPU end to end, and writes one JSON file to send back.

    python tools/gpu_check.py --work /tmp/gpu-check --out gpu-check.json

Exports SmolLM2-135M for every target that this machine can run (see `adainfer doctor`), builds
TensorRT plans, compares tokens, hidden states and caches with the same graphs on the CPU, and
measures prompt and decode speed and the stage times that the planner reads (`adainfer bench`). Each
step may fail alone: its error is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from adainfer_export import ExportRequest, export
from adainfer_export.build import BuildRequest, build_plans
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine, NoExit
from adainfer_runtime.devices import least_sm
from adainfer_runtime.doctor import diagnose
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.planning import measure_times

_PROMPT = "Once upon a time, in a small village by the sea, there lived an old fisherman who"
_LONG = ("stamp", "stage_times", "traceback")
_COMBINATIONS = (
    ("ort-cuda", "fp16"),
    ("ort-cuda", "bf16"),
    ("ort-cuda", "int4"),
    ("tensorrt", "fp16"),
    ("tensorrt", "bf16"),
    ("tensorrt", "fp8"),
    ("tensorrt", "int4"),
    ("tensorrt-basic", "fp16"),
    ("tensorrt-basic", "int4"),
)


def check(work: Path, model: str, target: str, precision: str, backend: str) -> dict[str, Any]:
    """One target and precision: export, build, run, compare, measure."""
    folder = work / f"{target}-{precision}"
    row: dict[str, Any] = {"target": target, "precision": precision}

    def step(name: str, work_of: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            result = work_of()
        except Exception as error:
            row["failed"], row["error"] = name, f"{type(error).__name__}: {error}"
            row["traceback"] = traceback.format_exc()
            raise
        row[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
        return result

    try:
        request = ExportRequest(model, folder, target=target, precision=precision, force=True)
        step("export", lambda: export(request))
        manifest = load_manifest(folder)
        if target.startswith("tensorrt"):
            build = BuildRequest("tensorrt-rtx" if backend == "tensorrt-rtx" else "tensorrt")
            report = step("build", lambda: build_plans(folder, manifest, build, SilentReporter()))
            row["stamp"] = report.stamp.model_dump(mode="json")
        device = step("load", lambda: Engine.load(folder, device="cuda"))
        row |= step("speed", lambda: speed(device))
        row["stage_times"] = step("bench", lambda: measure_times(device).model_dump(mode="json"))
        if precision != "bf16":
            row |= step("compare", lambda: compare(device, Engine.load(folder)))
    except Exception:
        row["passed"] = False
        return row
    row["passed"] = row.get("same_tokens", 1.0) >= 0.9
    return row


def compare(device: Engine, cpu: Engine) -> dict[str, Any]:
    """The same graphs on both: teacher-forced tokens, hidden states and caches."""
    ids = [*device.tokenizer.encode(_PROMPT)]
    ids += cpu.generate(ids, max_new_tokens=32, ignore_eos=True).tokens
    hidden, tokens, caches = [], [], []
    for engine in (device, cpu):
        session = engine.session()
        session.extend(ids[:11])
        session.advance(7)  # positions that wait, and are filled later
        session.extend(ids[11:])
        tokens.append(session.log_probs(0).argmax(-1))
        hidden.append(np.asarray(session.hidden()))
        caches.append([np.asarray(part) for layer in (1, 15, 30) for part in session.kv(layer)])
    scale = max(1.0, float(np.abs(hidden[1]).max()))
    return {
        "same_tokens": float((tokens[0] == tokens[1]).mean()),
        "hidden_relative": float(np.abs(hidden[0] - hidden[1]).max() / scale),
        "cache_largest": max(float(np.abs(a - b).max()) for a, b in zip(*caches, strict=True)),
    }


def speed(engine: Engine) -> dict[str, Any]:
    """Median milliseconds of a decoded token and of a prompt of 128, all layers."""
    session = engine.session()
    prompt = [int(token) for token in np.random.default_rng(0).integers(1000, 40000, 128)]
    prefill, decode = [], []
    for _ in range(5):
        session.truncate(0)
        start = time.perf_counter()
        session.extend(prompt)
        token = session.predict(NoExit()).result.token
        prefill.append(time.perf_counter() - start)
        for _ in range(32):
            start = time.perf_counter()
            session.extend([token])
            token = session.predict(NoExit()).result.token
            decode.append(time.perf_counter() - start)
    return {
        "prefill_128_ms": round(1e3 * statistics.median(prefill), 3),
        "decode_ms": round(1e3 * statistics.median(decode), 3),
    }


def main() -> None:
    """Runs what this machine can, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for engines (a few GB)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt")
    parser.add_argument("--targets", default="", help="comma-separated; default: all")
    options = parser.parse_args()
    found = diagnose()
    report: dict[str, Any] = {"machine": asdict(found), "rows": []}
    if found.gpu is None:
        raise SystemExit("no NVIDIA GPU was found: see `adainfer doctor`")
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in options.targets.split(",") if name]
    for target, precision in _COMBINATIONS:
        if (wanted and target not in wanted) or found.gpu.sm < least_sm(precision):
            continue
        row = check(options.work, options.model, target, precision, options.backend)
        print({key: value for key, value in row.items() if key not in _LONG})
        report["rows"].append(row)
        options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    passed = sum(row["passed"] for row in report["rows"])
    print(f"{passed} of {len(report['rows'])} passed; please send {options.out}")


if __name__ == "__main__":
    main()
