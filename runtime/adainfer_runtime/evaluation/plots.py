"""Plots of an evaluation, by matplotlib (extra `plots`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..output_files import require_writable_folder, writing
from .curves import Curve
from .methods import BASELINE
from .results import Evaluation, MethodResult

__all__ = ["draw_plots", "require_plots"]

_LEAST_AGREEMENT = 0.9


def require_plots(folder: Path) -> None:
    """Makes the folder, before the evaluation that is to be drawn there.

    Raises:
        RequestError: matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    _import_figure()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    require_writable_folder(folder)


def draw_plots(folder: Path, result: Evaluation, curves: Sequence[Curve]) -> list[Path]:
    """Writes `agreement.png`, its curves' values as `curves.json`, and one `exits-METHOD.png` per
    method that exits; their paths.

    Raises:
        RequestError: matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    figure = _import_figure()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [_draw_agreement(figure(figsize=(7, 5)), folder, result, curves)]
        values = folder / "curves.json"
        values.write_text(json.dumps([asdict(curve) for curve in curves]) + "\n")
        written.append(values)
        for method in result.methods:
            if len(method.mean.exits) > 1:
                written.append(_draw_exits(figure, folder, method, result.num_layers))
    return written


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError:
        raise RequestError(
            "matplotlib is not installed: pip install 'adainfer-export[plots]'"
        ) from None
    return Figure


def _draw_agreement(figure: Any, folder: Path, result: Evaluation, curves: Sequence[Curve]) -> Path:
    axes = figure.add_subplot()
    for curve in curves:
        saved = [100 * value for value in curve.layers_saved]
        axes.plot(saved, curve.agreement, label=f"{curve.method}, all thresholds")
    for method in result.methods:
        if method.method != BASELINE:
            mean = method.mean
            axes.scatter([100 * mean.layers_saved], [mean.agreement], zorder=3)
            axes.annotate(method.method, (100 * mean.layers_saved, mean.agreement))
    lowest = min([_LEAST_AGREEMENT, *(method.mean.agreement for method in result.methods)])
    axes.set(
        xlabel="layers saved, %",
        ylabel="agreement with the full model",
        ylim=(lowest - 0.01, 1.005),
        title=f"mean of {len(result.methods[0].tasks)} tasks",
    )
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    return _save(figure, folder / "agreement.png")


def _draw_exits(figure: Any, folder: Path, method: MethodResult, num_layers: int) -> Path:
    rows = len(method.tasks)
    drawn = figure(figsize=(7, 0.9 * rows + 1))
    panels = drawn.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axes, task in zip(panels, method.tasks, strict=True):
        shares = [100 * count / task.examples for count in task.exits.values()]
        axes.bar(list(task.exits), shares)
        axes.set_xlim(num_layers / 2, num_layers + 1)
        axes.set_ylabel(task.task, rotation=0, ha="right", fontsize=8)
    panels[-1].set_xlabel("layers executed (bars: % of prompts)")
    return _save(drawn, folder / f"exits-{method.method.replace(':', '-')}.png")


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
