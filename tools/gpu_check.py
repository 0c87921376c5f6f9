"""Checks an NVIDIA GPU end to end, and writes one JSON file to send back.

    python tools/gpu_check.py --work /tmp/gpu-check --out gpu-check.json
    python tools/gpu_check.py --list      # what would be checked, and what is missing for the rest

Exports SmolLM2-135M for every target that this machine can run (by what `adainfer doctor` finds;
the others are skipped, with the reason), with exits calibrated on a few built-in prompts; builds
TensorRT plans; compares tokens, hidden states and caches of a prompt and of decoded tokens with the
same graphs on the CPU (bf16, which CPUs lack, with the graphs in fp16), and modes adaptive, context
and verified with off, within the tolerances of `gpu_compare.py`; measures prompt and decode speed
and the stage times that the planner reads (`adainfer bench`). Each step may fail alone: its error
is kept. Started again, it goes on: what has passed is kept, and so are finished folders, unless the
code, the machine or the settings are others (or with --force).

Exit status: 0 where everything that was checked has passed, 1 otherwise, and where nothing can be
checked; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gpu_compare import compare, failures, run_modes, speed
from gpu_needs import BACKENDS, lacking

import adainfer_export
import adainfer_runtime
from adainfer_export import ExportRequest, export
from adainfer_export.build import BuildRequest, build_plans
from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.doctor import Diagnosis, diagnose
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.planning import measure_times

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
_TARGETS = tuple(dict.fromkeys(target for target, _ in _COMBINATIONS))
_CALIBRATED_AGREEMENT = 0.9
_PROMPTS = 12
_SETTINGS = "settings.json"

Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One target and precision on a GPU of compute capability `sm`.

    `calibration_limit` 0: no exits are calibrated.
    """

    work: Path
    model: str
    target: str
    precision: str
    backend: Literal["tensorrt", "tensorrt-rtx"]
    calibration_limit: int
    sm: int

    @property
    def folder(self) -> Path:
        """Its engines."""
        return self.work / f"{self.target}-{self.precision}"

    def export(self) -> None:
        """Writes the folder, with exits where the graphs run on a CPU; keeps a finished one."""
        if (self.folder / "manifest.json").is_file():
            return
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
        # TensorRT builds for the GPU at hand by itself; TensorRT-RTX must be told.
        sm = (self.sm,) if self.backend == "tensorrt-rtx" else ()
        manifest = load_manifest(self.folder)
        request = BuildRequest(self.backend, sm=sm)
        report = build_plans(self.folder, manifest, request, SilentReporter())
        return report.stamp.model_dump(mode="json")

    def reference(self) -> Engine:
        """The same graphs on the CPU."""
        half = replace(self, precision="fp16") if self.precision == "bf16" else self
        half.export()
        return Engine.load(half.folder)


def run_check(check: Check) -> Row:
    """Export, build, run, compare, measure."""
    row: Row = {"target": check.target, "precision": check.precision}

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


@dataclass(frozen=True)
class Planned:
    """A row to come; `missing` is what this machine lacks for it."""

    target: str
    precision: str
    missing: tuple[str, ...]

    def names(self, row: Row) -> bool:
        """Whether a row is this one."""
        return (row.get("target"), row.get("precision")) == (self.target, self.precision)

    def skipped(self) -> Row:
        """Its row where something is missing."""
        return {
            "target": self.target,
            "precision": self.precision,
            "skipped": "; ".join(self.missing),
        }


def plan_rows(found: Diagnosis, targets: Sequence[str], backend: str) -> list[Planned]:
    """Every combination of the targets, with what is missing for it.

    Args:
        targets: those that were asked for; empty: all that this machine can run.

    Raises:
        SystemExit: nothing can be checked, or not one of those that were asked for.
    """
    if found.gpu is None:
        raise SystemExit("no NVIDIA GPU was found: see `adainfer doctor`")
    rows = [
        Planned(target, precision, lacking(found, target, precision, backend))
        for target, precision in _COMBINATIONS
        if not targets or target in targets
    ]
    able = {row.target for row in rows if not row.missing}
    unable = {row.target: "; ".join(row.missing) for row in reversed(rows) if row.missing}
    lines = [f"{name} ({unable[name]})" for name in _TARGETS if name in unable.keys() - able]
    if lines and (targets or not able):
        raise SystemExit(f"cannot be checked here, for something is missing: {', '.join(lines)}")
    return rows


def settings_of(found: Diagnosis, options: argparse.Namespace) -> dict[str, Any]:
    """What rows and folders belong to: machine, code and options, as JSON has them."""
    settings = {
        "machine": asdict(found),
        "code": _digest_of_code(),
        "model": options.model,
        "backend": options.backend,
        "calibration_limit": options.calibration_limit,
    }
    result: dict[str, Any] = json.loads(json.dumps(settings))
    return result


def _digest_of_code() -> str:
    """Of the packages and of this tool: a clone's version says little."""
    digest = hashlib.sha256()
    for file in (__file__, adainfer_export.__file__, adainfer_runtime.__file__):
        for path in sorted(Path(file).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def passed_rows(path: Path, settings: dict[str, Any]) -> list[Row]:
    """Of an earlier run with the same settings; none where there is no such file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return []
    if not isinstance(report, dict) or {**report, "rows": None} != {**settings, "rows": None}:
        return []
    return [row for row in report["rows"] if row.get("passed")]


def claim_folder(work: Path, settings: dict[str, Any], *, force: bool) -> None:
    """Removes engines that were made with other settings, or all of them."""
    text, path = json.dumps(settings, indent=1), work / _SETTINGS
    work.mkdir(parents=True, exist_ok=True)
    if not force and path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    for target, precision in _COMBINATIONS:
        shutil.rmtree(work / f"{target}-{precision}", ignore_errors=True)
    path.write_text(text, encoding="utf-8")


def write_report(path: Path, settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """Replaces the file as a whole: whoever interrupts this keeps the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps({**settings, "rows": rows}, indent=1), encoding="utf-8")
    temporary.replace(path)


def check_all(
    options: argparse.Namespace, settings: dict[str, Any], planned: Sequence[Planned], sm: int
) -> list[Row]:
    """Runs what is not kept or skipped; the file is current after every row."""
    before = [] if options.force else passed_rows(options.out, settings)
    rows = [*before, *(row.skipped() for row in planned if row.missing)]
    write_report(options.out, settings, rows)
    for plan in planned:
        row = next((row for row in rows if plan.names(row)), None)
        if row is None:
            row = run_check(
                Check(
                    options.work,
                    options.model,
                    plan.target,
                    plan.precision,
                    options.backend,
                    options.calibration_limit,
                    sm,
                )
            )
            rows.append(row)
            write_report(options.out, settings, rows)
        print({key: value for key, value in row.items() if key not in _LONG}, flush=True)
    return rows


def _targets(text: str) -> tuple[str, ...]:
    """Of a comma-separated list."""
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in _TARGETS:
            known = ", ".join(_TARGETS)
            raise argparse.ArgumentTypeError(f"no target {name!r} is checked; there are {known}")
    return names


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("build/gpu-check"), help="folder for engines (a few GB)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--backend", choices=BACKENDS, default="tensorrt")
    parser.add_argument(
        "--targets",
        type=_targets,
        default=(),
        help=f"comma-separated, of {', '.join(_TARGETS)}; default: all that can run here",
    )
    parser.add_argument(
        "--calibration-limit",
        type=int,
        default=120,
        help="built-in prompts that exits are calibrated on, on the CPU; 0: no exits",
    )
    parser.add_argument("--force", action="store_true", help="start anew: keep no row, no folder")
    parser.add_argument(
        "--list", action="store_true", help="say what would be checked, and check nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what this machine can, writes the file, and returns the exit status."""
    options = _parse(arguments)
    found = diagnose()
    planned = plan_rows(found, options.targets, options.backend)
    if options.list:
        for row in planned:
            what = f"skipped: {'; '.join(row.missing)}" if row.missing else "can be checked"
            print(f"{row.target} {row.precision}: {what}")
        return 0
    settings = settings_of(found, options)
    claim_folder(options.work, settings, force=options.force)
    rows = check_all(options, settings, planned, found.gpu.sm if found.gpu else 0)
    checked = [row for row in rows if "skipped" not in row]
    passed = sum(row["passed"] for row in checked)
    skipped = f", {len(rows) - len(checked)} skipped" if len(rows) > len(checked) else ""
    print(f"{passed} of {len(checked)} passed{skipped}; please send {options.out}")
    return 0 if checked and passed == len(checked) else 1


if __name__ == "__main__":
    raise SystemExit(main())
