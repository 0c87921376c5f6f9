"""Writes the data files of some layers of a finished engine folder again (`--layers 12-15`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.tokenizer import load_tokenizer

from .errors import OutputError, UnsupportedError
from .journal import Journal
from .layout import WIDE, DataPlan
from .progress import Reporter
from .sources import Checkpoint
from .stage_plan import StagePlan
from .write_weights import write_weights

__all__ = ["restore_layers"]


def restore_layers(
    out: Path,
    plan: StagePlan,
    source: Checkpoint,
    layers: tuple[int, int],
    workers: int,
    reporter: Reporter,
) -> Manifest:
    """Replaces the layers' data files, each all at once, by what the manifest records of them.

    Args:
        plan: the same export, planned in a scratch folder.
        source: the checkpoint under its own names.
        layers: (first, last), 1-based.
        workers: files that are written at a time.

    Raises:
        OutputError: the folder is another export: other settings, source or versions.
        UnsupportedError: the model has no such layers.
    """
    manifest = load_manifest(out)
    _require_same_export(out, manifest, plan)
    scratch = plan.layout.root
    files = list(_chosen(plan, layers))
    tokenizer = load_tokenizer(out, manifest) if manifest.tokenizer else None
    journal = Journal(scratch, {})
    written = write_weights(plan, files, journal, source, tokenizer, workers, reporter)
    for file, record in ((file, done.record) for file, done in written.items()):
        if record != manifest.files[file]:
            raise OutputError(
                f"{out}: {file} would be {record.sha256[:12]}…, the manifest records "
                f"{manifest.files[file].sha256[:12]}…{_other_cpu(plan)}; export the model again"
            )
    for file in written:
        (scratch / file).replace(out / file)
    return manifest


def _other_cpu(plan: StagePlan) -> str:
    """Sums in float32, which rounding to nearest has none of, differ between kinds of CPUs."""
    if plan.precision.rounding == "nearest":
        return ""
    return f" (with --rounding {plan.precision.rounding}, also on another kind of CPU)"


def _chosen(plan: StagePlan, layers: tuple[int, int]) -> Iterator[DataPlan]:
    if layers[1] > plan.model.num_layers:
        raise UnsupportedError(
            f"--layers {layers[0]}-{layers[1]}: this model has {plan.model.num_layers}"
        )
    names = {
        f"stages/{stage.name}{variant}.data"
        for stage in plan.stages
        for variant in ("", f".{WIDE}")
        if stage.first_layer and stage.first_layer <= layers[1] and layers[0] <= stage.last_layer
    }
    return (data for data in plan.layout.plans if data.file in names)


def _require_same_export(out: Path, manifest: Manifest, plan: StagePlan) -> None:
    source, recorded = plan.checkpoint.source, manifest.model_dump(mode="json")
    for key, value in plan.settings().items():
        if recorded[key] != value:
            raise OutputError(f"{out} has {key} {recorded[key]}, not {value}; give its settings")
    if manifest.kv.dtype != plan.kv.dtype:
        raise OutputError(
            f"{out} has caches of {manifest.kv.dtype}, not {plan.kv.dtype}; give its settings"
        )
    if manifest.source.files != source.files:
        raise OutputError(f"{out} was exported from other files than {source.id} holds now")
    for name, record in plan.layout.records.items():
        if manifest.files.get(name) != record:
            raise OutputError(
                f"{out}: {name} was written by other versions of the exporter or its libraries; "
                "export the model again"
            )
