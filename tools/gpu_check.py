"""Checks an NVIDIA GPU end to end, and writes one JSON file to send back.

    python tools/gpu_check.py --work /tmp/gpu-check --out gpu-check.json

Exports SmolLM2-135M for every target that this machine can run (see `adainfer doctor`), with exits
calibrated on a few built-in prompts; builds TensorRT plans; compares tokens, hidden states and
caches with the same graphs on the CPU (bf16, which CPUs lack, with the graphs in fp16), and modes
adaptive, context and verified with off, within the tolerances below; measures prompt and decode
speed and the stage times that the planner reads (`adainfer bench`). Each step may fail alone: its
error is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adainfer_export import ExportRequest, export
from adainfer_export.build import BuildRequest, build_plans
from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine, NoExit
from adainfer_runtime.devices import least_sm
from adainfer_runtime.doctor import diagnose
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.errors import ExitUnavailableError
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


@dataclass(frozen=True)
class Tolerance:
    """What may differ from the CPU, whose kernels add up in another order.

    Attributes:
        same_tokens: least share of equal next tokens, teacher-forced.
        hidden, cache: largest difference, by the largest value.
    """

    same_tokens: float
    hidden: float
    cache: float


# Rounding of 2^-11 and 2^-8 per operation over 30 layers; 8-bit floats round to a neighbour now and
# then. Chosen beforehand: no GPU has run this yet.
_TOLERANCES = {
    "fp16": Tolerance(0.95, 0.03, 0.03),
    "int4": Tolerance(0.95, 0.05, 0.05),
    "bf16": Tolerance(0.85, 0.15, 0.15),
    "fp8": Tolerance(0.85, 0.15, 0.15),
}
# Least share of prompts that give off's first token, or (verified, exact but for roundings of
# kernels for one and for several rows) off's whole text.
_LEAST_AGREEMENT = {"adaptive": 0.7, "context": 0.7, "verified": 0.7}
_CALIBRATED_AGREEMENT = 0.9
_PROMPTS = 12
_NEW_TOKENS = 8


@dataclass(frozen=True)
class Check:
    """One target and precision. `calibration_limit` 0: no exits are calibrated."""

    work: Path
    model: str
    target: str
    precision: str
    backend: str
    calibration_limit: int

    @property
    def folder(self) -> Path:
        """Its engines."""
        return self.work / f"{self.target}-{self.precision}"

    def export(self) -> None:
        """Writes the folder, with exits where the graphs run on a CPU."""
        calibration = None
        if self.calibration_limit and self.precision != "bf16":
            calibration = CalibrationRequest(
                builtin=True,
                limit=self.calibration_limit,
                target_agreement=_CALIBRATED_AGREEMENT,
                adapters="ridge",
                translators="ridge",
                context_exit=True,
            )
        export(
            ExportRequest(
                self.model,
                self.folder,
                target=self.target,
                precision=self.precision,
                calibration=calibration,
                force=True,
            )
        )

    def build(self) -> dict[str, Any]:
        """The plans' stamp."""
        request = BuildRequest("tensorrt-rtx" if self.backend == "tensorrt-rtx" else "tensorrt")
        manifest = load_manifest(self.folder)
        report = build_plans(self.folder, manifest, request, SilentReporter())
        return report.stamp.model_dump(mode="json")

    def reference(self) -> Engine:
        """The same graphs on the CPU."""
        if self.precision != "bf16":
            return Engine.load(self.folder)
        half = replace(self, precision="fp16")
        if not (half.folder / "manifest.json").is_file():
            half.export()
        return Engine.load(half.folder)


def run_check(check: Check) -> dict[str, Any]:
    """Export, build, run, compare, measure."""
    row: dict[str, Any] = {"target": check.target, "precision": check.precision}

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
        step("export", check.export)
        if check.target.startswith("tensorrt"):
            row["stamp"] = step("build", check.build)
        device = step("load", lambda: Engine.load(check.folder, device="cuda"))
        row |= step("speed", lambda: speed(device))
        row["stage_times"] = step("bench", lambda: measure_times(device).model_dump(mode="json"))
        row |= step("compare", lambda: compare(device, check.reference()))
        # Of another seed than those that were calibrated on.
        prompts = [example.prompt for example in builtin_examples(seed=1)[:_PROMPTS]]
        row["modes"] = step("modes", lambda: run_modes(device, prompts))
    except Exception:
        row["passed"] = False
        return row
    row["failures"] = failures(row)
    row["passed"] = not row["failures"]
    return row


def compare(device: Engine, cpu: Engine) -> dict[str, Any]:
    """Teacher-forced tokens, hidden states and caches of both."""
    ids = [*device.tokenizer.encode(_PROMPT)]
    ids += cpu.generate(ids, max_new_tokens=32, ignore_eos=True).tokens
    total = device.manifest.model.num_layers
    inside = sorted({*device.manifest.boundaries} & {*cpu.manifest.boundaries} - {total})
    hidden, tokens, caches = [], [], []
    for engine in (device, cpu):
        session = engine.session()
        session.extend(ids[:11])
        if inside:
            session.advance(inside[len(inside) // 2])  # positions that wait, and are filled later
        session.extend(ids[11:])
        tokens.append(session.log_probs(0).argmax(-1))
        hidden.append(np.asarray(session.hidden()))
        layers = sorted({1, (total + 1) // 2, total})
        caches.append([np.asarray(part) for layer in layers for part in session.kv(layer)])
    return {
        "same_tokens": float((tokens[0] == tokens[1]).mean()),
        "hidden_relative": _relative(hidden[0], hidden[1]),
        "cache_relative": max(_relative(a, b) for a, b in zip(*caches, strict=True)),
    }


def run_modes(engine: Engine, prompts: Sequence[str]) -> dict[str, Any]:
    """Modes that leave early or draft, against off on the same device.

    A mode that the folder has no exits for is marked `unavailable`.
    """
    off = [_generate(engine, prompt, "off") for prompt in prompts]
    found: dict[str, Any] = {}
    for mode in _LEAST_AGREEMENT:
        try:
            results = [_generate(engine, prompt, mode) for prompt in prompts]
            # Alone, for what a later token needs of skipped layers is computed then.
            first = [_generate(engine, prompt, mode, tokens=1) for prompt in prompts]
        except ExitUnavailableError as error:
            found[mode] = {"unavailable": str(error)}
            continue
        pairs = list(zip(results, off, strict=True))
        found[mode] = {
            "same_first_token": float(np.mean([a.tokens[0] == b.tokens[0] for a, b in pairs])),
            "same_text": float(np.mean([a.tokens == b.tokens for a, b in pairs])),
            "layers_saved": float(np.mean([result.layers_saved for result in first])),
            "left_early": sum(result.layers_saved > 0.0 for result in first),
        }
    return found


def failures(row: dict[str, Any]) -> list[str]:
    """What lies outside the tolerances, a line each."""
    tolerance = _TOLERANCES[row["precision"]]
    found = []
    if row["same_tokens"] < tolerance.same_tokens:
        found.append(f"same_tokens {row['same_tokens']:.3f} < {tolerance.same_tokens}")
    for name, most in (("hidden", tolerance.hidden), ("cache", tolerance.cache)):
        value = row[f"{name}_relative"]
        if not value <= most:  # what is no number fails, too
            found.append(f"{name}_relative {value:.3g} > {most}")
    for mode, result in row["modes"].items():
        if "unavailable" in result:
            continue
        key = "same_text" if mode == "verified" else "same_first_token"
        if result[key] < _LEAST_AGREEMENT[mode]:
            found.append(f"{mode}: {key} {result[key]:.2f} < {_LEAST_AGREEMENT[mode]}")
    return found


def _generate(engine: Engine, prompt: str, mode: str, tokens: int = _NEW_TOKENS) -> Any:
    return engine.generate(prompt, max_new_tokens=tokens, mode=mode, ignore_eos=True)


def _relative(mine: Any, theirs: Any) -> float:
    return float(np.abs(mine - theirs).max() / max(1.0, float(np.abs(theirs).max())))


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
    parser.add_argument(
        "--calibration-limit",
        type=int,
        default=120,
        help="built-in prompts that exits are calibrated on, on the CPU; 0: no exits",
    )
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
        row = run_check(
            Check(
                options.work,
                options.model,
                target,
                precision,
                options.backend,
                options.calibration_limit,
            )
        )
        print({key: value for key, value in row.items() if key not in _LONG})
        report["rows"].append(row)
        options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    passed = sum(row["passed"] for row in report["rows"])
    print(f"{passed} of {len(report['rows'])} passed; please send {options.out}")


if __name__ == "__main__":
    main()
