"""The export, step by step: resolve, build, lower, split, write, then calibrate."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from adainfer_runtime.backends.kv_scales import KvScales
from adainfer_runtime.backends.layout import kv_geometry
from adainfer_runtime.engine_folder import write_manifest
from adainfer_runtime.manifest import (
    KvGeometry,
    Manifest,
    ModelSpec,
    StageSpec,
)

from .calibrate import CalibrationRequest
from .calibrate.kept import KEPT_FOLDER
from .cost import multiply_adds
from .decoder_source import prepare_decoder
from .decoders.builder import LayerHeads
from .errors import OutputError, UnsupportedError
from .features import drop_features
from .folder import check_output, new_folder, remove_others, scratch_folder
from .journal import JOURNAL_NAME, Journal
from .kv_ranges import find_kv_scales, recorded_kv_scales, unmeasured_kv_scales
from .layout import LOGITS, WIDE, StageLayout
from .lower import Precision, find_target, require_shortlist
from .lower.decoder import DecoderRequest
from .lower.targets import Dialect
from .lower_stage import lower_stage
from .presets import DevicePreset, fitting_length, most_layers_per_engine, require_precision
from .progress import Reporter, SilentReporter, peak_memory_bytes
from .quantisation_report import write_quantisation_report
from .restore import restore_layers
from .sources import Checkpoint, resolve
from .split import StageGraph, layer_groups, split_decoder
from .stage_plan import StagePlan
from .storage import StorageRequest
from .write_tokenizer import write_tokenizer
from .write_weights import write_weights
from .writer import default_workers

__all__ = ["ExportRequest", "ExportResult", "export"]

_LIBRARIES = ("mobius-onnx", "onnx-ir", "onnx", "onnxruntime", "scikit-learn", "skl2onnx")
_DEFAULT_MAX_SEQ_LEN = 2048
_AS_THE_PRECISION_SAYS = StorageRequest()


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how.

    Attributes:
        model: alias, folder, `.gguf` file or Hugging Face id.
        layers_per_engine: layers that share one graph; exits lie between graphs. None cuts after
            every layer and, once calibrated, joins what has no exit point in between.
        max_seq_len: positions of the KV cache; default: 2048, or the model's own limit if less.
        preset: the board whose memory bounds `max_seq_len` and `layers_per_engine`, where they are
            not given.
        weights: folder or `.gguf` file to read for an alias, instead of its recipe's sources.
        calibration: how the exit graph is fitted; None leaves the folder without one.
        storage: block size and layers that are quantised less than `precision` says.
        resume: go on where a killed export to `out` stopped, and keep what is finished if this
            one is stopped too.
        layers: (first, last) layers to write again into the folder `out`, which must be the same
            export of the same source; nothing else is touched, so that `force`, `resume` and
            `calibration` do not go with it.
        workers: data files that are written at a time, each with the memory of its largest pieces;
            None: as many as cores, at most 8.
    """

    model: str
    out: Path
    target: str = "ort-cpu"
    precision: str = "int4"
    layers_per_engine: int | None = None
    max_seq_len: int | None = None
    preset: DevicePreset | None = None
    calibration: CalibrationRequest | None = None
    revision: str | None = None
    weights: Path | None = None
    force: bool = False
    storage: StorageRequest = _AS_THE_PRECISION_SAYS
    resume: bool = False
    layers: tuple[int, int] | None = None
    workers: int | None = None


@dataclass(frozen=True)
class ExportResult:
    """What was written. `warnings` are sentences for the user."""

    out: Path
    manifest: Manifest
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...]


def export(request: ExportRequest, reporter: Reporter | None = None) -> ExportResult:
    """Writes an engine folder; an interrupted export leaves nothing that loads.

    Raises:
        AdaInferError: see `adainfer_export.errors`; the message is one line for the user.
    """
    start = time.perf_counter()
    reporter = reporter or SilentReporter()
    target, dialect, precision = find_target(request.target, request.precision)
    precision = request.storage.refine(precision, target)
    if request.preset is not None:
        require_precision(request.preset, request.precision)
    if request.calibration is not None and request.calibration.shortlist:
        require_shortlist(target)
    if request.layers_per_engine is not None and request.layers_per_engine < 1:
        raise UnsupportedError("--layers-per-engine must be at least 1")
    if request.workers is not None and request.workers < 1:
        raise UnsupportedError("--workers must be at least 1")
    workers = request.workers or default_workers()
    if request.layers is None:
        check_output(request.out, force=request.force)
    elif request.force or request.resume or request.calibration is not None:
        raise UnsupportedError(
            "--layers writes weights of a finished folder again: --force, --resume and "
            "--calibration do not go with it"
        )
    if request.calibration is not None:
        from .calibrate.fitting import check_inputs

        check_inputs(request.calibration, target.name)
    checkpoint = resolve(request.model, revision=request.revision, weights=request.weights)
    if request.layers is not None:
        with scratch_folder(request.out) as folder:
            scales = recorded_kv_scales(request.out) if precision.kv_cache == "int8" else None
            plan = plan_stages(folder, request, checkpoint, dialect, precision, scales)
            manifest = restore_layers(
                request.out, plan, checkpoint, request.layers, workers, reporter
            )
    else:
        with new_folder(request.out, force=request.force, resume=request.resume) as folder:
            scales = None
            if precision.kv_cache == "int8":
                scales = _kv_scales(folder, request, checkpoint, dialect, precision, reporter)
            plan = plan_stages(folder, request, checkpoint, dialect, precision, scales)
            # What a calibration that was killed had fitted is good for another one alone.
            kept = {KEPT_FOLDER} if request.calibration is not None else set[str]()
            manifest = _write_folder(folder, plan, checkpoint, workers, kept, reporter)
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


def _kv_scales(
    folder: Path,
    request: ExportRequest,
    checkpoint: Checkpoint,
    dialect: Dialect,
    precision: Precision,
    reporter: Reporter,
) -> KvScales:
    """Of an export that was planned and thrown away: the model is run, which takes long, behind
    everything that may refuse it.
    """
    with tempfile.TemporaryDirectory(prefix="trial-", dir=folder) as name:
        plan = plan_stages(Path(name), request, checkpoint, dialect, precision)
        tokenizer = write_tokenizer(Path(name), plan).loaded
        return find_kv_scales(plan, folder, checkpoint, tokenizer, reporter)


def _write_folder(
    folder: Path,
    plan: StagePlan,
    source: Checkpoint,
    workers: int,
    kept: set[str],
    reporter: Reporter,
) -> Manifest:
    """The tokenizer, data files and report of a folder whose graphs are written.

    Of what a killed export left there, its finished data files and `kept` stay.
    """
    journal = Journal(folder, plan.identity())
    remove_others(folder, {*plan.layout.records, *journal.finished(), JOURNAL_NAME, *kept})
    # Before the weights, which take long: one that cannot be built is refused at once.
    tokenizer = write_tokenizer(folder, plan)
    files = plan.layout.plans
    written = write_weights(plan, files, journal, source, tokenizer.loaded, workers, reporter)
    matrices = [matrix for file in written.values() for matrix in file.matrices]
    records = plan.layout.records | {name: file.record for name, file in written.items()}
    records |= {**tokenizer.files, **write_quantisation_report(folder, matrices)}
    return plan.manifest(tokenizer.spec, dict(sorted(records.items())))


def plan_stages(
    folder: Path,
    request: ExportRequest,
    checkpoint: Checkpoint,
    dialect: Dialect,
    precision: Precision,
    kv_scales: KvScales | None = None,
) -> StagePlan:
    """Writes the graphs of all stages; no weight is read, but all are known to be there.

    Args:
        kv_scales: of caches in int8; without them they are planned with ones.

    Raises:
        UnsupportedError, CheckpointError: the checkpoint is not what its configuration says.
        OutputError: the scales are another model's.
    """
    config = checkpoint.config
    max_seq_len = _max_seq_len(request, config)
    prepared = prepare_decoder(checkpoint, max_seq_len, dialect, precision)
    model, heads = prepared.decoder.model, prepared.decoder.layer_heads
    dialect, precision = prepared.dialect, prepared.precision
    layout = StageLayout(folder)
    if precision.kv_cache == "int8":
        kv_scales = _fitting(kv_scales, heads, request.out)
    scales = None if kv_scales is None else layout.add_kv_scales(kv_scales)
    kv = _kv_geometry(heads, max_seq_len, dialect, precision, scales)
    lowering = DecoderRequest(prepared.windows, max_seq_len, precision, kv.row_elements, kv_scales)
    shared = dialect.lower_decoder(model, lowering)
    request.storage.check(len(heads))
    groups = layer_groups(len(heads), request.layers_per_engine or 1)
    project_kv = dialect.kv_fill.project if dialect.kv_fill else None
    stages = split_decoder(model, groups, project_kv)
    if shared is not None:
        stages = chain([StageGraph("positions", "positions", shared.model)], stages)
    specs = [
        _add_stage(stage, layout, dialect, precision, checkpoint.tied_head) for stage in stages
    ]
    return StagePlan(
        stages=tuple(specs),
        layout=layout,
        checkpoint=prepared.checkpoint,
        exporter=_versions(),
        model=_model_spec(checkpoint, heads),
        target=request.target,
        precision=precision,
        layers_per_engine=request.layers_per_engine,
        most_layers_per_engine=_most_layers(request, config),
        max_seq_len=max_seq_len,
        kv=kv,
        pass_tensors=shared.tensors if shared else (),
        batched=dialect.batched,
    )


def _fitting(scales: KvScales | None, layers: Sequence[LayerHeads], out: Path) -> KvScales:
    heads = max(layer.kv for layer in layers)
    unmeasured = unmeasured_kv_scales(len(layers), heads, layers[0].head_dim)
    if scales is None:
        return unmeasured
    if scales.values.shape != unmeasured.values.shape:
        raise OutputError(
            f"{out} has caches of another model: {list(scales.values.shape)}, not "
            f"{list(unmeasured.values.shape)} (layers, K and V, heads, width)"
        )
    return scales


def _add_stage(
    stage: StageGraph, layout: StageLayout, dialect: Dialect, precision: Precision, tied: bool
) -> StageSpec:
    weights = lower_stage(stage, dialect, precision, tied=tied)
    graph = stage.model.graph
    file, cost = layout.add(stage.model, weights), multiply_adds(graph)
    inputs, outputs = (
        tuple(str(value.name) for value in values) for values in (graph.inputs, graph.outputs)
    )
    wide_file = logits_file = None
    if stage.kind == "layers":
        own = dialect.widen(graph, precision, weights)
        wide_file = None if own is None else layout.add_variant(stage.model, WIDE, own)
    if stage.kind == "probe" and dialect.host_features:
        drop_features(graph)
        logits_file = layout.add_variant(stage.model, LOGITS, {})
    return StageSpec(
        name=stage.name,
        kind=stage.kind,
        file=file,
        wide_file=wide_file,
        logits_file=logits_file,
        first_layer=stage.first_layer,
        last_layer=stage.last_layer,
        inputs=inputs,
        outputs=outputs,
        multiply_adds=cost,
    )


def _max_seq_len(request: ExportRequest, config: Any) -> int:
    limit, asked = int(config.max_position_embeddings), request.max_seq_len
    if asked is None and request.preset is not None:
        context = request.calibration is not None and request.calibration.context_exit
        fitting = fitting_length(
            request.preset, config, request.precision, request.target, context_exit=context
        )
        return min(limit, fitting)
    if asked is None:
        return min(_DEFAULT_MAX_SEQ_LEN, limit)
    if not 1 <= asked <= limit:
        raise UnsupportedError(f"--max-seq-len {asked}: this model takes 1 … {limit} positions")
    return asked


def _most_layers(request: ExportRequest, config: Any) -> int | None:
    if request.preset is None or request.layers_per_engine is not None:
        return None
    return most_layers_per_engine(request.preset, config, request.precision)


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


def _kv_geometry(
    layers: Sequence[LayerHeads],
    max_seq_len: int,
    dialect: Dialect,
    precision: Precision,
    scales: str | None,
) -> KvGeometry:
    heads, width = tuple(layer.kv for layer in layers), layers[0].head_dim
    kind = precision.cache_type
    return kv_geometry(dialect.kv_layout, kind, heads, width, max_seq_len, scales)


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
    if request.layers is not None:  # the folder is what it was
        return
    if manifest.precision == "keep" and manifest.source.kind != "onnx":
        yield (
            "kept blocks are computed in float32, exactly: a decoded token takes about four times "
            "as long in them as with --precision int4"
        )
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
