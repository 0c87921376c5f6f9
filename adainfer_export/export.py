"""The export, step by step: resolve, build, lower, split, write, then calibrate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from adainfer_runtime.backends.layout import kv_geometry
from adainfer_runtime.engine_folder import record_file, write_manifest
from adainfer_runtime.manifest import (
    SCHEMA_VERSION,
    FileRecord,
    KvGeometry,
    Manifest,
    ModelSpec,
    Quantisation,
    StageSpec,
    TokenizerSpec,
)

from .architectures import find_architecture, sliding_window
from .calibrate import CalibrationRequest
from .cost import multiply_adds
from .errors import CheckpointError, UnsupportedError
from .folder import check_output, new_folder
from .frontend import build_decoder
from .lower import Precision, find_target
from .lower.decoder import DecoderRequest
from .lower.targets import Dialect
from .presets import DevicePreset, fitting_length
from .progress import Reporter, SilentReporter, peak_memory_bytes
from .sources import Checkpoint, resolve
from .split import StageGraph, layer_groups, split_decoder
from .writer import StageWriter

__all__ = ["ExportRequest", "ExportResult", "export"]

_LIBRARIES = ("mobius-onnx", "onnx-ir", "onnx", "onnxruntime", "scikit-learn", "skl2onnx")
_DEFAULT_MAX_SEQ_LEN = 2048


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how.

    Attributes:
        model: alias, folder, `.gguf` file or Hugging Face id.
        layers_per_engine: layers that share one graph; exits lie between graphs. None cuts after
            every layer and, once calibrated, joins what has no exit point in between.
        max_seq_len: positions of the KV cache; default: 2048, or the model's own limit if less.
        block_size: quantised weights that share a scale; default: 32.
        preset: the board whose memory bounds `max_seq_len`, where that is not given.
        calibration: how the exit graph is fitted; None leaves the folder without one.
    """

    model: str
    out: Path
    target: str = "ort-cpu"
    precision: str = "int4"
    layers_per_engine: int | None = None
    max_seq_len: int | None = None
    block_size: int | None = None
    preset: DevicePreset | None = None
    calibration: CalibrationRequest | None = None
    revision: str | None = None
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What was written. `warnings` are sentences for the user."""

    out: Path
    manifest: Manifest
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...]


def export(request: ExportRequest, reporter: Reporter | None = None) -> ExportResult:
    """Writes an engine folder; an interrupted export leaves nothing.

    Raises:
        AdaInferError: see `adainfer_export.errors`; the message is one line for the user.
    """
    start = time.perf_counter()
    reporter = reporter or SilentReporter()
    _, dialect, precision = find_target(request.target, request.precision, request.block_size)
    if request.layers_per_engine is not None and request.layers_per_engine < 1:
        raise UnsupportedError("--layers-per-engine must be at least 1")
    check_output(request.out, force=request.force)
    checkpoint = resolve(request.model, revision=request.revision)
    with new_folder(request.out) as folder:
        manifest = _write_stages(folder, request, checkpoint, dialect, precision, reporter)
        if request.calibration is not None and manifest.tokenizer is not None:
            from .calibrate.pipeline import calibrate

            manifest = calibrate(folder, manifest, request.calibration, reporter)
        write_manifest(folder, manifest)  # last: what was interrupted does not load
    return ExportResult(
        request.out,
        manifest,
        time.perf_counter() - start,
        peak_memory_bytes(),
        tuple(_warnings(manifest, request)),
    )


def _write_stages(
    folder: Path,
    request: ExportRequest,
    checkpoint: Checkpoint,
    dialect: Dialect,
    precision: Precision,
    reporter: Reporter,
) -> Manifest:
    config = checkpoint.config
    architecture = find_architecture(config.model_type)
    max_seq_len = _max_seq_len(request, config)
    decoder = build_decoder(config, architecture)
    kv = _kv_geometry(config, max_seq_len, dialect, precision)
    window = sliding_window(config, max_seq_len)
    lowering = DecoderRequest(window, max_seq_len, precision, kv.row_elements)
    shared = dialect.lower_decoder(decoder, lowering)
    _crop_tables(decoder.graph, config.max_position_embeddings, max_seq_len)
    num_layers = int(config.num_hidden_layers)
    groups = layer_groups(num_layers, request.layers_per_engine or 1)
    writer = StageWriter(folder, checkpoint)
    reporter.begin("exporting layers", num_layers)
    specs = []
    if shared is not None:
        stage = StageGraph("positions", "positions", shared.model)
        specs.append(_write_stage(stage, writer, dialect, precision, checkpoint.tied_head))
    for stage in split_decoder(decoder, groups):
        specs.append(_write_stage(stage, writer, dialect, precision, checkpoint.tied_head))
        for layer in range(stage.first_layer, stage.last_layer + 1 if stage.last_layer else 0):
            reporter.step(f"layer {layer}/{num_layers}")
    files = writer.close()
    _require_all_used(checkpoint, writer.read)
    tokenizer, tokenizer_files = _write_tokenizer(folder, checkpoint)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        exporter=_versions(),
        source=checkpoint.source,
        model=_model_spec(checkpoint, num_layers),
        target=request.target,
        precision=precision.name,
        quantisation=_quantisation(precision),
        layers_per_engine=request.layers_per_engine,
        max_seq_len=max_seq_len,
        kv=kv,
        stages=tuple(specs),
        pass_tensors=shared.tensors if shared is not None else (),
        tokenizer=tokenizer,
        files=files | tokenizer_files,
    )


def _require_all_used(checkpoint: Checkpoint, read: frozenset[str]) -> None:
    """A weight that the graph does not know means another model than the checkpoint's."""
    if unused := checkpoint.unused(read):
        shown = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        raise UnsupportedError(
            f"{checkpoint.source.id}: {len(unused)} tensors of the checkpoint have no place in the "
            f"graph of architecture {checkpoint.config.model_type}: {shown}"
        )


def _write_stage(
    stage: StageGraph, writer: StageWriter, dialect: Dialect, precision: Precision, tied: bool
) -> StageSpec:
    graph = stage.model.graph
    if stage.kind == "embed":
        weights = dialect.lower_embedding(graph, precision, tied=tied)
    elif stage.kind == "probe":
        weights = dialect.lower_probe(graph, precision)
    elif stage.kind == "candidates":
        weights = dialect.lower_candidates(graph, precision)
    elif stage.kind == "positions":
        weights = {}
    else:
        weights = dialect.lower_layers(graph, precision)
        dialect.check_layers(graph, stage.last_layer - stage.first_layer + 1, precision)
    graph.opset_imports[""], stage.model.ir_version = dialect.opset, dialect.ir_version
    file = writer.write(stage.model, weights)
    wide_file = None
    if stage.kind == "layers" and dialect.widen(graph, precision):
        wide_file = writer.write_variant(stage.model, "wide")
    return StageSpec(
        name=stage.name,
        kind=stage.kind,
        file=file,
        wide_file=wide_file,
        first_layer=stage.first_layer,
        last_layer=stage.last_layer,
        inputs=tuple(str(value.name) for value in graph.inputs),
        outputs=tuple(str(value.name) for value in graph.outputs),
        multiply_adds=multiply_adds(graph),
    )


def _max_seq_len(request: ExportRequest, config: Any) -> int:
    limit, asked = int(config.max_position_embeddings), request.max_seq_len
    if asked is None and request.preset is not None:
        return min(limit, fitting_length(request.preset, config, request.precision))
    if asked is None:
        return min(_DEFAULT_MAX_SEQ_LEN, limit)
    if not 1 <= asked <= limit:
        raise UnsupportedError(f"--max-seq-len {asked}: this model takes 1 … {limit} positions")
    return asked


def _crop_tables(graph: ir.Graph, positions: int, max_seq_len: int) -> None:
    """Rotary tables hold a row per position; rows that the engine cannot reach are cut."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != positions:
            continue
        table = np.ascontiguousarray(tensor.numpy()[:max_seq_len])
        value.const_value = ir.tensor(table, name=value.name)
        value.shape = ir.Shape(table.shape)


def _write_tokenizer(
    folder: Path, checkpoint: Checkpoint
) -> tuple[TokenizerSpec | None, dict[str, FileRecord]]:
    if not checkpoint.write_tokenizer(folder / "tokenizer"):
        return None, {}
    main = folder / "tokenizer" / "tokenizer.json"
    try:
        json.loads(main.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"tokenizer.json of the checkpoint is damaged: {error}") from error
    records = {path.relative_to(folder).as_posix(): path for path in _files(folder / "tokenizer")}
    spec = TokenizerSpec(file="tokenizer/tokenizer.json", files=tuple(sorted(records)))
    return spec, {name: record_file(path) for name, path in records.items()}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _model_spec(checkpoint: Checkpoint, num_layers: int) -> ModelSpec:
    config = checkpoint.config
    return ModelSpec(
        architecture=config.model_type,
        num_layers=num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_attention_heads=config.num_attention_heads,
        eos_token_ids=checkpoint.eos_token_ids,
    )


def _kv_geometry(
    config: Any, max_seq_len: int, dialect: Dialect, precision: Precision
) -> KvGeometry:
    heads = config.num_attention_heads
    return kv_geometry(
        dialect.kv_layout,
        precision.activations,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_seq_len,
    )


def _quantisation(precision: Precision) -> Quantisation | None:
    if precision.bits is None:
        return None
    return Quantisation(
        bits=precision.bits,
        block_size=precision.block_size,
        accuracy_level=precision.accuracy_level if precision.activations == "float32" else None,
        wide_rows=precision.wide_rows,
    )


def _versions() -> dict[str, str]:
    from adainfer_runtime import __version__

    versions = {"adainfer-export": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _warnings(manifest: Manifest, request: ExportRequest) -> Iterator[str]:
    if manifest.tokenizer is None:
        yield (
            "the checkpoint has no tokenizer: this engine takes token ids only, "
            "and could not be calibrated"
        )
    elif request.calibration is None:
        yield "no calibration: adaptive mode needs `adainfer calibrate DIR` first"
    elif manifest.exit is None or not manifest.exit.points:
        yield (
            "calibration found no exit that pays at the wanted agreement: "
            "adaptive mode runs every layer"
        )
