"""The compiler's subcommands of `adainfer`; `adainfer-export` is short for `adainfer export`."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from adainfer_models import list_recipes
from adainfer_runtime.commands.inspect_folder import describe_exit
from adainfer_runtime.engine_folder import load_manifest, verify_files
from adainfer_runtime.manifest import Manifest

from .architectures import ARCHITECTURES
from .calibrate import CalibrationRequest
from .errors import CalibrationError
from .export import ExportRequest, ExportResult, export
from .lower import PRECISIONS, TARGETS
from .presets import PRESETS, find_preset
from .progress import terminal_reporter

__all__ = ["register"]

_EXPORT_EXAMPLES = """
Examples:

    adainfer-export smollm2-135m --out engines/

    adainfer-export ./my-llama --out engines/ --precision fp32 --calibration prompts.jsonl

    adainfer-export model.gguf --out engines/ --layers-per-engine 5 --calibration none

    adainfer-export smollm2-135m --out engines/ --preset jetson-orin
"""
_CALIBRATE_EXAMPLES = """
Examples:

    adainfer calibrate engines/ --calibration mine.jsonl --target-agreement 0.995

    adainfer calibrate engines/ --calibration builtin --adapters none
"""


class AdapterChoice(str, Enum):
    """Values of --adapters."""

    distilled = "distilled"
    ridge = "ridge"
    none = "none"


class ClassifierChoice(str, Enum):
    """Values of --classifier: the kinds of `calibrate.classifiers`, and auto."""

    svm = "svm"
    crf = "crf"
    logistic = "logistic"
    boosting = "boosting"
    threshold = "threshold"
    auto = "auto"


CalibrationOption = Annotated[
    list[str],
    typer.Option(
        "--calibration", help="`builtin`, `none`, or a task file (JSON lines); repeatable."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--calibration-limit", help="Prompts to use at most (a seeded sample).", min=1),
]
AgreementOption = Annotated[
    float,
    typer.Option(
        "--target-agreement",
        help="Share of answers that must equal the full model's.",
        min=0.5,
        max=1.0,
    ),
]
AdaptersOption = Annotated[
    AdapterChoice,
    typer.Option("--adapters", help="Affine map before each probe, or none (plain AdaInfer)."),
]
ClassifierOption = Annotated[
    list[ClassifierChoice],
    typer.Option(
        "--classifier",
        help="What decides; repeatable: the first is the default one, the others can be asked "
        "for by name. `auto` takes the one that saves most.",
    ),
]
ClassifierFileOption = Annotated[
    Path | None,
    typer.Option(
        "--classifier-file",
        help="A classifier of your own as ONNX (token, top_prob, gap, depth, trust, state → score, "
        "next_state); it becomes the default one, named `own`.",
    ),
]
ContextOption = Annotated[
    bool,
    typer.Option(
        "--context-exit",
        help="Also fit a context exit (mode context): the prompt's positions stop early, the "
        "answer's does not.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress display.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Adds export, calibrate, certify, validate and list to `adainfer`."""
    from . import certify_command
    from .validate_command import validate

    app.command(name="export", epilog=_EXPORT_EXAMPLES)(run_export)
    app.command(name="calibrate", epilog=_CALIBRATE_EXAMPLES)(run_calibrate)
    app.command(name="certify", epilog=certify_command.EXAMPLES)(certify_command.certify)
    app.command(name="validate")(validate)
    app.command(name="list")(run_list)


def run_export(
    model: Annotated[
        str, typer.Argument(help="Alias, folder, .gguf file or Hugging Face id (owner/name).")
    ],
    out: Annotated[Path, typer.Option(help="Engine folder to write.")],
    target: Annotated[
        str | None,
        typer.Option(
            help=f"One of: {', '.join(target.name for target in TARGETS)}. Default: ort-cpu."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join(PRECISIONS)}. Default: int4.")
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Quantised weights that share a scale: 32; TensorRT also 64, 128."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Target, precision and length for a board: "
            f"{', '.join(preset.name for preset in PRESETS)}."
        ),
    ] = None,
    layers_per_engine: Annotated[
        int | None,
        typer.Option(
            help="Layers in one graph; exits lie between graphs. "
            "Default: one, and what has no exit in between is joined after calibration.",
            min=1,
        ),
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Positions of the KV cache; default 2048 at most.")
    ] = None,
    calibration: CalibrationOption = ["builtin"],  # noqa: B006 - typer copies defaults
    calibration_limit: LimitOption = None,
    target_agreement: AgreementOption = 0.99,
    adapters: AdaptersOption = AdapterChoice.distilled,
    classifier: ClassifierOption = [ClassifierChoice.svm],  # noqa: B006 - typer copies defaults
    classifier_file: ClassifierFileOption = None,
    context_exit: ContextOption = False,
    revision: Annotated[str | None, typer.Option(help="Branch or commit on the hub.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an engine folder.")] = False,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.")] = False,
) -> None:
    """Split an LLM into engines with an exit graph between them."""
    _log_warnings()
    board = find_preset(preset) if preset is not None else None
    request = ExportRequest(
        model=model,
        out=out,
        target=target or (board.target if board else "ort-cpu"),
        precision=precision or (board.precision if board else "int4"),
        block_size=block_size,
        preset=board,
        layers_per_engine=layers_per_engine,
        max_seq_len=max_seq_len,
        calibration=_calibration(
            calibration,
            calibration_limit,
            target_agreement,
            adapters,
            classifier,
            classifier_file,
            context_exit=context_exit,
        ),
        revision=revision,
        force=force,
    )
    with terminal_reporter(quiet=quiet or json_output) as reporter:
        result = export(request, reporter)
    if json_output:
        print(json.dumps(_summary(result)))
        return
    console = Console(stderr=True)
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow")
    print(
        f"{result.out}: {len(result.manifest.layer_stages)} engines, {result.manifest.precision}, "
        f"{result.seconds:.1f} s, peak {result.peak_memory_bytes / 1e6:,.0f} MB"
    )
    _print_exits(result.manifest)


def run_calibrate(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    calibration: CalibrationOption = ["builtin"],  # noqa: B006 - typer copies defaults
    calibration_limit: LimitOption = None,
    target_agreement: AgreementOption = 0.99,
    adapters: AdaptersOption = AdapterChoice.distilled,
    classifier: ClassifierOption = [ClassifierChoice.svm],  # noqa: B006 - typer copies defaults
    classifier_file: ClassifierFileOption = None,
    context_exit: ContextOption = False,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Fit the exit graph of an engine folder again."""
    request = _calibration(
        calibration,
        calibration_limit,
        target_agreement,
        adapters,
        classifier,
        classifier_file,
        context_exit=context_exit,
    )
    if request is None:
        raise CalibrationError("`none` calibrates nothing: give `builtin` or task files")
    from .calibrate.pipeline import recalibrate

    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    with terminal_reporter(quiet=quiet or json_output) as reporter:
        manifest = recalibrate(folder, manifest, request, reporter)
    if json_output:
        print(json.dumps(_exits(manifest)))
        return
    _print_exits(manifest)


def run_list(json_output: JsonOption = False) -> None:
    """List aliases, architectures, targets and precisions."""
    recipes = list_recipes()
    if json_output:
        data = {
            "aliases": [asdict(recipe) for recipe in recipes],
            "architectures": [entry.model_type for entry in ARCHITECTURES],
            "targets": [
                {"name": t.name, "runs_on": t.summary, "precisions": t.precisions} for t in TARGETS
            ],
        }
        print(json.dumps(data))
        return
    console = Console()
    table = Table("alias", "architecture", "source", "licence", title="models")
    for recipe in recipes:
        gated = " (gated)" if recipe.gated else ""
        table.add_row(
            recipe.alias, recipe.architecture, recipe.sources[0].id, recipe.licence + gated
        )
    console.print(table)
    console.print("architectures:", ", ".join(entry.model_type for entry in ARCHITECTURES))
    table = Table("target", "runs on", "precisions", title="targets")
    for target in TARGETS:
        table.add_row(target.name, target.summary, ", ".join(target.precisions))
    console.print(table)


def _calibration(
    values: list[str],
    limit: int | None,
    target_agreement: float,
    adapters: AdapterChoice,
    classifiers: list[ClassifierChoice],
    classifier_file: Path | None,
    *,
    context_exit: bool,
) -> CalibrationRequest | None:
    if ClassifierChoice.auto in classifiers and len(classifiers) > 1:
        raise CalibrationError("--classifier auto goes with no other --classifier")
    words = {"builtin", "none"} & set(values)
    if words and len(values) > 1:
        raise CalibrationError(f"--calibration {words.pop()} goes with no other --calibration")
    if values == ["none"]:
        return None
    return CalibrationRequest(
        files=() if values == ["builtin"] else tuple(Path(value) for value in values),
        limit=limit,
        target_agreement=target_agreement,
        adapters=adapters.value,
        classifiers=tuple(dict.fromkeys(choice.value for choice in classifiers)),
        classifier_file=classifier_file,
        context_exit=context_exit,
    )


def _summary(result: ExportResult) -> dict[str, object]:
    return {
        "out": str(result.out),
        "source": result.manifest.source.model_dump(mode="json"),
        "target": result.manifest.target,
        "precision": result.manifest.precision,
        "engines": len(result.manifest.layer_stages),
        **_exits(result.manifest),
        "seconds": round(result.seconds, 2),
        "peak_memory_bytes": result.peak_memory_bytes,
        "warnings": result.warnings,
    }


def _exits(manifest: Manifest) -> dict[str, object]:
    """The exit graphs as they stand in the manifest."""
    fields = {"exit", "other_exits", "choice_exit", "context_exit"}
    return manifest.model_dump(mode="json", include=fields)


def _print_exits(manifest: Manifest) -> None:
    print(f"exits: {describe_exit(manifest.exit)}")
    for name, spec in manifest.named_exits.items():
        if spec is not manifest.exit:
            print(f"exits ({name}): {describe_exit(spec)}")


def _log_warnings() -> None:
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    logging.getLogger("adainfer_export").addHandler(handler)
