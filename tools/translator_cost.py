"""What the translators of context exits cost on a model, before any is fitted.

    python tools/translator_cost.py build/llama2-7b-int4 --exit-layers 17 24
    python tools/translator_cost.py engines/ --rows 32 512 --json cost.json

Made-up weights in the form and rank that a calibration would give them: size on disk, time per
position, share of a layer, beside a full one's multiply-adds. Times are medians on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from adainfer_export.calibrate.affine import AffineMap
from adainfer_export.calibrate.translate import (
    Rotary,
    Translator,
    Unrotated,
    affordable_rank,
    lower_translator,
    most_weights,
    read_rotary,
    translator_layers,
)
from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.manifest import Manifest


@dataclass(frozen=True)
class Cost:
    """Of one translator over `rows` positions; `layers` is its time in layers of so many."""

    exit_layer: int
    rank: int | None
    full_layers: float
    bytes: int
    rows: int
    ms: float
    layers: float


def main() -> None:
    """Loads the folder, times layers and translators, prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exit-layers", type=int, nargs="+", help="default: a calibration's")
    parser.add_argument("--rows", type=int, nargs="+", default=[128])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    args = parser.parse_args()
    engine = Engine.load(args.folder)
    rotary = read_rotary(args.folder, engine.manifest)
    if rotary is None:
        parser.error("layers of this model differ in heads or rotary tables: no context exits")
    layer_ms = {rows: time_layer(engine, rows, args.repeat) for rows in args.rows}
    costs = [
        cost
        for exit_layer in args.exit_layers or translator_layers(engine.manifest)
        for cost in measure(engine.manifest, rotary, exit_layer, layer_ms, args.repeat)
    ]
    report(str(args.folder), costs, layer_ms)
    if args.json:
        args.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


def measure(
    manifest: Manifest,
    rotary: Rotary | Unrotated,
    exit_layer: int,
    layer_ms: dict[int, float],
    repeat: int,
) -> list[Cost]:
    """One translator over every number of rows."""
    random = np.random.default_rng(0)
    width, kv = manifest.model.hidden_size, manifest.kv
    outputs = (manifest.model.num_layers - exit_layer) * 2 * kv.num_heads * kv.head_dim
    rank = affordable_rank(width, outputs, most_weights(manifest))
    shapes = [(width, outputs)] if rank is None else [(width, rank), (rank, outputs)]
    matrix, *up = (random.standard_normal(shape, np.float32) * 0.02 for shape in shapes)
    affine = AffineMap(matrix, np.zeros(outputs, np.float32), *up)
    model = lower_translator(Translator(exit_layer, affine), rotary, manifest)
    ir.external_data.load_to_model(model)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "translate.onnx"
        ir.save(model, path)
        session, size = open_session(path), path.stat().st_size
        found = []
        for rows, layer in layer_ms.items():
            hidden = random.standard_normal((rows, width), np.float32)
            given = {"hidden": hidden, "start": np.array([1])}
            feed = {value.name: given[value.name] for value in session.get_inputs()}
            ms = timed(lambda feed=feed: session.run(None, feed), repeat)
            full = width * outputs / most_weights(manifest)
            found.append(Cost(exit_layer, rank, full, size, rows, ms, ms / layer))
    return found


def time_layer(engine: Engine, rows: int, repeat: int) -> float:
    """Milliseconds of one layer over so many positions, the mean of all of them."""
    ids = np.random.default_rng(0).integers(0, engine.manifest.model.vocab_size, rows).tolist()
    with engine.borrow() as session:

        def run() -> None:
            session.truncate(0)
            session.extend(ids)
            session.complete()

        return timed(run, repeat) / engine.manifest.depth


def timed(call: Callable[[], object], repeat: int) -> float:
    """Milliseconds, the median after one run that warms up."""
    taken = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken[1:])


def report(title: str, costs: list[Cost], layer_ms: dict[int, float]) -> None:
    """A row per translator and number of positions."""
    columns = ("exit layer", "rank", "full one, layers", "MB", "rows", "ms", "ms a row", "layers")
    table = Table(*columns, title=title)
    for cost in costs:
        table.add_row(
            str(cost.exit_layer),
            "full" if cost.rank is None else str(cost.rank),
            f"{cost.full_layers:.2f}",
            f"{cost.bytes / 1e6:.0f}",
            str(cost.rows),
            f"{cost.ms:.1f}",
            f"{cost.ms / cost.rows:.3f}",
            f"{cost.layers:.2f}",
        )
    console = Console(width=100)
    console.print(table)
    for rows, ms in layer_ms.items():
        console.print(f"one layer over {rows} positions: {ms:.1f} ms")


if __name__ == "__main__":
    main()
