"""Modes, KV policies, probes and draft schedules: speed, layers, agreement with mode off.

    python tools/generation_table.py build/smollm2 --prompts 12 --tokens 64 --rounds 5

Every round gives each row its turn at each prompt, in rotating order; speeds, prompts included, are
medians over rounds, ratios are to mode off within the same round, with their quartiles. Agreement
per token is with the full model's token after the row's own text so far; per text it is with mode
off's whole text. Rows marked `forced` override what the planner would do; the others may choose not
to exit or draft at all (`--planned` leaves the former out). The file of `--json` is what
`decode_forecast.py` reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from generation_prompts import generation_prompts
from rich.console import Console
from rich.table import Table

from adainfer_runtime import Engine, GenerationResult, NoExit
from adainfer_runtime.confidence import ConfidenceDecay
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.draft_schedule import Fixed
from adainfer_runtime.engine import Mode
from adainfer_runtime.kv_fill import KvPolicy
from adainfer_runtime.results import DraftCount
from adainfer_runtime.session import ExitProbe

_FORCED_DRAFTS = (2, 4)
_DECAY = 4.0


@dataclass(frozen=True)
class Row:
    """One way to generate."""

    name: str
    mode: Mode
    options: DecodeOptions
    threshold: float | None = None

    @property
    def forced(self) -> bool:
        """Whether it overrides the planner."""
        return "forced" in self.name


@dataclass
class Measured:
    """What a row did: texts of the first round, seconds of all, by round."""

    results: list[GenerationResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """A row of the table; speeds in tokens per second, layers per generated token.

    Attributes:
        ratio: to mode off; `low` and `high` are its quartiles over rounds.
        exits: share of tokens by the layer that gave them.
        accepted: share of drafts.
    """

    name: str
    tokens_per_second: float
    ratio: float
    low: float
    high: float
    layers_per_token: float
    compute_saved: float
    token_agreement: float
    text_agreement: float
    accepted_per_pass: float | None
    accepted: float | None
    exits: dict[int, float]


def main() -> None:
    """Measures all rows and prints them."""
    arguments = _arguments()
    engine = Engine.load(arguments.folder, threads=arguments.threads)
    prompts = generation_prompts(engine.tokenizer, arguments.prompts)
    rows = list(_rows(engine, arguments.tokens, arguments.forced_threshold))
    if arguments.planned:
        rows = [row for row in rows if not row.forced]
    measured = {row.name: Measured() for row in rows}
    for number in range(arguments.rounds):
        _round(engine, rows, prompts, arguments.tokens, measured)
        print(f"\rround {number + 1}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    new = len(prompts) * arguments.tokens
    figures = [_figures(engine, row.name, prompts, new, measured) for row in rows]
    _show(figures, arguments)
    if arguments.json:
        content = {
            "layers": engine.manifest.depth,
            "rounds": arguments.rounds,
            "rows": [asdict(row) for row in figures],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def _rows(engine: Engine, tokens: int, forced_threshold: float | None) -> Iterator[Row]:
    manifest = engine.manifest
    yield Row("off", "off", DecodeOptions())
    if manifest.exit is None:
        return
    if manifest.plan is not None:
        yield Row("auto", "auto", DecodeOptions())
    probes: tuple[ExitProbe, ...] = ("full", "shortlist") if manifest.shortlist else ("full",)
    for probe in probes:
        plain = DecodeOptions(probe=probe)
        yield Row(f"verified, {probe}", "verified", plain)
        for layer in manifest.exit_points:
            more = _FORCED_DRAFTS if probe == "full" and layer == min(manifest.exit_points) else ()
            for drafts in (1, *more):
                options = replace(plain, draft_layer=layer, draft_schedule=Fixed(drafts))
                name = f"verified, {probe}, forced: {drafts} of layer {layer}"
                yield Row(name, "verified", options)
        if manifest.exit_points:
            yield from _adaptive_rows(engine, plain, tokens, forced_threshold)


def _adaptive_rows(
    engine: Engine, plain: DecodeOptions, tokens: int, forced_threshold: float | None
) -> Iterator[Row]:
    manifest = engine.manifest
    policies: list[KvPolicy] = ["deferred", "propagate"]
    if manifest.context_points.keys() & manifest.exit_points.keys():
        policies.append("translated")
    decay = ConfidenceDecay(_DECAY, tokens)
    for policy in policies:
        options = replace(plain, kv_policy=policy)
        name = f"adaptive, {policy}, {plain.probe}"
        yield Row(name, "adaptive", options)
        always = replace(options, exit_looks="always")
        yield Row(f"{name}, forced", "adaptive", always)
        if plain.probe == "full":  # a threshold falls over either probe's scores alike
            yield Row(f"{name}, forced, falling", "adaptive", replace(always, confidence=decay))
        if forced_threshold is not None:
            yield Row(f"{name}, forced: {forced_threshold}", "adaptive", always, forced_threshold)


def _round(
    engine: Engine,
    rows: list[Row],
    prompts: list[list[int]],
    tokens: int,
    measured: dict[str, Measured],
) -> None:
    """Every prompt by every row, in an order that rotates: a machine's speed drifts."""
    for row in rows:
        measured[row.name].seconds.append(0.0)
    for number, prompt in enumerate(prompts):
        first = (number + len(measured["off"].seconds)) % len(rows)
        for row in (*rows[first:], *rows[:first]):
            start = time.perf_counter()
            result = engine.generate(
                prompt,
                max_new_tokens=tokens,
                mode=row.mode,
                threshold=row.threshold,
                ignore_eos=True,
                decoding=row.options,
            )
            mine = measured[row.name]
            mine.seconds[-1] += time.perf_counter() - start
            if len(mine.seconds) == 1:
                mine.results.append(result)


def _figures(
    engine: Engine,
    name: str,
    prompts: list[list[int]],
    new: int,
    measured: dict[str, Measured],
) -> Figures:
    mine, off = measured[name], measured["off"]
    ratios = [base / own for own, base in zip(mine.seconds, off.seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    same = [a.tokens == b.tokens for a, b in zip(mine.results, off.results, strict=True)]
    depth = engine.manifest.depth
    drafts = sum((result.statistics.drafts for result in mine.results), DraftCount())
    exits = Counter(layer for result in mine.results for layer in result.exit_layers)
    return Figures(
        name,
        new / statistics.median(mine.seconds),
        statistics.median(ratios),
        low,
        high,
        depth * (1.0 - float(np.mean([r.decode_layers_saved for r in mine.results]))),
        float(np.mean([result.compute_saved for result in mine.results])),
        float(np.mean(list(_agreement(engine, prompts, mine.results, off.results)))),
        float(np.mean(same)),
        drafts.accepted / drafts.passes if drafts.passes else None,
        drafts.accepted / drafts.proposed if drafts.proposed else None,
        {layer: count / new for layer, count in sorted(exits.items())},
    )


def _agreement(
    engine: Engine,
    prompts: list[list[int]],
    own: list[GenerationResult],
    off: list[GenerationResult],
) -> Iterator[float]:
    """One row at a time, as mode off computes them: kernels for several sum differently."""
    for prompt, mine, full in zip(prompts, own, off, strict=True):
        if mine.tokens == full.tokens:
            yield 1.0
            continue
        session = engine.session()
        session.extend(prompt)
        agrees = []
        for token in mine.tokens:
            agrees.append(session.predict(NoExit()).result.token == token)
            session.extend([token])
        yield float(np.mean(agrees))


def _show(figures: list[Figures], arguments: argparse.Namespace) -> None:
    title = f"{arguments.folder}: {arguments.prompts} prompts, {arguments.tokens} tokens each"
    table = Table(title=title)
    for column in ("", "tokens/s", "ratio (quartiles)", "layers/token", "compute saved",
                   "agreement: tokens", "texts", "accepted/pass"):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    for row in figures:
        table.add_row(
            row.name,
            f"{row.tokens_per_second:.1f}",
            f"{row.ratio:.3f} ({row.low:.3f}–{row.high:.3f})",
            f"{row.layers_per_token:.2f}",
            f"{row.compute_saved:.1%}",
            f"{row.token_agreement:.3f}",
            f"{row.text_agreement:.2f}",
            "" if row.accepted_per_pass is None else f"{row.accepted_per_pass:.2f}",
        )
    Console(width=140).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a calibrated engine folder")
    parser.add_argument("--prompts", type=int, default=12, help="of a hundred that there are")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: the cores it may use")
    parser.add_argument(
        "--forced-threshold", type=float, help="also adaptive rows with this threshold"
    )
    parser.add_argument("--planned", action="store_true", help="leave forced rows out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
