"""What texts gain when they share passes: tokens/s of continuous batching against taking turns.

    python tools/batch_throughput.py engines/
    python tools/batch_throughput.py engines/ --sizes 2 8 --modes off adaptive --json batches.json

Each round runs the same prompts by both schedulers, one after the other, in either order by turns;
what is reported is the median over rounds, and of the ratio within a round, with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from generation_prompts import generation_prompts
from rich.console import Console
from rich.table import Table

from adainfer_runtime import BatchScheduler, ContinuousBatching, Engine, GenerationResult, TakeTurns
from adainfer_runtime.mode_policies import Mode


@dataclass(frozen=True)
class Row:
    """One size and mode.

    Attributes:
        turns, together: new tokens per second, prompts included.
        ratio: `together` over `turns` within a round; `low` and `high` are its quartiles.
        equal_texts: share of texts whose tokens are the same under both.
        layers_saved: share of position-layers, under continuous batching.
    """

    texts: int
    mode: str
    turns: float
    together: float
    ratio: float
    low: float
    high: float
    equal_texts: float
    layers_saved: float


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--modes", nargs="+", default=["off"])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    engine = Engine.load(args.folder, threads=args.threads)
    rows = [
        measure(engine, size, mode, args.new_tokens, args.rounds)
        for mode in args.modes
        for size in args.sizes
    ]
    report(rows, args.new_tokens)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure(engine: Engine, texts: int, mode: Mode, new: int, rounds: int) -> Row:
    """One row; the first round warms up and is dropped."""
    prompts = generation_prompts(engine.tokenizer, texts)
    schedulers: list[BatchScheduler] = [TakeTurns(texts), ContinuousBatching(texts)]
    seconds: list[tuple[float, float]] = []
    results: dict[int, list[GenerationResult]] = {}
    for number in range(rounds + 1):
        spent = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            results[place] = engine.generate_batch(
                prompts,
                scheduler=schedulers[place],
                mode=mode,
                max_new_tokens=new,
                ignore_eos=True,
            )
            spent[place] = time.perf_counter() - start
        if number:
            seconds.append((spent[0], spent[1]))
    ratios = [turns / together for turns, together in seconds]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    pairs = zip(results[0], results[1], strict=True)
    return Row(
        texts,
        mode,
        texts * new / statistics.median(turns for turns, _ in seconds),
        texts * new / statistics.median(together for _, together in seconds),
        statistics.median(ratios),
        low,
        high,
        statistics.mean(a.tokens == b.tokens for a, b in pairs),
        statistics.mean(result.layers_saved for result in results[1]),
    )


def report(rows: list[Row], new: int) -> None:
    """Prints the table."""
    table = Table(title=f"{new} new tokens of each text; tokens/s of all")
    for name in ("texts", "mode", "turns", "together", "ratio", "same texts", "layers saved"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        table.add_row(
            str(row.texts),
            row.mode,
            f"{row.turns:.0f}",
            f"{row.together:.0f}",
            f"{row.ratio:.2f} ({row.low:.2f}–{row.high:.2f})",
            f"{row.equal_texts:.0%}",
            f"{row.layers_saved:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
