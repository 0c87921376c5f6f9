"""An engine on a GPU against the same graphs on the CPU, and its modes against off."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine, NoExit
from adainfer_runtime.errors import ExitUnavailableError

_PROMPT = "Once upon a time, in a small village by the sea, there lived an old fisherman who"


@dataclass(frozen=True)
class Tolerance:
    """What may differ from the CPU, whose kernels add up in another order.

    Attributes:
        same_tokens: least share of equal next tokens, teacher-forced.
        hidden, cache: largest difference, by the largest value.
    """

    same_tokens: float
    hidden: float
    cache: float


# Rounding of 2^-11 and 2^-8 per operation over 30 layers; 8-bit floats round to a neighbour now and
# then. Chosen beforehand: no GPU has run this yet.
_TOLERANCES = {
    "fp16": Tolerance(0.95, 0.03, 0.03),
    "int4": Tolerance(0.95, 0.05, 0.05),
    "bf16": Tolerance(0.85, 0.15, 0.15),
    "fp8": Tolerance(0.85, 0.15, 0.15),
}
# Least share of prompts that give off's first token, or (verified, exact but for roundings of
# kernels for one and for several rows) off's whole text.
_LEAST_AGREEMENT = {"adaptive": 0.7, "context": 0.7, "verified": 0.7}
_NEW_TOKENS = 8
_FIRST = 11  # positions of the first pass
_WRITTEN = 32  # tokens after the prompt
_DECODED = 16  # of them, at the end, one row at a time


@dataclass(frozen=True)
class _Seen:
    """What one engine makes of a text: next tokens `[n]`, hidden states `[n, hidden_size]`, and K
    and V of a few layers.
    """

    tokens: npt.NDArray[np.int64]
    hidden: npt.NDArray[np.float32]
    caches: tuple[npt.NDArray[np.float32], ...]


def compare(device: Engine, cpu: Engine) -> dict[str, Any]:
    """Teacher-forced tokens, hidden states and caches of both.

    A prompt goes in passes of many rows. The end of the text goes as it is written: a row at a
    time, which is another profile, another attention kernel, and a CUDA graph.
    """
    ids = [*device.tokenizer.encode(_PROMPT)]
    ids += cpu.generate(ids, max_new_tokens=_WRITTEN, ignore_eos=True).tokens
    total = device.manifest.model.num_layers
    inside = sorted({*device.manifest.boundaries} & {*cpu.manifest.boundaries} - {total})
    middle = inside[len(inside) // 2] if inside else None
    mine, theirs = (_read(engine, ids, middle) for engine in (device, cpu))
    same = mine.tokens == theirs.tokens
    read, written = slice(None, -_DECODED), slice(-_DECODED, None)
    return {
        "same_tokens": float(same.mean()),
        "decode_same_tokens": float(same[written].mean()),
        "hidden_relative": _relative(mine.hidden[read], theirs.hidden[read]),
        "decode_hidden_relative": _relative(mine.hidden[written], theirs.hidden[written]),
        "cache_relative": max(
            _relative(a, b) for a, b in zip(mine.caches, theirs.caches, strict=True)
        ),
    }


def _read(engine: Engine, ids: Sequence[int], middle: int | None) -> _Seen:
    """Puts a text through an engine; its first positions wait at layer `middle` for a while."""
    session, total = engine.session(), engine.manifest.model.num_layers
    session.extend(ids[:_FIRST])
    if middle is not None:
        session.advance(middle)
    session.extend(ids[_FIRST:-_DECODED])
    tokens = [*session.log_probs(0).argmax(-1)]
    for token in ids[-_DECODED:]:
        session.extend([token])
        tokens.append(session.predict(NoExit()).result.token)
    layers = sorted({1, (total + 1) // 2, total})
    caches = [np.array(part) for layer in layers for part in session.kv(layer)]
    return _Seen(np.array(tokens), np.array(session.hidden()), tuple(caches))


def run_modes(engine: Engine, prompts: Sequence[str]) -> dict[str, Any]:
    """Modes that leave early or draft, against off on the same device.

    A mode that the folder has no exits for is marked `unavailable`.
    """
    off = [_generate(engine, prompt, "off") for prompt in prompts]
    found: dict[str, Any] = {}
    for mode in _LEAST_AGREEMENT:
        try:
            results = [_generate(engine, prompt, mode) for prompt in prompts]
            # Alone, for what a later token needs of skipped layers is computed then.
            first = [_generate(engine, prompt, mode, tokens=1) for prompt in prompts]
        except ExitUnavailableError as error:
            found[mode] = {"unavailable": str(error)}
            continue
        pairs = list(zip(results, off, strict=True))
        found[mode] = {
            "same_first_token": float(np.mean([a.tokens[0] == b.tokens[0] for a, b in pairs])),
            "same_text": float(np.mean([a.tokens == b.tokens for a, b in pairs])),
            "layers_saved": float(np.mean([result.layers_saved for result in first])),
            "left_early": sum(result.layers_saved > 0.0 for result in first),
        }
    return found


def failures(row: dict[str, Any]) -> list[str]:
    """What lies outside the tolerances, a line each."""
    tolerance = _TOLERANCES[row["precision"]]
    found = []
    if row["same_tokens"] < tolerance.same_tokens:
        found.append(f"same_tokens {row['same_tokens']:.3f} < {tolerance.same_tokens}")
    for name, most in (
        ("hidden_relative", tolerance.hidden),
        ("decode_hidden_relative", tolerance.hidden),
        ("cache_relative", tolerance.cache),
    ):
        if not row[name] <= most:  # what is no number fails, too
            found.append(f"{name} {row[name]:.3g} > {most}")
    for mode, result in row["modes"].items():
        if "unavailable" in result:
            continue
        key = "same_text" if mode == "verified" else "same_first_token"
        if result[key] < _LEAST_AGREEMENT[mode]:
            found.append(f"{mode}: {key} {result[key]:.2f} < {_LEAST_AGREEMENT[mode]}")
    return found


def _generate(engine: Engine, prompt: str, mode: str, tokens: int = _NEW_TOKENS) -> Any:
    return engine.generate(prompt, max_new_tokens=tokens, mode=mode, ignore_eos=True)


def _relative(mine: Any, theirs: Any) -> float:
    return float(np.abs(mine - theirs).max() / max(1.0, float(np.abs(theirs).max())))


def speed(engine: Engine) -> dict[str, Any]:
    """Median milliseconds of a decoded token and of a prompt of 128, all layers."""
    session = engine.session()
    prompt = [int(token) for token in np.random.default_rng(0).integers(1000, 40000, 128)]
    prefill, decode = [], []
    for _ in range(5):
        session.truncate(0)
        start = time.perf_counter()
        session.extend(prompt)
        token = session.predict(NoExit()).result.token
        prefill.append(time.perf_counter() - start)
        for _ in range(32):
            start = time.perf_counter()
            session.extend([token])
            token = session.predict(NoExit()).result.token
            decode.append(time.perf_counter() - start)
    return {
        "prefill_128_ms": round(1e3 * statistics.median(prefill), 3),
        "decode_ms": round(1e3 * statistics.median(decode), 3),
    }
