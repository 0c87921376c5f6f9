"""Scales of an int8 KV cache: from the largest keys and values of the decoder in float32.

Rotary turns a pair of channels by an angle that grows with the position, so what lies in one of
them at the positions that were seen lies in the other at later ones: both are given the pair's
length. Learned positions are seen by long passes alone.

SmolLM2, blocks of 64 and 256, all positions by the kernel that reads codes: KL to the float model
.283, few-shot prompts .215; with a scale for every channel .280 and .211; with caches in float32
.280 and .208.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.backends.base import Float32
from adainfer_runtime.backends.kv_scales import (
    KV_SCALES,
    LARGEST_CODE,
    KvScales,
    load_kv_scales,
)
from adainfer_runtime.engine_folder import load_manifest, record_file
from adainfer_runtime.tokenizer import Tokenizer

from .errors import LoweringError, OutputError, UnsupportedError
from .float_decoder import FloatDecoder, FloatStage, builtin_prompts
from .journal import Journal, Written
from .lower.group_query import COS_CACHE, KEY, PASTS, attentions
from .progress import Reporter
from .sources import Checkpoint
from .stage_plan import StagePlan

__all__ = ["find_kv_scales", "recorded_kv_scales", "scales_of", "unmeasured_kv_scales"]

# Up to this ratio of the largest channel's range to the middle one's, a layer has one scale: a
# typical channel then keeps 12 codes of either sign. SmolLM2: at most 6.
_MOST_UNEVEN = 8.0
# For tokens that no prompt had: in small random models some exceed the range by a quarter. It costs
# SmolLM2 nothing (KL .283 with it, .290 without: noise of this size).
_HEADROOM = 1.25
_LEAST = 1e-6  # of the largest range: channels that are never used

Partners = npt.NDArray[np.intp]


def find_kv_scales(
    plan: StagePlan,
    folder: Path,
    source: Checkpoint,
    tokenizer: Tokenizer | None,
    reporter: Reporter,
) -> KvScales:
    """Measured by the model in float32, or what a killed export of the same plan measured.

    Args:
        plan: the export, with scales that stand for those to come.
        folder: that it goes to.
        source: the checkpoint under its own names.
        tokenizer: the checkpoint's.

    Raises:
        UnsupportedError: no tokenizer, or keys or values that are not finite.
        CheckpointError: a weight is damaged.
        OutputError: the folder holds the remains of another export.
    """
    if tokenizer is None:
        raise UnsupportedError(
            "--kv-cache-dtype int8 runs the model on prompts, and the checkpoint has no "
            "tokenizer; export with --kv-cache-dtype auto"
        )
    journal = Journal(folder, plan.identity())
    if journal.find(KV_SCALES, folder) is not None:
        return KvScales(np.load(folder / KV_SCALES, allow_pickle=False))
    prompts = _with_later_positions(builtin_prompts(tokenizer, plan.max_seq_len), plan.max_seq_len)
    # Within the folder: what a kill leaves of it goes with the next export's start.
    with tempfile.TemporaryDirectory(prefix="ranges-", dir=folder) as scratch:
        decoder = FloatDecoder(source, plan.precision, plan.max_seq_len, Path(scratch), _partners)
        scales = scales_of(_ranges(decoder, decoder.start(prompts), reporter))
    journal.note(KV_SCALES, Written(record_file(scales.save(folder)), ()))
    return scales


def recorded_kv_scales(out: Path) -> KvScales:
    """Those of a finished folder.

    Raises:
        OutputError: its caches hold floats.
        AdaInferError: see `load_manifest` and `load_kv_scales`.
    """
    manifest = load_manifest(out)
    scales = load_kv_scales(out, manifest)
    if scales is None:
        raise OutputError(f"{out} has caches of {manifest.kv.dtype}, not int8; give its settings")
    return scales


def unmeasured_kv_scales(layers: int, heads: int, head_dim: int) -> KvScales:
    """Ones, to plan an export with before its scales are known."""
    return KvScales(np.ones((layers, 2, heads, head_dim), np.float32))


def _with_later_positions(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Every other prompt alone, and the others in a row, cut into passes of `most` positions:
    learned positions make other keys of the same tokens far behind.
    """
    joined = [token for prompt in prompts[1::2] for token in prompt]
    passes = [joined[at : at + most] for at in range(0, len(joined), most)]
    return [*map(list, prompts[::2]), *passes]


def _ranges(
    decoder: FloatDecoder[Partners | None], states: list[npt.NDArray[Any]], reporter: Reporter
) -> list[Float32]:
    """Largest magnitudes `[2, heads, head_dim]` of every layer."""
    layers = [stage for stage in decoder.stages if stage.layer]
    reporter.begin("measuring keys and values", len(layers))
    ranges = []
    for stage in decoder.stages[:-1]:  # the probe's is of no interest
        largest, states = _run(decoder, stage, states)
        if stage.layer:
            ranges.append(_widened(largest, stage.seen))
            reporter.step(f"layer {stage.layer}/{len(layers)}")
    return ranges


def scales_of(ranges: Sequence[Float32]) -> KvScales:
    """From each layer's largest magnitudes `[2, heads, head_dim]`, of keys and values.

    Raises:
        UnsupportedError: they are not finite.
    """
    heads = max(layer.shape[1] for layer in ranges)
    values = np.ones((len(ranges), 2, heads, ranges[0].shape[2]), np.float32)
    for number, layer in enumerate(ranges, 1):
        if not np.all(np.isfinite(layer)):
            raise UnsupportedError(f"keys or values of layer {number} are not finite")
        values[number - 1, :, : layer.shape[1]] = _evened(layer) * (_HEADROOM / LARGEST_CODE)
    return KvScales(values)


def _evened(layer: Float32) -> Float32:
    """Of both parts one range each, if that is as good; none is zero."""
    largest = layer.max(axis=(1, 2), keepdims=True)
    largest = np.where(largest > 0, largest, np.float32(1.0))
    middle = np.median(layer, axis=(1, 2), keepdims=True)
    if np.all(largest <= _MOST_UNEVEN * middle):
        return np.broadcast_to(largest, layer.shape)
    return np.maximum(layer, _LEAST * largest)


def _run(
    decoder: FloatDecoder[Partners | None],
    stage: FloatStage[Partners | None],
    states: list[npt.NDArray[Any]],
) -> tuple[Float32, list[npt.NDArray[Any]]]:
    """Largest magnitudes `[2, heads, head_dim]` (none of the embedding), and what comes next."""
    caches = [f"present_{part}.{stage.layer}" for part in ("key", "value")] if stage.layer else []
    largest: list[Float32] = []

    def see(found: Mapping[str, npt.NDArray[Any]]) -> None:
        if caches:
            largest.append(np.stack([np.abs(found[name][0]).max(axis=1) for name in caches]))

    following = decoder.run(stage, states, caches, see)
    return np.max(largest, axis=0) if largest else np.empty((2, 0, 0), np.float32), following


def _widened(ranges: Float32, partners: Partners | None) -> Float32:
    """With the pair's length for channels that are rotated together."""
    if partners is None:
        return ranges
    keys = ranges[0]
    turned = partners != np.arange(len(partners))
    lengths = np.where(turned, np.hypot(keys, keys[:, partners]), keys)
    return np.stack([lengths, ranges[1]])


def _partners(graph: ir.Graph) -> Partners | None:
    """Of each channel of a head, the one it is rotated with (itself, where it is not); None of a
    stage without attention, or without rotary.

    Raises:
        LoweringError: rotary tables of unknown width.
    """
    node = next(iter(attentions(graph)), None)
    if node is None:
        return None
    past, cos, key = (node.inputs[at] for at in (PASTS[0], COS_CACHE, KEY))
    head_dim = _static(graph, past, 3)
    if cos is not None:
        interleaved = node.attributes["rotary_interleaved"].as_int()
        return _pairs(head_dim, 2 * _static(graph, cos, 1), interleaved)
    apart = key.producer() if key is not None else None
    if apart is None or apart.op_type != "RotaryEmbedding":
        return None
    attributes = apart.attributes
    width = attributes["rotary_embedding_dim"].as_int() or head_dim
    return _pairs(head_dim, width, attributes["interleaved"].as_int())


def _static(graph: ir.Graph, value: ir.Value | None, axis: int) -> int:
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise LoweringError(f"stage {graph.name}: a cache or rotary table of unknown width")
    return size


def _pairs(head_dim: int, width: int, interleaved: int) -> Partners:
    channels = np.arange(head_dim)
    rotated = channels[:width]
    half = width // 2
    channels[:width] = rotated ^ 1 if interleaved else (rotated + half) % width
    return channels
