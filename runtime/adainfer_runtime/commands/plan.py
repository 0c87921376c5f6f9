"""`adainfer bench` measures an engine on this machine; `adainfer plan` shows what follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..certificate import device_option
from ..decode_plan import DecodeForecast
from ..engine import Engine
from ..engine_folder import load_manifest, replace_manifest, verify_files
from ..errors import RequestError
from ..exit_policy import ExitCheck
from ..output_files import require_writable_folder
from ..plan_spec import FillTimes, PlanSpec
from ..planning import ModeForecast, RequestShape, machine, measure_times, pick_mode
from .options import DeviceOption, LevelOption, ThreadsOption

__all__ = ["register"]

_BENCH_EXAMPLES = """
Examples:

    adainfer bench engines/

    adainfer bench engines/ --threads 2 --repeats 15 --json

    adainfer bench engines/ --device cuda
"""
_PLAN_EXAMPLES = """
Examples:

    adainfer plan engines/

    adainfer plan engines/ --prompt-tokens 100,1000 --new-tokens 32 --level 0.02
"""


def register(app: typer.Typer) -> None:
    """Adds both subcommands."""
    app.command(name="bench", epilog=_BENCH_EXAMPLES)(bench)
    app.command(name="plan", epilog=_PLAN_EXAMPLES)(plan)


def bench(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    repeats: Annotated[int, typer.Option(help="Runs of which the median counts.", min=1)] = 7,
    json_output: Annotated[bool, typer.Option("--json", help="Print the times as JSON.")] = False,
) -> None:
    """Measure stage times on this machine and keep them in the folder: what mode auto plans by."""
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    require_writable_folder(folder)
    engine = Engine.of_manifest(folder, manifest, device=device, threads=threads)
    console = Console(stderr=True)
    with console.status("measuring") as status:
        times = measure_times(
            engine, repeats=repeats, on_step=lambda name: status.update(f"measured {name}")
        )
    spec = PlanSpec(machine=machine(threads, device), times=times)
    replace_manifest(folder, manifest.model_copy(update={"plan": spec}))
    if json_output:
        print(spec.model_dump_json(indent=1))
        return
    Console().print(_times_table(spec))
    if times.fills is not None:
        Console().print(_fill_table(times.fills))


def plan(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    prompt_tokens: Annotated[
        str, typer.Option(help="Lengths of prompts, comma-separated.")
    ] = "50,200,800",
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated.", min=1)] = 1,
    labels: Annotated[bool, typer.Option("--labels", help="Choices among labels.")] = False,
    level: LevelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each mode is expected to take here, and which one mode auto takes."""
    engine = Engine.load(folder, device, threads, low_memory=True)
    here, known = machine(threads, device), engine.manifest.plan
    if known is not None and known.machine != here:
        Console(stderr=True).print(
            f"warning: measured on {known.machine.processor} with {known.machine.threads} threads, "
            f"this is {here.processor} with {here.threads}: run `adainfer bench"
            f"{device_option(here.device_class)}` here",
            style="yellow",
        )
    shapes = [RequestShape(n, new_tokens, candidates=labels) for n in _lengths(prompt_tokens)]
    found = [(shape, engine.forecasts(shape, level=level)) for shape in shapes]
    has_decode = new_tokens > 1 and engine.manifest.exit is not None
    decode = engine.decode_forecasts(level=level) if has_decode else ()
    fills = known.times.fills if known is not None else None
    if json_output:
        entries = [_as_json(shape, forecasts, decode, fills) for shape, forecasts in found]
        print(json.dumps(entries))
        return
    for shape, forecasts in found:
        Console().print(_forecast_table(shape, forecasts))
    if decode:
        Console().print(_decode_table(decode))
    if fills is not None:
        Console().print(_fill_table(fills))


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(f"--prompt-tokens {text!r}: give lengths such as 50,200,800")
    return [int(part) for part in parts]


def _as_json(
    shape: RequestShape,
    forecasts: tuple[ModeForecast, ...],
    decode: tuple[DecodeForecast, ...],
    fills: FillTimes | None,
) -> dict[str, object]:
    modes = {
        forecast.mode: {
            "seconds": forecast.seconds,
            "checks": [
                {"layer": check.layer, "kind": check.kind, "share": share, "seconds": look}
                for check, share, look in _checks(forecast)
            ],
        }
        for forecast in forecasts
    }
    return {
        "prompt_tokens": shape.prompt_tokens,
        "new_tokens": shape.new_tokens,
        "labels": shape.candidates,
        "auto": pick_mode(forecasts).mode,
        "modes": modes,
        "decode": [asdict(forecast) for forecast in decode],
        "kv_fills": None if fills is None else fills.model_dump(mode="json"),
    }


def _checks(forecast: ModeForecast) -> Iterator[tuple[ExitCheck, float, float]]:
    return zip(forecast.policy.checks, forecast.shares, forecast.looks, strict=True)


def _forecast_table(shape: RequestShape, forecasts: tuple[ModeForecast, ...]) -> Table:
    what = "a label" if shape.candidates else f"{shape.new_tokens} new token(s)"
    table = Table(
        "mode",
        "expected",
        "of off",
        "leaves (share of requests)",
        title=f"{shape.prompt_tokens} prompt tokens, {what}",
    )
    off, best = forecasts[0], pick_mode(forecasts)
    for forecast in forecasts:
        leaves = ", ".join(
            f"{check.kind} after {check.layer}: {share:.0%} (a look {look * 1000:.1f} ms)"
            for check, share, look in _checks(forecast)
        )
        name = f"[bold]{forecast.mode}[/bold] ← auto" if forecast is best else forecast.mode
        ratio = f"{forecast.seconds / off.seconds:.2f}"
        table.add_row(name, f"{forecast.seconds * 1000:.1f} ms", ratio, leaves)
    return table


def _decode_table(forecasts: tuple[DecodeForecast, ...]) -> Table:
    table = Table(
        "way",
        "probe",
        "expected, of off",
        "at",
        "pays from",
        title="each token after the first (the runtime stops what does not pay)",
    )
    for forecast in forecasts:
        after = f"after {', '.join(map(str, forecast.layers))}"
        drafts = f"{forecast.drafts} draft(s) {after}"
        exits = f"exits {after} (KV {forecast.kv_policy})"
        way, unit = (drafts, "right") if forecast.drafts else (exits, "leaving")
        pays = "never" if forecast.pays_from is None else f"{forecast.pays_from:.0%} {unit}"
        table.add_row(
            f"{forecast.mode}: {way}",
            forecast.probe,
            f"{forecast.relative:.2f}",
            f"{forecast.share:.0%} {unit}",
            pays,
        )
    return table


def _times_table(spec: PlanSpec) -> Table:
    times = spec.times
    here = spec.machine
    title = (
        here.processor
        if here.device_class.startswith("gpu-")
        else (f"{here.processor}, {here.threads} threads")
    )
    table = Table("stage", "time", "in layers of as many positions", title=title)
    for rows, seconds in zip(times.rows, times.layer, strict=True):
        table.add_row(f"layer, {rows} positions", _milliseconds(seconds), "")
    one = times.layer[0]
    singles = {
        "probe": times.probe,
        "probe, 4 candidates": times.candidates,
        "adapter": times.adapter,
        "classifier": times.classifier,
    }
    if times.shortlist is not None:
        singles["shortlist"] = times.shortlist
    for name, seconds in singles.items():
        table.add_row(name, _milliseconds(seconds), f"{seconds / one:.2f}")
    for layer, checks in times.context.items():
        for rows, seconds in zip(times.context_rows, checks, strict=True):
            known = times.layer[times.rows.index(rows)] if rows in times.rows else None
            ratio = f"{seconds / known:.2f}" if known else ""
            table.add_row(
                f"context exit after {layer}, {rows} positions", _milliseconds(seconds), ratio
            )
    return table


def _fill_table(fills: FillTimes) -> Table:
    table = Table(
        "KV policy",
        *map(str, fills.rows),
        title="keys and values of what exits skip: ms, by positions filled in one go",
    )
    measured = {"propagate, a layer": fills.propagate} if fills.propagate else {}
    measured |= {f"translated, above {n}": times for n, times in fills.translated.items()}
    for name, by_rows in measured.items():
        table.add_row(name, *(f"{seconds * 1000:.3f}" for seconds in by_rows))
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3f} ms"
