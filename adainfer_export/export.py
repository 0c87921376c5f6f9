"""The export, step by step: resolve, build, lower, split, write, then calibrate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

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

from .architectures import find_architecture, sliding_windows
from .calibrate import CalibrationRequest
from .cost import multiply_adds
from .decoders.builder import LayerHeads
from .errors import CheckpointError, UnsupportedError
from .folder import check_output, new_folder
from .frontend import build_decoder
from .lower import Precision, find_target
from .lower.targets import Dialect
from .preflight import require_same_tensors
from .progress import Reporter, SilentReporter, peak_memory_bytes
from .sources import Checkpoint, resolve
from .sources.viewed import ViewedCheckpoint
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
        weights: folder or `.gguf` file to read for an alias, instead of its recipe's sources.
        calibration: how the exit graph is fitted; None leaves the folder without one.
    """

    model: str
    out: Path
    target: str = "ort-cpu"
    precision: str = "int4"
    layers_per_engine: int | None = None
    max_seq_len: int | None = None
    calibration: CalibrationRequest | None = None
    revision: str | None = None
    weights: Path | None = None
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
    _, dialect, precision = find_target(request.target, request.precision)
    if request.layers_per_engine is not None and request.layers_per_engine < 1:
        raise UnsupportedError("--layers-per-engine must be at least 1")
    check_output(request.out, force=request.force)
    checkpoint = resolve(request.model, revision=request.revision, weights=request.weights)
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
    max_seq_len = _max_seq_len(request.max_seq_len, config)
    decoder = build_decoder(config, architecture, max_seq_len, checkpoint.shape)
    heads = decoder.layer_heads
    checkpoint = ViewedCheckpoint(
        checkpoint, decoder.views, architecture.aliases, architecture.others
    )
    require_same_tensors(decoder.model.graph, checkpoint)
    dialect.lower_decoder(decoder.model, windows=sliding_windows(config, max_seq_len))
    num_layers = len(heads)
    groups = layer_groups(num_layers, request.layers_per_engine or 1)
    writer = StageWriter(folder, checkpoint)
    reporter.begin("exporting layers", num_layers)
    specs = []
    project_kv = dialect.kv_fill.project if dialect.kv_fill else None
    for stage in split_decoder(decoder.model, groups, project_kv):
        specs.append(_write_stage(stage, writer, dialect, precision, checkpoint.tied_head))
        if stage.kind == "layers":
            for layer in range(stage.first_layer, stage.last_layer + 1):
                reporter.step(f"layer {layer}/{num_layers}")
    files = writer.close()
    tokenizer, tokenizer_files = _write_tokenizer(folder, checkpoint)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        exporter=_versions(),
        source=checkpoint.source,
        model=_model_spec(checkpoint, heads),
        target=request.target,
        precision=precision.name,
        quantisation=_quantisation(precision),
        layers_per_engine=request.layers_per_engine,
        max_seq_len=max_seq_len,
        kv=_kv_geometry(heads, max_seq_len),
        stages=tuple(specs),
        tokenizer=tokenizer,
        files=files | tokenizer_files,
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
    elif stage.kind == "kv_fill" and dialect.kv_fill is not None:
        weights = dialect.kv_fill.lower(graph, precision)
    else:
        weights = dialect.lower_layers(graph, precision)
        dialect.check_layers(graph, stage.last_layer - stage.first_layer + 1, precision)
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


def _max_seq_len(asked: int | None, config: Any) -> int:
    limit = int(config.max_position_embeddings)
    if asked is None:
        return min(_DEFAULT_MAX_SEQ_LEN, limit)
    if not 1 <= asked <= limit:
        raise UnsupportedError(f"--max-seq-len {asked}: this model takes 1 … {limit} positions")
    return asked


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


def _model_spec(checkpoint: Checkpoint, layers: Sequence[LayerHeads]) -> ModelSpec:
    config = checkpoint.config
    heads = tuple(layer.query for layer in layers)
    return ModelSpec(
        architecture=config.model_type,
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_attention_heads=max(heads),
        layer_attention_heads=heads if len(set(heads)) > 1 else (),
        eos_token_ids=checkpoint.eos_token_ids,
    )


def _kv_geometry(layers: Sequence[LayerHeads], max_seq_len: int) -> KvGeometry:
    heads = tuple(layer.kv for layer in layers)
    return KvGeometry(
        num_heads=max(heads),
        layer_heads=heads if len(set(heads)) > 1 else (),
        head_dim=layers[0].head_dim,
        max_length=max_seq_len,
    )


def _quantisation(precision: Precision) -> Quantisation | None:
    if precision.bits is None:
        return None
    return Quantisation(
        bits=precision.bits,
        block_size=precision.block_size,
        accuracy_level=precision.accuracy_level,
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
