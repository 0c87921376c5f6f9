"""Mode verified against mode off, token for token, on many prompts.

    python tools/verify_generation.py build/smollm2 --prompts 100 --tokens 128 --batch 1,3,8

Drafts come from an exit point, and, so that rejections are many, from mode off's own text with
wrong tokens at random places. Kernels may sum one row and several in different orders: the tool
measures how far the gap between the two best logits moves by that, and says of every token that
differs whether the full model (one row at a time, over the same text before) holds it within that
noise of its own. Ends with status 1 if a token does not, or if a KV cache differs by more than
`--kv-tolerance` after a text that is the same. Prompts are taken group by group, each through every
batch size; what is known so far is printed after each group, and `--first` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from generation_prompts import generation_prompts

from adainfer_runtime import Engine, NoExit, Session
from adainfer_runtime.batch import ContinuousBatching
from adainfer_runtime.decoding import Emitted
from adainfer_runtime.draft_schedule import Fixed
from adainfer_runtime.generate import GenerateRequest, stream
from adainfer_runtime.results import DraftCount
from adainfer_runtime.sampling import Greedy, Sampler
from adainfer_runtime.verified import Draft, Drafter, ExitDrafter, VerifiedDecoder

_GROUP = 24  # prompts: a multiple of the usual batches
_SOURCES = ("exit", "forced")


@dataclass(frozen=True)
class Reference:
    """Mode off's text and KV cache (by layer), and how far logits moved when several rows were
    computed at once.
    """

    prompt: list[int]
    tokens: tuple[int, ...]
    noise: float
    cache: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Comparison:
    """One text: where it differs, by how much less the full model likes it, and its cache."""

    differing: int
    largest_shortfall: float
    cache_difference: float | None
    drafts: DraftCount


@dataclass(frozen=True)
class ForcedDrafts:
    """Mode off's text as drafts, wrong at some places."""

    layer: int
    text: Sequence[int]
    wrong: frozenset[int]
    vocabulary: int

    def propose(self, session: Session, sampler: Sampler) -> Draft:
        """The text's next token, or a wrong one."""
        session.advance(self.layer)
        place = session.length
        token = self.text[place] if place < len(self.text) else 0
        return Draft((token + 1) % self.vocabulary if place in self.wrong else token, self.layer)


def main() -> None:
    """Runs everything that the command line asks for."""
    arguments = _arguments()
    engine = Engine.load(arguments.folder)
    if arguments.chunk:
        type(engine.backend).max_rows = arguments.chunk  # type: ignore[misc]
    layer = arguments.draft_layer or _default_layer(engine)
    prompts = generation_prompts(engine.tokenizer, arguments.prompts)
    runs = [(at_once, source) for at_once in arguments.batch for source in arguments.drafts_from]
    found: dict[tuple[int, str], list[Comparison]] = {run: [] for run in runs}
    noise, failed = 0.0, False
    for start in range(arguments.first, len(prompts), _GROUP):
        group = prompts[start : start + _GROUP]
        references = [
            _reference(engine, prompt, arguments.tokens, arguments.drafts) for prompt in group
        ]
        noise = max(noise, *(reference.noise for reference in references))
        for at_once, source in runs:
            found[at_once, source] += _compare_all(
                engine, references, layer, source, at_once, arguments
            )
        report = _report(found, layer, noise, arguments.kv_tolerance)
        failed = any(run["wrong"] for run in report["runs"])
        _print(report, arguments.first, start + len(group))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if failed else 0)


def _report(
    found: dict[tuple[int, str], list[Comparison]], layer: int, noise: float, tolerance: float
) -> dict[str, Any]:
    runs = [
        {"batch": at_once, "drafts_from": source, **_summary(comparisons, noise, tolerance)}
        for (at_once, source), comparisons in found.items()
    ]
    return {"draft_layer": layer, "kernel_noise": noise, "runs": runs}


def _print(report: dict[str, Any], first: int, end: int) -> None:
    print(f"prompts {first + 1} to {end}, drafts of layer {report['draft_layer']}")
    noise = report["kernel_noise"]
    print(f"kernel noise (largest move of the gap between the two best logits): {noise:.3g}")
    for run in report["runs"]:
        print(json.dumps(run), flush=True)


def _reference(engine: Engine, prompt: list[int], new: int, drafts: int) -> Reference:
    session = engine.session()
    session.extend(prompt)
    tokens, logits = [], []
    for _ in range(new):
        result = session.predict(NoExit()).result
        tokens.append(result.token)
        logits.append(result.logits)
        if len(tokens) < new:
            session.extend([result.token])
    cache = [
        (key.copy(), value.copy())
        for key, value in map(session.kv, range(1, engine.manifest.depth + 1))
    ]
    noise = _noise(engine, prompt, tokens, logits, drafts + 1)
    return Reference(prompt, tuple(tokens), noise, cache)


def _noise(
    engine: Engine,
    prompt: list[int],
    tokens: list[int],
    alone: list[npt.NDArray[np.float32]],
    rows: int,
) -> float:
    """How far the gap between the two best logits moves where `rows` positions go together."""
    session = engine.session()
    session.extend(prompt)
    session.complete()
    largest = 0.0
    for first in range(0, len(tokens) - 1, rows):
        block = tokens[first : min(first + rows, len(tokens) - 1)]
        session.extend(block)
        together = session.verify_logits(session.length - len(block))
        for one, many in zip(alone[first + 1 :], together, strict=False):
            a, b = np.argsort(one)[-2:]
            largest = max(largest, abs(float((one[b] - one[a]) - (many[b] - many[a]))))
    return largest


def _compare_all(
    engine: Engine,
    references: list[Reference],
    layer: int,
    source: str,
    at_once: int,
    arguments: argparse.Namespace,
) -> list[Comparison]:
    chance = random.Random(at_once)
    texts = []
    for reference in references:
        text = [*reference.prompt, *reference.tokens]
        drafter: Drafter = ExitDrafter(layer)
        if source == "forced":
            places = range(len(reference.prompt), len(text))
            wrong = frozenset(place for place in places if chance.random() < arguments.wrong)
            drafter = ForcedDrafts(layer, text, wrong, engine.manifest.model.vocab_size)
        texts.append(partial(_text, engine, reference, drafter, arguments.drafts))
    return ContinuousBatching(at_once).run(texts, engine)


def _text(
    engine: Engine, reference: Reference, drafter: Drafter, drafts: int, session: Session
) -> Generator[Emitted, None, Comparison]:
    new = len(reference.tokens)
    limit = len(reference.prompt) + new - 1
    decoder = VerifiedDecoder(session, Greedy(), drafter, Fixed(drafts), limit)
    request = GenerateRequest(reference.prompt, new)
    done = yield from stream(session, decoder, request, engine.manifest.max_seq_len)
    compared = _shortfalls(engine, reference, done.tokens)
    if not compared.differing:
        difference = _cache_difference(session, reference)
        compared = replace(compared, cache_difference=difference)
    return replace(compared, drafts=decoder.drafts)


def _shortfalls(engine: Engine, reference: Reference, tokens: tuple[int, ...]) -> Comparison:
    """How much less than its favourite the full model likes each token, one row at a time."""
    if tokens == reference.tokens:
        return Comparison(0, 0.0, None, DraftCount())
    session = engine.session()
    session.extend(reference.prompt)
    shortfalls = []
    for token in tokens:
        result = session.predict(NoExit()).result
        shortfalls.append(float(result.logits[result.token] - result.logits[token]))
        session.extend([token])
    differing = sum(shortfall > 0.0 for shortfall in shortfalls)
    return Comparison(differing, max(shortfalls), None, DraftCount())


def _cache_difference(session: Session, reference: Reference) -> float:
    """The largest between this session's K and V and mode off's, which came one by one."""
    session.complete()
    return max(
        float(np.abs(mine - full).max())
        for layer, cache in enumerate(reference.cache, 1)
        for mine, full in zip(session.kv(layer), cache, strict=True)
    )


def _summary(found: list[Comparison], noise: float, tolerance: float) -> dict[str, object]:
    caches = [c.cache_difference for c in found if c.cache_difference is not None]
    drafts = sum((c.drafts for c in found), DraftCount())
    beyond = sum(c.largest_shortfall > noise for c in found)
    return {
        "texts": len(found),
        "texts_that_differ": sum(c.differing > 0 for c in found),
        "near_ties": sum(c.differing for c in found),
        "largest_shortfall": round(max(c.largest_shortfall for c in found), 6),
        "cache_difference": max(caches, default=0.0),
        **asdict(drafts),
        "wrong": beyond + sum(difference > tolerance for difference in caches),
    }


def _default_layer(engine: Engine) -> int:
    points = engine.manifest.exit_layers or engine.manifest.boundaries[:-1]
    if not points:
        sys.exit("this folder is one engine: nothing can be drafted")
    return points[-1]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="engine folder")
    parser.add_argument("--prompts", type=int, default=100, help="of a hundred that there are")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each")
    parser.add_argument("--batch", type=_numbers, default=[1], help="texts at once, such as 1,3,8")
    parser.add_argument("--first", type=int, default=0, help="prompts to leave out at the start")
    parser.add_argument(
        "--drafts-from", nargs="+", choices=_SOURCES, default=_SOURCES, help="default: both"
    )
    parser.add_argument("--drafts", type=int, default=4, help="of every round")
    parser.add_argument("--draft-layer", type=int, help="default: the deepest exit point")
    parser.add_argument("--wrong", type=float, default=0.25, help="share of forced wrong drafts")
    parser.add_argument("--chunk", type=int, help="positions that one pass carries at most")
    parser.add_argument("--kv-tolerance", type=float, default=np.inf, help="of a cache")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
