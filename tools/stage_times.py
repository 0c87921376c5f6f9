"""What every stage of an engine folder costs: per layer, per probe, per token.

    python tools/stage_times.py engines/
    python tools/stage_times.py engines/ --rows 1 128 --json times.json

Runs the chain as the runtime does, over made-up tokens, and times each engine where the chain runs
it. A row is one new position: 1 is decode, more are a prompt. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from adainfer_runtime import Engine, NoExit


def main() -> None:
    """Loads the folder, times it and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--past", type=int, default=128, help="positions in the cache before")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="tokens to decode, for the whole")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--low-memory",
        action=argparse.BooleanOptionalAction,
        help="weights once, or twice where that is faster for prompts; default: by memory",
    )
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    args = parser.parse_args()
    start = time.perf_counter()
    engine = Engine.load(args.folder, threads=args.threads, low_memory=args.low_memory)
    load_seconds, load_peak = time.perf_counter() - start, peak_memory()
    stages = {rows: time_stages(engine, rows, args.past, args.repeat) for rows in args.rows}
    probe = time_probe(engine, args.repeat)
    token = time_tokens(engine, args.past, args.tokens)
    result = {
        "folder": str(args.folder),
        "precision": engine.manifest.precision,
        "layers": engine.manifest.model.num_layers,
        "load_seconds": load_seconds,
        "load_peak_memory_bytes": load_peak,
        "peak_memory_bytes": peak_memory(),
        "stages_ms": {str(rows): times for rows, times in stages.items()},
        "probe_ms": probe,
        "token_ms": token,
    }
    report(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def time_stages(engine: Engine, rows: int, past: int, repeat: int) -> dict[str, float]:
    """Milliseconds of each engine for one pass of so many rows behind `past` positions."""
    specs = engine.manifest.layer_stages
    times: dict[str, list[float]] = defaultdict(list)
    ids = tokens(engine, past + rows)
    buffers = engine.backend.open_sequence()
    limit = min(engine.backend.max_rows, rows)
    for _ in range(repeat + 1):
        at, seconds = past, [0.0] * len(specs)
        while at < past + rows:
            count = min(limit, past + rows - at)
            buffers.embed(ids[at : at + count], at)
            for index in range(len(specs)):
                seconds[index] += timed(lambda i=index, n=count, p=at: buffers.run_stage(i, n, p))
            at += count
        for spec, value in zip(specs, seconds, strict=True):
            times[spec.name].append(value * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_probe(engine: Engine, repeat: int) -> float:
    """Milliseconds of final norm, head and features on one position."""
    width = engine.manifest.model.hidden_size
    hidden = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    return 1e3 * statistics.median(
        [timed(lambda: engine.backend.probe(hidden)) for _ in range(repeat + 1)][1:]
    )


def time_tokens(engine: Engine, past: int, count: int) -> float:
    """Milliseconds of one decoded token behind `past` positions, everything included."""
    with engine.borrow() as session:
        session.extend([int(token) for token in tokens(engine, past)])
        token, times = session.predict(NoExit()).result.token, []
        for _ in range(count):
            start = time.perf_counter()
            session.extend([token])
            token = session.predict(NoExit()).result.token
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def tokens(engine: Engine, count: int) -> Any:
    """Made-up ones, always the same."""
    vocabulary = engine.manifest.model.vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, count).astype(np.int64)


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory() -> int:
    """Largest resident size of this process, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(result: dict[str, Any]) -> None:
    """A table of stages, and what they come to."""
    rows = list(result["stages_ms"])
    table = Table("stage", *(f"{count} rows, ms" for count in rows), title=result["folder"])
    for name in result["stages_ms"][rows[0]]:
        table.add_row(name, *(f"{result['stages_ms'][count][name]:.2f}" for count in rows))
    sums = {count: sum(result["stages_ms"][count].values()) for count in rows}
    table.add_row("all layers", *(f"{sums[count]:.1f}" for count in rows))
    layer = {count: sums[count] / result["layers"] for count in rows}
    table.add_row("per layer", *(f"{layer[count]:.2f}" for count in rows))
    console = Console(width=100)
    console.print(table)
    probe = result["probe_ms"]
    console.print(
        f"probe {probe:.2f} ms ({probe / layer[rows[0]]:.2f} layers of {rows[0]} rows); "
        f"token {result['token_ms']:.1f} ms; loaded in {result['load_seconds']:.1f} s; "
        f"peak {result['load_peak_memory_bytes'] / 1e9:.2f} GB while loading, "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB in all"
    )


if __name__ == "__main__":
    main()
