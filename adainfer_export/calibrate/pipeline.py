"""The calibration, step by step: fit, write the graphs, choose thresholds, certify, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import write_manifest
from adainfer_runtime.manifest import ExitSpec, Manifest

from ..errors import OutputError
from ..progress import Reporter
from .certify import make_certificate, threshold_grid
from .context import with_context_exit
from .data import Parts, prompt_hash
from .exit_files import Files, write_exits, write_report
from .fitting import Fitted, FittedGraph, classifier_entries, fit_graphs
from .request import CalibrationRequest
from .scored import CHOICE, Scored, observe, score_predictions
from .select import Outcome, choose_threshold, outcome_figures
from .shortlist import with_shortlist

__all__ = ["calibrate", "recalibrate"]


def calibrate(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> Manifest:
    """Fits exit graphs to the engine in a folder and writes their files beside the stages.

    The folder's manifest is not touched: the caller writes the one that is returned. New files
    carry their content's hash in their names, so that an engine that is in use keeps its own.

    Raises:
        TaskFileError: a task file cannot be read.
        CalibrationError: too few usable prompts, or no room for an exit point.
    """
    in_use, manifest = manifest, manifest.uncalibrated()
    fitted = fit_graphs(folder, manifest, request, reporter)
    draft = ExitSpec(
        points=(), target_agreement=request.target_agreement, calibration=_figures(request, fitted)
    )
    files = Files(folder)
    # Thresholds and certificates are of the exit graphs as they run: they are written first.
    written = write_exits(files, manifest, fitted.graphs, fitted.adapters, draft)
    scored = _observe(folder, written, fitted, reporter)
    outcomes = {
        name: choose_threshold(graph, request.target_agreement) for name, graph in scored.items()
    }
    paying = tuple(graph for graph in fitted.graphs if outcomes[graph.name].net_saved > 0)
    final = write_exits(files, manifest, paying, fitted.adapters, draft)
    final = _finish(final, paying, scored, outcomes)
    if request.context_exit:
        final = with_context_exit(
            files, final, fitted.parts, classifier_entries(request), request, reporter
        )
    if request.shortlist:
        final = with_shortlist(files, final, fitted.parts, reporter)
    final = _report(folder, final, fitted.parts)
    tried = written.files.keys() | files.written.keys()
    for name in tried - final.files.keys() - in_use.files.keys():
        (folder / name).unlink()
    return final


def recalibrate(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> Manifest:
    """Gives an existing engine folder another exit graph; its manifest is replaced at the end.

    Raises:
        OutputError: the folder cannot be written; the old exit graph stays in force.
        TaskFileError, CalibrationError: see `calibrate`.
    """
    try:
        renewed = calibrate(folder, manifest, request, reporter)
        write_manifest(folder, renewed)
        for name in manifest.files.keys() - renewed.files.keys():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{folder} cannot be written: {reason}; it was left as it is") from error
    return renewed


def _observe(
    folder: Path, written: Manifest, fitted: Fitted, reporter: Reporter
) -> dict[str, Scored]:
    if not fitted.graphs:
        return {}
    reporter.begin("certifying", len(fitted.parts.certification))
    checks = {graph.name: graph.selection.check_layers for graph in fitted.graphs}
    engine = Engine.of_manifest(folder, written)
    return observe(engine, fitted.parts.certification, checks, reporter)


def _finish(
    manifest: Manifest,
    graphs: Sequence[FittedGraph],
    scored: Mapping[str, Scored],
    outcomes: Mapping[str, Outcome],
) -> Manifest:
    """The manifest with every graph's threshold, certificate and held-out figures."""
    finished = {}
    for graph in graphs:
        choice = graph.name == CHOICE
        spec = manifest.choice_exit if choice else manifest.exit_graphs[graph.name]
        assert spec is not None  # it was written for this graph
        outcome, seen = outcomes[graph.name], scored[graph.name]
        grid = threshold_grid(score_predictions(graph.classifier, graph.selection))
        finished[graph.name] = spec.model_copy(
            update={
                "threshold": outcome.threshold,
                "thresholds": tuple(grid.tolist()),
                "certificate": make_certificate(manifest, seen, grid, spec.calibration["data"]),
                "calibration": {**spec.calibration, "held_out": outcome_figures(outcome)},
            }
        )
    update: dict[str, Any] = {"choice_exit": finished.pop(CHOICE, manifest.choice_exit)}
    if finished:
        default, *others = finished.values()
        update |= {"exit": default, "other_exits": tuple(others)}
    return manifest.model_copy(update=update)


def _report(folder: Path, manifest: Manifest, parts: Parts) -> Manifest:
    """Writes figures, and which prompts were fitted on: those can certify nothing later."""
    specs = (manifest.exit, *manifest.other_exits)
    fitted_on = (*parts.adapters, *parts.classifier, *parts.selection)
    report = {
        "exits": [spec.model_dump(mode="json") for spec in specs if spec],
        "choice_exit": manifest.choice_exit.model_dump(mode="json")
        if manifest.choice_exit
        else None,
        "context_exit": manifest.context_exit.model_dump(mode="json")
        if manifest.context_exit
        else None,
        "fitted_on": sorted(prompt_hash(example.prompt) for example in fitted_on),
    }
    return write_report(folder, manifest, report)


def _figures(request: CalibrationRequest, fitted: Fitted) -> dict[str, Any]:
    agreement = fitted.selection.agrees.mean(axis=0)
    return {
        "data": [path.name for path in request.files] or ["builtin"],
        "seed": request.seed,
        "adapters": request.adapters,
        "prompts": {name: len(getattr(fitted.parts, name)) for name in Parts.__dataclass_fields__},
        "prompts_too_long": fitted.skipped,
        "block_influence": {
            str(layer): float(f"{value:.4g}") for layer, value in fitted.block_influence.items()
        },
        "check_layers": round(fitted.selection.check_layers, 3),
        "agreement_by_layer": {
            str(layer): round(float(value), 4)
            for layer, value in zip(fitted.selection.layers, agreement, strict=True)
        },
    }
