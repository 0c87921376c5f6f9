"""Scales of an int8 KV cache: from the largest keys and values of the decoder in float32.

Rotary turns a pair of channels by an angle that grows with the position, so what lies in one of
them at the positions that were seen lies in the other at later ones: both are given the pair's
length. SmolLM2, blocks of 64 and 256: KL to the float model .280 with caches in float32, .283 with
these (few-shot prompts: .208, .215).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.backends.base import Float32
from adainfer_runtime.backends.kv_scales import LARGEST_CODE, KvScales, load_kv_scales
from adainfer_runtime.engine_folder import load_manifest

from .errors import OutputError, UnsupportedError
from .float_decoder import FloatDecoder, FloatStage, builtin_prompts
from .lower import Precision
from .progress import Reporter
from .sources import Checkpoint
from .write_tokenizer import open_tokenizer

__all__ = ["measure_kv_scales", "recorded_kv_scales", "scales_of"]

# Up to this ratio of the largest channel's range to the middle one's, a layer has one scale: a
# typical channel then keeps 12 codes of either sign. SmolLM2: at most 6, KL .283 and .280.
_MOST_UNEVEN = 8.0
# For tokens that no prompt had: in small random models some exceed the range by a quarter, and in
# SmolLM2 a range that is wider by as much loses nothing (KL .290 without).
_HEADROOM = 1.25
_LEAST = 1e-6  # of the largest range: channels that are never used

Partners = npt.NDArray[np.intp]


def measure_kv_scales(
    folder: Path,
    checkpoint: Checkpoint,
    precision: Precision,
    max_seq_len: int,
    reporter: Reporter,
) -> KvScales:
    """Runs the model in float32 on built-in prompts.

    Args:
        folder: where a temporary folder has place.
        precision, max_seq_len: see `FloatDecoder`.

    Raises:
        UnsupportedError: no tokenizer, or keys or values that are not finite.
        CheckpointError: the tokenizer is damaged, or a weight.
    """
    # Within the folder: what a kill leaves of it goes with the next export's start.
    with tempfile.TemporaryDirectory(prefix="ranges-", dir=folder) as name:
        scratch = Path(name)
        tokenizer = open_tokenizer(checkpoint, scratch / "tokenizer")
        if tokenizer is None:
            raise UnsupportedError(
                "--kv-cache-dtype int8 runs the model on prompts, and the checkpoint has no "
                "tokenizer; export with --kv-cache-dtype auto"
            )
        prompts = builtin_prompts(tokenizer, max_seq_len)
        decoder = FloatDecoder(checkpoint, precision, max_seq_len, scratch, _partners)
        return scales_of(_ranges(decoder, decoder.start(prompts), reporter))


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


def _ranges(
    decoder: FloatDecoder[Partners | None], states: list[npt.NDArray[Any]], reporter: Reporter
) -> list[Float32]:
    """Largest magnitudes `[2, heads, head_dim]` of every layer."""
    layers = decoder.stages[-2].layer
    reporter.begin("measuring keys and values", layers)
    ranges = []
    for stage in decoder.stages[:-1]:
        found, states = _run(decoder, stage, states)
        if stage.layer:
            ranges.append(_widened(found, stage.found))
            reporter.step(f"layer {stage.layer}/{layers}")
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
    assert stage.output is not None  # only the probe has none
    caches = [f"present_{part}.{stage.layer}" for part in ("key", "value")] if stage.layer else []
    following, largest = [], []
    for found in decoder.run(stage, states, [*caches, stage.output]):
        following.append(found[stage.output])
        if caches:
            largest.append(np.stack([np.abs(found[name][0]).max(axis=1) for name in caches]))
    return np.max(largest, axis=0) if caches else np.empty((2, 0, 0), np.float32), following


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
    """
    node = next((node for node in graph if node.op_type == "GroupQueryAttention"), None)
    if node is None:
        return None
    past, cos, key = node.inputs[3], (*node.inputs, None)[7], node.inputs[1]
    assert past is not None and past.shape is not None  # attention without a cache is refused
    head_dim = int(past.shape[3])  # type: ignore[arg-type]  # static
    if cos is not None and cos.shape is not None:
        width = 2 * int(cos.shape[1])  # type: ignore[arg-type]
        return _pairs(head_dim, width, node.attributes["rotary_interleaved"].as_int())
    apart = key.producer() if key is not None else None
    if apart is None or apart.op_type != "RotaryEmbedding":
        return None
    attributes = apart.attributes
    width = attributes["rotary_embedding_dim"].as_int() or head_dim
    return _pairs(head_dim, width, attributes["interleaved"].as_int())


def _pairs(head_dim: int, width: int, interleaved: int) -> Partners:
    channels = np.arange(head_dim)
    rotated = channels[:width]
    half = width // 2
    channels[:width] = rotated ^ 1 if interleaved else (rotated + half) % width
    return channels
