"""`adainfer inspect`: what an engine folder holds, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..backends.layout import ITEM_BYTES
from ..engine_folder import QUANTISATION_REPORT, load_manifest, verify_files
from ..errors import ManifestError
from ..manifest import Certificate, CombinedExitSpec, ExitSpec, Manifest
from ..text_certificate_spec import TextCertificate

__all__ = ["certificate_tables", "describe_exit", "register"]

_EXAMPLES = """
Examples:

    adainfer inspect engines/

    adainfer inspect engines/ --verify --json
"""


def register(app: typer.Typer) -> None:
    """Adds the subcommand."""
    app.command(name="inspect", epilog=_EXAMPLES)(inspect)


def inspect(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every sha256.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Show model, stages, exit graph and origin of an engine folder."""
    manifest = load_manifest(folder)
    verify_files(folder, manifest, sha256=verify)
    if json_output:
        print(manifest.model_dump_json(indent=1))
        return
    table = Table(title=str(folder), show_header=False)
    for name, value in _rows(manifest):
        table.add_row(name, value)
    Console().print(table)
    if QUANTISATION_REPORT in manifest.files:
        Console().print(_quantisation_table(folder / QUANTISATION_REPORT))
    for table in certificate_tables(manifest):
        Console().print(table)


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    model, source = manifest.model, manifest.source
    size = sum(record.bytes for record in manifest.files.values())
    revision = f" ({source.revision})" if source.revision else ""
    return [
        ("source", f"{source.kind} {source.id}{revision}"),
        ("architecture", model.architecture),
        ("layers", _layers(manifest)),
        ("hidden size", str(model.hidden_size)),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("target", f"{manifest.target}, {manifest.precision}"),
        ("max length", f"{manifest.max_seq_len:,} positions"),
        ("KV cache", f"{_kv_bytes(manifest) / 1e6:,.1f} MB per sequence, {manifest.kv.dtype}"),
        ("files", f"{len(manifest.files)}, {size / 1e6:,.1f} MB"),
        ("tokenizer", "yes" if manifest.tokenizer else "none: token ids only"),
        ("exits", describe_exit(manifest.exit)),
        *(("further exits", describe_exit(spec)) for spec in manifest.other_exits),
        ("exits of choices", describe_exit(manifest.choice_exit)),
        ("context exit", describe_exit(manifest.context_exit)),
        ("combined exits", describe_combined(manifest.combined_exit)),
    ]


def _quantisation_table(path: Path) -> Table:
    """What quantisation changed, per layer."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
        table = Table("weights of", "bits", "relative error", title="quantisation")
        for entry in summary:
            bits = ", ".join(map(str, entry["bits"]))
            error = "none: kept" if entry["kept"] else f"{entry['relative_error']:.4f}"
            table.add_row(entry["place"], bits, error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} is damaged: {error}; export the model again") from error
    return table


def describe_exit(spec: ExitSpec | None) -> str:
    """One line about the exit graph."""
    if spec is None:
        return "not calibrated"
    if spec.classifier is None:
        return "calibrated: no exit pays at the wanted agreement"
    points = ", ".join(str(point.exit_layer) for point in spec.points)
    return f"{spec.classifier.kind} after layers {points}; {_held_out(spec)}"


def describe_combined(spec: CombinedExitSpec | None) -> str:
    """One line about combined exits."""
    if spec is None:
        return "not calibrated"
    return f"{spec.answer} and context; {_held_out(spec)}"


def _held_out(spec: ExitSpec | CombinedExitSpec) -> str:
    figures = spec.calibration.get("held_out", {})
    return (
        f"target agreement {spec.target_agreement}, on held-out prompts "
        f"{figures.get('agreement', '?')} with {figures.get('layers_saved', 0):.1%} of layers saved"
    )


def certificate_tables(manifest: Manifest) -> list[Table]:
    """One per exit graph that carries a certificate, and one per certificate of texts."""
    tables = [
        _certificate_table(name, certificate) for name, certificate in manifest.certificates.items()
    ]
    modes = {"adaptive": manifest.exit, "context": manifest.context_exit}
    texts = [
        _text_certificate_table(mode, spec.text_certificate)
        for mode, spec in modes.items()
        if spec and spec.text_certificate
    ]
    return [*tables, *texts]


def _certificate_table(name: str, certificate: Certificate) -> Table:
    """Levels with what was seen, and what they allow."""
    against = " against gold answers" if certificate.against == "gold" else ""
    title = f"certificate of {name}{against} ({certificate.precision}, {certificate.device_class})"
    table = Table(
        "disagreement ≤", "confidence", "prompts", "disagreed", "layers saved", title=title
    )
    for entry in certificate.levels:
        row = [f"{entry.level:.1%}", f"{entry.confidence:.0%}", str(entry.prompts)]
        if entry.threshold is None:
            needed = f"at least {entry.prompts_needed} prompts" if entry.prompts_needed else ""
            table.add_row(*row, "not certified", needed)
        else:
            table.add_row(*row, str(entry.disagreements), f"{entry.layers_saved:.1%}")
    return table


def _text_certificate_table(mode: str, certificate: TextCertificate) -> Table:
    """The same of texts; their shares are means."""
    title = (
        f"certificate of texts up to {certificate.max_new_tokens} tokens in mode {mode}, "
        f"kv_policy {certificate.kv_policy} ({certificate.precision}, {certificate.device_class})"
    )
    columns = ("differing tokens ≤", "confidence", "texts", "differing", "teacher-forced", "exits")
    last = "prompt layers saved" if mode == "context" else "layers saved"
    table = Table(*columns, last, title=title)
    for entry in certificate.levels:
        row = [f"{entry.level:.1%}", f"{entry.confidence:.0%}", str(entry.texts)]
        if entry.threshold is None:
            needed = f"at least {entry.texts_needed} texts" if entry.texts_needed else ""
            table.add_row(*row, "not certified", needed)
        else:
            shares = (entry.differing, entry.teacher_forced)
            saved = f"{entry.layers_saved:.1%}"
            table.add_row(*row, *(f"{share:.1%}" for share in shares), str(entry.exits), saved)
    return table


def _layers(manifest: Manifest) -> str:
    engines = len(manifest.layer_stages)
    return f"{manifest.model.num_layers} in {engines} engine{'s' if engines > 1 else ''}"


def _kv_bytes(manifest: Manifest) -> int:
    kv = manifest.kv
    heads = sum(kv.heads(layer) for layer in range(1, manifest.model.num_layers + 1))
    return 2 * ITEM_BYTES[kv.dtype] * heads * kv.max_length * kv.head_dim
