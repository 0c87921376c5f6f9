"""Prefill and decode speed of engine folders, against each other and against onnxruntime-genai.

Every contestant runs in a process of its own that sleeps between its turns; in every round each has
one, in an order drawn anew and after a pause, so that drift of the machine and whatever the one
before left behind meet all alike. What is reported is the median over rounds of the ratio to the
first contestant *in the same round*, with its quartiles.

    python tools/benchmark.py build/k1 build/k5 build/k30
    python tools/make_genai_peer.py smollm2-135m build/genai
    python tools/benchmark.py build/k1 --genai build/genai --rounds 15
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.table import Table

_PAUSE_SECONDS = 0.3  # until the threads of whoever went before sleep


@dataclass(frozen=True)
class Workload:
    """Prompt and generated tokens per turn, and threads of each contestant."""

    prompt: int
    new: int
    threads: int


def main() -> None:
    """Parses the command line and runs the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, help="engine folders; the first is the base"
    )
    parser.add_argument("--genai", type=Path, help="folder of an onnxruntime-genai model")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    parser.add_argument("--worker", choices=["engine", "genai"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = Workload(args.prompt_tokens, args.new_tokens, args.threads)
    if args.worker:
        serve(args.worker, args.folders[0], work)
        return
    contestants = [("engine", folder) for folder in args.folders]
    if args.genai:
        contestants.append(("genai", args.genai))
    results = compete(contestants, work, args.rounds)
    report(contestants, results, work)
    if args.json:
        names = [str(folder) for _, folder in contestants]
        args.json.write_text(json.dumps(dict(zip(names, results, strict=True)), indent=1) + "\n")


def compete(
    contestants: list[tuple[str, Path]], work: Workload, rounds: int
) -> list[list[tuple[float, float]]]:
    """(prefill, decode) tokens per second, per contestant and round; the first round is dropped."""
    workers = [start(kind, folder, work) for kind, folder in contestants]
    results: list[list[tuple[float, float]]] = [[] for _ in workers]
    order, last = random.Random(0), -1
    for round_number in range(rounds + 1):
        # Another order each time: who goes behind whom tells, by what a neighbour leaves in the
        # caches and by threads that still spin. Nobody goes twice in a row.
        places = order.sample(range(len(workers)), len(workers))
        if places[0] == last:
            places.reverse()
        last = places[-1]
        for index in places:
            time.sleep(_PAUSE_SECONDS)
            speeds = turn(workers[index])
            if round_number:
                results[index].append(speeds)
    for worker in workers:
        worker.kill()
    return results


def start(kind: str, folder: Path, work: Workload) -> subprocess.Popen[str]:
    """A worker, loaded and asleep."""
    command = [sys.executable, __file__, str(folder), "--worker", kind]
    command += ["--prompt-tokens", str(work.prompt), "--new-tokens", str(work.new)]
    command += ["--threads", str(work.threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if pipe(worker.stdout).readline().strip() != "ready":
        sys.exit(f"worker for {folder} did not start")
    return worker


def turn(worker: subprocess.Popen[str]) -> tuple[float, float]:
    """One turn of a worker."""
    stdin = pipe(worker.stdin)
    stdin.write("go\n")
    stdin.flush()
    prefill, decode = json.loads(pipe(worker.stdout).readline())
    return prefill, decode


def pipe(stream: IO[str] | None) -> IO[str]:
    """The stream, which a worker always has."""
    if stream is None:
        sys.exit("worker has no pipe")
    return stream


def serve(kind: str, folder: Path, work: Workload) -> None:
    """The worker's side."""
    run = {"engine": engine_turn, "genai": genai_turn}[kind](folder, work)
    print("ready", flush=True)
    for _ in sys.stdin:
        start_time = time.perf_counter()
        first, end = run()
        print(
            json.dumps([work.prompt / (first - start_time), work.new / (end - first)]), flush=True
        )


def prompt_tokens(vocabulary: int, count: int) -> list[int]:
    """The same random tokens for everyone."""
    return [int(token) for token in np.random.default_rng(0).integers(100, vocabulary, count)]


def engine_turn(folder: Path, work: Workload) -> Any:
    """A function that runs one turn on an engine folder and returns its two times."""
    from adainfer_runtime import Engine, NoExit

    engine = Engine.load(folder, threads=work.threads)
    ids = prompt_tokens(engine.manifest.model.vocab_size, work.prompt)

    def run() -> tuple[float, float]:
        with engine.borrow() as session:
            session.extend(ids)
            token = session.predict(NoExit()).result.token
            first = time.perf_counter()
            for _ in range(work.new):
                session.extend([token])
                token = session.predict(NoExit()).result.token
            return first, time.perf_counter()

    return run


def genai_turn(folder: Path, work: Workload) -> Any:
    """The same on onnxruntime-genai."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(
        json.dumps(
            {"model": {"decoder": {"session_options": {"intra_op_num_threads": work.threads}}}}
        )
    )
    model = og.Model(config)
    vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    ids = np.array(prompt_tokens(vocabulary, work.prompt), np.int32)
    length = work.prompt + work.new + 1

    def run() -> tuple[float, float]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(work.new):
            generator.generate_next_token()
        return first, time.perf_counter()

    return run


def report(
    contestants: list[tuple[str, Path]],
    results: list[list[tuple[float, float]]],
    work: Workload,
) -> None:
    """Medians, and ratios to the first contestant."""
    title = f"{work.prompt} + {work.new} tokens, {work.threads} threads, {len(results[0])} rounds"
    table = Table(title=title)
    for heading in ("contestant", "prefill tok/s", "ratio (quartiles)", "decode tok/s",
                    "ratio (quartiles)"):  # fmt: skip
        table.add_column(heading)
    for (kind, folder), speeds in zip(contestants, results, strict=True):
        cells = []
        for column in (0, 1):
            cells.append(f"{statistics.median(s[column] for s in speeds):.0f}")
            ratios = [s[column] / base[column] for s, base in zip(speeds, results[0], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.3f}–{high:.3f})")
        table.add_row(f"{kind} {folder}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
