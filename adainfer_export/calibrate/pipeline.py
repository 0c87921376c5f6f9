"""The calibration, step by step: fit, write the graphs, choose thresholds, certify, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.certificate import device_class
from adainfer_runtime.engine_folder import write_manifest
from adainfer_runtime.errors import AdaInferError
from adainfer_runtime.manifest import CombinedExitSpec, ExitSpec, Manifest
from adainfer_runtime.output_files import require_writable_folder, writing
from adainfer_runtime.plan_spec import PlanSpec
from adainfer_runtime.planning import machine, measure_times

from ..folder import remove_unnamed
from ..progress import Reporter
from .certify import make_certificate, threshold_grid
from .combined import COMBINED, combine, fit_path, path_grid
from .context import FittedContext, fit_context
from .data import Parts
from .exit_files import Files, write_exits, write_report
from .fitting import Fitted, classifier_entries, fit_graphs
from .fresh_prompts import fitted_on
from .kept import KEPT_FOLDER, KeptSteps, identity_of
from .length_shares import share_fields
from .request import CalibrationRequest
from .scored import CHOICE, CONTEXT, Scored, observe, score_predictions
from .select import Outcome, choose_threshold, outcome_figures
from .shortlist import with_shortlist

__all__ = ["calibrate", "recalibrate"]


def calibrate(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> Manifest:
    """Fits exit graphs to the engine in a folder and writes their files beside the stages.

    The folder's manifest is not touched: the caller writes the one that is returned. New files
    carry their content's hash in their names, so that an engine that is in use keeps its own. One
    that is killed leaves what it had fitted for the next, see `kept`.

    Raises:
        TaskFileError: a task file cannot be read.
        CalibrationError: too few usable prompts, or no room for an exit point.
    """
    kept = KeptSteps(folder, identity_of(manifest.uncalibrated(), request))
    try:
        calibrated = _calibrate(folder, manifest, request, reporter, kept)
    except AdaInferError:
        kept.discard()  # the same data would fail again
        raise
    kept.discard()
    return calibrated


def _calibrate(
    folder: Path,
    manifest: Manifest,
    request: CalibrationRequest,
    reporter: Reporter,
    kept: KeptSteps,
) -> Manifest:
    in_use, manifest = manifest, manifest.uncalibrated()
    fitted = fit_graphs(folder, manifest, request, reporter, kept)
    files = Files(folder)
    context = None
    if request.context_exit:
        entries = classifier_entries(request)
        context = fit_context(files, manifest, fitted.parts, entries, request, reporter, kept)
    draft = ExitSpec(
        points=(), target_agreement=request.target_agreement, calibration=_figures(request, fitted)
    )
    write = partial(write_exits, files, manifest, adapters=fitted.adapters, draft=draft)
    tried: set[str] = set()
    count = sum(graph.name != CHOICE for graph in fitted.graphs)
    # Thresholds and certificates are of graphs and engines as they run: those are written first.
    # Where exit points go for not paying, engines are joined over them, and tried again.
    while True:
        written = write(fitted.graphs, context=context.spec if context else None)
        tried |= written.files.keys()
        seen = _observe(folder, written, fitted, context, reporter)
        judged = _judge(seen, fitted, context, request)
        fitted = fitted.of_graphs(judged)
        context = context if CONTEXT in judged else None
        final = write(fitted.graphs, context=context.spec if context else None)
        if final.boundaries == written.boundaries:
            break
    final = _finish(final, judged, tried=count)
    if request.shortlist is not None:
        final = with_shortlist(files, final, fitted.parts, request.shortlist, reporter)
    if final.named_exits:
        final = _with_plan(folder, final, reporter)
    final = _report(folder, final, fitted.parts)
    tried |= files.written.keys()
    for name in tried - final.files.keys() - in_use.files.keys():
        (folder / name).unlink()
    return final


def recalibrate(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> Manifest:
    """Gives an existing engine folder another exit graph; its manifest is replaced at the end.

    Exceptions get a note that says what was kept.

    Raises:
        OutputError: the folder cannot be written; the old exit graph stays in force.
        TaskFileError, CalibrationError: see `calibrate`.
    """
    require_writable_folder(folder)
    with writing(folder, "; it was left as it is"):
        remove_unnamed(folder, manifest.files)  # what a calibration that was killed left
        try:
            renewed = calibrate(folder, manifest, request, reporter)
        except BaseException as error:
            remove_unnamed(folder, manifest.files)
            error.add_note(f"{folder} was left as it is{_note_of_kept(folder)}")
            raise
        write_manifest(folder, renewed)
        for name in manifest.files.keys() - renewed.files.keys():
            (folder / name).unlink(missing_ok=True)
    return renewed


def _note_of_kept(folder: Path) -> str:
    kept = (folder / KEPT_FOLDER).is_dir()
    return "; what was fitted was kept: the same command goes on from there" if kept else ""


def _observe(
    folder: Path,
    written: Manifest,
    fitted: Fitted,
    context: FittedContext | None,
    reporter: Reporter,
) -> dict[str, Scored]:
    """The certification part at every check, as the graphs run."""
    checks = {g.name: g.selection.at(g.classifier.layers).check_layers for g in fitted.graphs}
    if context:
        checks[CONTEXT] = context.selection.at(context.classifier.layers).check_layers
    if not checks:
        return {}
    reporter.begin("certifying", len(fitted.parts.certification))
    engine = Engine.of_manifest(folder, written)
    return observe(engine, fitted.parts.certification, checks, reporter)


@dataclass(frozen=True)
class _Judged:
    """An exit graph with what was seen of it on the certification part, and what it may test."""

    scored: Scored
    outcome: Outcome
    grid: npt.NDArray[np.float64]
    path: tuple[tuple[float, float], ...] = ()


def _judge(
    seen: Mapping[str, Scored],
    fitted: Fitted,
    context: FittedContext | None,
    request: CalibrationRequest,
) -> dict[str, _Judged]:
    """The graphs that pay, by name; combined exits where they pay more than either alone."""
    selection = {
        graph.name: score_predictions(graph.classifier, graph.selection) for graph in fitted.graphs
    }
    if context:
        selection[CONTEXT] = score_predictions(context.classifier, context.selection)
    judged = {}
    for name, scored in seen.items():
        outcome = choose_threshold(scored, request.target_agreement)
        if outcome.net_saved > 0:
            judged[name] = _Judged(scored, outcome, threshold_grid(selection[name]))
    answer = next((graph.name for graph in fitted.graphs if graph.name in judged), CHOICE)
    if answer == CHOICE or CONTEXT not in judged:
        return judged
    path = fit_path(selection[answer], selection[CONTEXT])
    both = combine(seen[answer], seen[CONTEXT], path)
    outcome = choose_threshold(both, request.target_agreement)
    alone = max(judged[answer].outcome.net_saved, judged[CONTEXT].outcome.net_saved)
    if outcome.net_saved > alone:
        judged[COMBINED] = _Judged(both, outcome, path_grid(path), path)
    return judged


def _finish(manifest: Manifest, judged: Mapping[str, _Judged], tried: int) -> Manifest:
    """The manifest with every graph's threshold, certificate and held-out figures.

    Args:
        tried: graphs of answers: which of them pays, and so is the default, these prompts decided.
            The others have names of their own, and dropping one certifies none wrongly.
    """

    def update_of(name: str, calibration: dict[str, Any], data: list[str]) -> dict[str, Any]:
        found = judged[name]
        return {
            "threshold": found.outcome.threshold,
            **share_fields(found.scored, found.grid),
            "certificate": make_certificate(
                manifest,
                found.scored,
                found.grid,
                data,
                device_class=device_class(),
                tried=1 if name in (CHOICE, CONTEXT) else tried,
            ),
            "calibration": {**calibration, "held_out": outcome_figures(found.outcome)},
        }

    finished = {}
    for name, spec in manifest.named_exits.items():
        update = update_of(name, spec.calibration, spec.calibration["data"])
        grid = tuple(judged[name].grid.tolist())
        finished[name] = spec.model_copy(update={"thresholds": grid, **update})
    combined = None
    if COMBINED in judged:
        answer = next(iter(manifest.exit_graphs))
        spec = finished[answer]
        combined = CombinedExitSpec(
            answer=answer,
            path=judged[COMBINED].path,
            target_agreement=spec.target_agreement,
            **update_of(COMBINED, {}, spec.calibration["data"]),
        )
    return manifest.with_exits(finished).model_copy(update={"combined_exit": combined})


def _with_plan(folder: Path, manifest: Manifest, reporter: Reporter) -> Manifest:
    """With stage times of this machine, which mode auto decides by."""
    reporter.begin("measuring stage times", 1)
    times = measure_times(Engine.of_manifest(folder, manifest), repeats=5)
    reporter.step()
    plan = PlanSpec(machine=machine(None), times=times)
    return manifest.model_copy(update={"plan": plan})


def _report(folder: Path, manifest: Manifest, parts: Parts) -> Manifest:
    """Writes figures, and what was fitted on: that can certify nothing later."""
    exits = manifest.model_dump(
        mode="json",
        include={"exit", "other_exits", "choice_exit", "context_exit", "combined_exit"},
    )
    report = {
        **exits,
        "fitted_on": fitted_on(parts),
    }
    return write_report(folder, manifest, report)


def _figures(request: CalibrationRequest, fitted: Fitted) -> dict[str, Any]:
    agreement = fitted.selection.agrees.mean(axis=0)
    return {
        "data": request.data,
        "seed": request.seed,
        "adapters": request.adapters,
        "prompts": {name: len(getattr(fitted.parts, name)) for name in Parts.__dataclass_fields__},
        "prompts_too_long": fitted.skipped,
        "block_influence": {
            str(layer): float(f"{value:.4g}") for layer, value in fitted.block_influence.items()
        },
        "check_layers": fitted.selection.checks_by_layer,
        "agreement_by_layer": {
            str(layer): round(float(value), 4)
            for layer, value in zip(fitted.selection.layers, agreement, strict=True)
        },
    }
