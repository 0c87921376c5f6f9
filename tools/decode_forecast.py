"""What drafts and exits should gain in decode on one model, by acceptance measured on another.

    python tools/generation_table.py build/smollm2 --json smollm2.json
    python tools/decode_forecast.py build/llama2-7b --measured smollm2.json --times llama2-7b.json

The cost model is the runtime's own (`DecodeCosts`, `ExitCosts`), over stage times of this machine;
exit points stand at the same relative depth as on the model that was measured. A folder that was
not calibrated has no adapters: their time is that of one product of their size. Drafts are taken as
right independently of each other, and each row is a forecast of what is forced; the planner takes
what pays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from adainfer_runtime import DecodeCosts, Engine
from adainfer_runtime.decode_costs import expected_tokens
from adainfer_runtime.exit_looks import ExitCosts
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.plan_spec import PlanSpec
from adainfer_runtime.planning import machine, measure_times

_MOST_ROWS = 16
_MOST_DRAFTS = 7
_VERIFIED = "verified, full, forced: 1 of layer "
_ADAPTIVE = "adaptive, deferred, full, forced"


@dataclass(frozen=True)
class Measured:
    """Of a model with `layers` layers: share of right drafts, and of exits, by layer."""

    layers: int
    acceptance: dict[int, float]
    exits: dict[int, float]

    def at(self, depth: int) -> Measured:
        """The same at the same relative depth of another model."""
        moved = {layer: round(layer * depth / self.layers) for layer in range(self.layers + 1)}
        acceptance = {moved[layer]: share for layer, share in self.acceptance.items()}
        return Measured(depth, acceptance, {moved[k]: share for k, share in self.exits.items()})


@dataclass(frozen=True)
class Forecast:
    """A way to decode; `gain` is off's time over its own, `pays_from` the least share (of right
    drafts) at which drafting pays at all; None: never.
    """

    name: str
    share: float | None
    drafts: int | None
    layers_per_token: float
    tokens_per_second: float
    gain: float
    pays_from: float | None


def read_measured(file: Path) -> Measured:
    """From what `generation_table.py --json` wrote."""
    content = json.loads(file.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    acceptance = {
        int(name.removeprefix(_VERIFIED)): row["accepted"]
        for name, row in rows.items()
        if name.startswith(_VERIFIED) and row["accepted"] is not None
    }
    exits = rows.get(_ADAPTIVE, {"exits": {}})["exits"]
    below = {int(k): share for k, share in exits.items() if int(k) < content["layers"]}
    return Measured(content["layers"], acceptance, below)


def stage_times(folder: Path, file: Path | None, threads: int | None, repeats: int) -> PlanSpec:
    """Read from the file, or measured here (and written there)."""
    if file is not None and file.exists():
        return PlanSpec.model_validate_json(file.read_text())
    engine = Engine.load(folder, threads=threads, low_memory=True)
    times = measure_times(engine, repeats=repeats, most_rows=_MOST_ROWS)
    if not engine.manifest.exit_points:
        width = engine.manifest.model.hidden_size
        times = times.model_copy(update={"adapter": _product_seconds(width, repeats)})
    spec = PlanSpec(machine=machine(threads), times=times)
    if file is not None:
        file.write_text(spec.model_dump_json(indent=1) + "\n")
    return spec


def _product_seconds(width: int, repeats: int) -> float:
    """Of a square matrix in float32 and a vector."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((width, width), np.float32)
    vector, seconds = random.standard_normal(width, np.float32), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def forecasts(costs: DecodeCosts, measured: Measured, second: float) -> list[Forecast]:
    """Mode off, drafts of each layer, and all exits together.

    Args:
        second: layers of one row that a second holds.
    """
    depth = float(costs.layers)
    rows = [_row("off", costs, costs.token, second, depth)]
    for layer, rate in sorted(measured.acceptance.items()):
        drafts = min(range(1, _MOST_DRAFTS + 1), key=lambda n: costs.per_token(layer, n, rate))
        layers = depth * (drafts + 1) / expected_tokens(drafts, rate)
        cost = costs.per_token(layer, drafts, rate)
        name = f"verified, drafts of layer {layer}"
        pays = _pays_from(costs, layer)
        rows.append(_row(name, costs, cost, second, layers, rate, drafts, pays))
    if measured.exits:
        points = tuple(sorted(measured.exits))
        shares = [measured.exits[layer] for layer in points]
        cost = ExitCosts(costs, points).token(shares)
        name = f"adaptive, exits after {', '.join(map(str, points))}"
        # Under the deferred policy every skipped layer is executed later.
        rows.append(_row(name, costs, cost, second, depth, sum(shares)))
    return rows


def _row(
    name: str,
    costs: DecodeCosts,
    cost: float,
    second: float,
    layers: float,
    share: float | None = None,
    drafts: int | None = None,
    pays_from: float | None = None,
) -> Forecast:
    return Forecast(name, share, drafts, layers, second / cost, costs.token / cost, pays_from)


def _pays_from(costs: DecodeCosts, layer: int) -> float | None:
    for rate in np.linspace(0.0, 1.0, 101):
        best = min(costs.per_token(layer, n, rate) for n in range(1, _MOST_DRAFTS + 1))
        if best < costs.token:
            return float(rate)
    return None


def show(rows: list[Forecast], spec: PlanSpec, costs: DecodeCosts, manifest: Manifest) -> None:
    """The table, and what it is made from."""
    name = f"{manifest.source.id}, {manifest.precision}: {spec.machine.processor}"
    table = Table(title=f"{name}, {spec.machine.threads} threads")
    for column in ("", "right, or left early", "drafts", "layers/token", "tokens/s", "of off",
                   "pays from"):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row.name,
            "" if row.share is None else f"{row.share:.2f}",
            "" if row.drafts is None else str(row.drafts),
            f"{row.layers_per_token:.1f}",
            f"{row.tokens_per_second:.2f}",
            f"{row.gain:.2f}",
            "" if row.drafts is None else _share(row.pays_from),
        )
    console = Console(width=120)
    console.print(table)
    batches = ", ".join(f"{n}: {costs.batch(n):.2f}" for n in (2, 4, 8))
    console.print(
        f"in layers of one row: probe {costs.probe:.2f}, adapter {costs.adapter:.2f}, classifier "
        f"{costs.classifier:.2f}, overhead {costs.overhead:.2f}; rows in one pass {batches}"
    )


def _share(share: float | None) -> str:
    return "never" if share is None else f"{share:.2f}"


def main() -> None:
    """Forecasts what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="engine folder; need not be calibrated")
    parser.add_argument("--measured", type=Path, required=True, help="generation_table's --json")
    parser.add_argument("--times", type=Path, help="stage times: read here, or written here")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the forecasts here")
    args = parser.parse_args()
    manifest = Manifest.model_validate_json((args.folder / "manifest.json").read_text())
    spec = stage_times(args.folder, args.times, args.threads, args.repeats)
    costs = DecodeCosts.of_times(spec.times, manifest)
    second = costs.token / spec.times.step
    rows = forecasts(costs, read_measured(args.measured).at(costs.layers), second)
    show(rows, spec, costs, manifest)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
