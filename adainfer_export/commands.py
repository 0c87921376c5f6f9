"""The compiler's subcommands of `adainfer`; `adainfer-export` is short for `adainfer export`."""

from __future__ import annotations

import json
import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from adainfer_models import ExitSettings, load_recipe
from adainfer_runtime.commands.inspect_folder import describe_combined, describe_exit
from adainfer_runtime.engine_folder import load_manifest, verify_files
from adainfer_runtime.manifest import Manifest

from .calibrate import CalibrationRequest, ShortlistRequest
from .errors import CalibrationError, UnsupportedError
from .export import ExportRequest, ExportResult, export
from .lower import PRECISIONS, TARGETS
from .presets import PRESETS, find_preset
from .progress import terminal_reporter
from .stopping import stoppable
from .storage import NO_LAYERS, StorageRequest, choose_storage, parse_range

__all__ = ["register"]

_EXPORT_EXAMPLES = """
Examples:

    adainfer-export smollm2-135m --out engines/

    adainfer-export ./my-llama --out engines/ --precision fp32 --calibration prompts.jsonl

    adainfer-export model.gguf --out engines/ --precision keep --calibration none

    adainfer-export llama2-7b --source ./Llama-2-7b-hf --out engines/

    adainfer-export llama2-7b --out engines/ --int8-layers 1-2,head --resume

    adainfer-export smollm2-135m --out engines/ --rounding gptq --block-size 64 --prefill int8

    adainfer-export smollm2-135m --out engines/ --preset jetson-orin
"""
_CALIBRATE_EXAMPLES = """
Examples:

    adainfer calibrate engines/ --calibration mine.jsonl --target-agreement 0.995

    adainfer calibrate engines/ --calibration builtin --adapters none

    adainfer calibrate engines/ --calibration mine.jsonl --calibration self --self-texts 200
"""


def _block_sizes(*, of_down: bool = False) -> str:
    sizes = {
        target.name: target.down_block_sizes if of_down else target.block_sizes
        for target in TARGETS
        if "int4" in target.precisions
    }
    return "; ".join(
        f"{name}: {', '.join(map(str, sorted(taken)))}" for name, taken in sizes.items() if taken
    )


# Parameters of `export` that say what is stored, and how; with --layers the others say nothing.
_OF_STORED_LAYERS = frozenset(
    {
        "model",
        "out",
        "target",
        "precision",
        "preset",
        "layers_per_engine",
        "max_seq_len",
        "source",
        "revision",
        "block_size",
        "down_block_size",
        "int8_layers",
        "rounding",
        "prefill",
        "kv_cache_dtype",
        "layers",
        "workers",
        "quiet",
        "json_output",
    }
)


class AdapterChoice(str, Enum):
    """Values of --adapters."""

    distilled = "distilled"
    ridge = "ridge"
    none = "none"


class TranslatorChoice(str, Enum):
    """Values of --translators."""

    distilled = "distilled"
    ridge = "ridge"


class RoundingChoice(str, Enum):
    """Values of --rounding."""

    nearest = "nearest"
    gptq = "gptq"


class PrefillChoice(str, Enum):
    """Values of --prefill."""

    stored = "stored"
    int8 = "int8"


class KvCacheChoice(str, Enum):
    """Values of --kv-cache-dtype."""

    auto = "auto"
    int8 = "int8"


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
        "--calibration",
        help="`builtin`, a task file (JSON lines), `self` (text that the model writes itself, for "
        "adapters, beside the others), or `none`; repeatable.",
    ),
]
SelfTextsOption = Annotated[
    int, typer.Option(help="Texts that `--calibration self` lets the model write.", min=1)
]
LimitOption = Annotated[
    int | None,
    typer.Option("--calibration-limit", help="Prompts to use at most (a seeded sample).", min=1),
]
AgreementOption = Annotated[
    float | None,
    typer.Option(
        "--target-agreement",
        help="Share of answers that must equal the full model's; default: the alias's, else 0.99.",
        min=0.5,
        max=1.0,
    ),
]
AdaptersOption = Annotated[
    AdapterChoice | None,
    typer.Option(
        "--adapters",
        help="Affine map before each probe, or none (plain AdaInfer); default: the alias's, else "
        "distilled.",
    ),
]
ClassifierOption = Annotated[
    list[ClassifierChoice] | None,
    typer.Option(
        "--classifier",
        help="What decides; repeatable: the first is the default one, the others can be asked "
        "for by name. `auto` takes the one that saves most. Default: the alias's, else svm.",
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
EntropyOption = Annotated[
    bool,
    typer.Option(
        "--entropy",
        help="Also try classifiers that know the entropy of the prediction. They read all of its "
        "logits at every check.",
    ),
]
ContextOption = Annotated[
    bool,
    typer.Option(
        "--context-exit",
        help="Also fit a context exit (mode context): the prompt's positions stop early, the "
        "answer's does not; and combined exits, which look for both.",
    ),
]
TranslatorsOption = Annotated[
    TranslatorChoice,
    typer.Option(
        "--translators",
        help="Of context exits: maps to the keys and values of the layers above, in closed form "
        "(ridge), or then trained through those layers.",
    ),
]
ShortlistOption = Annotated[
    bool,
    typer.Option(
        "--shortlist",
        help="Also fit a low-rank head that proposes a few tokens: a cheaper probe for drafts and "
        "exit checks.",
    ),
]
ShortlistTokensOption = Annotated[
    int | None,
    typer.Option(
        "--shortlist-tokens",
        help="A shortlist of so many tokens that the model predicts most often, in place of a "
        "low-rank head.",
        min=1,
        show_default=False,
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress display.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Adds export, calibrate, certify, validate and list to `adainfer`."""
    from . import certify_command, list_command, validate_command

    app.command(name="export", epilog=_EXPORT_EXAMPLES)(run_export)
    app.command(name="calibrate", epilog=_CALIBRATE_EXAMPLES)(run_calibrate)
    app.command(name="certify", epilog=certify_command.EXAMPLES)(certify_command.certify)
    app.command(name="validate", epilog=validate_command.EXAMPLES)(validate_command.validate)
    app.command(name="list", epilog=list_command.EXAMPLES)(list_command.run_list)


def run_export(
    context: typer.Context,
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
        int | None, typer.Option(help="Positions of the KV cache; default 2048 at most.", min=1)
    ] = None,
    calibration: CalibrationOption = ["builtin"],  # noqa: B006 - typer copies defaults
    calibration_limit: LimitOption = None,
    self_texts: SelfTextsOption = 128,
    target_agreement: AgreementOption = None,
    adapters: AdaptersOption = None,
    classifier: ClassifierOption = None,
    classifier_file: ClassifierFileOption = None,
    entropy: EntropyOption = False,
    context_exit: ContextOption = False,
    translators: TranslatorsOption = TranslatorChoice.distilled,
    shortlist: ShortlistOption = False,
    shortlist_tokens: ShortlistTokensOption = None,
    source: Annotated[
        Path | None,
        typer.Option(
            help="Folder or .gguf file with an alias's weights, where they cannot be fetched.",
            metavar="DIR",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch or commit on the hub.")] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale in int4 and int8; the widths of all matrices must be "
            f"multiples of it. Default 32. {_block_sizes()}.",
            show_default=False,
            min=1,
        ),
    ] = None,
    down_block_size: Annotated[
        int | None,
        typer.Option(
            help="The same of the products that end feed-forward networks (down_proj, fc2), whose "
            "rows are longer: 256 decodes up to a twentieth faster than 64, for some quality. "
            f"Default: --block-size. {_block_sizes(of_down=True)}.",
            show_default=False,
            min=1,
        ),
    ] = None,
    int8_layers: Annotated[
        str | None,
        typer.Option(
            help="Sensitive layers that get 8 bits in int4: `1-2,29-30`, and `head` for the head. "
            f"Default: the alias's (see `adainfer list ALIAS`), else `{NO_LAYERS}`.",
            show_default=False,
        ),
    ] = None,
    rounding: Annotated[
        RoundingChoice,
        typer.Option(
            help="Of int4: `gptq` runs the float model on built-in prompts and lets rounding "
            "errors make up for each other: nearer to the float model, at the same speed."
        ),
    ] = RoundingChoice.nearest,
    prefill: Annotated[
        PrefillChoice,
        typer.Option(
            help="What reads prompts on ort-cpu: the weights as they are stored, or `int8`, a "
            "second copy in 8 bits (W8A8): about twice as fast and nearer to the float model, for "
            "a byte per weight of disk and memory."
        ),
    ] = PrefillChoice.stored,
    kv_cache_dtype: Annotated[
        KvCacheChoice,
        typer.Option(
            help="What K and V are kept in on ort-cpu: as activations are, or `int8`, a quarter of "
            "the memory: decodes 2 to 6% faster behind 200 tokens and a quarter behind 1,000, "
            "for little quality. Scales are measured on built-in prompts, by the float model."
        ),
    ] = KvCacheChoice.auto,
    layers: Annotated[
        str | None,
        typer.Option(help="Write the weights of these layers (`12-15`) again, in a folder there."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Weight files written at a time; default: as many as cores, at most 8.",
            min=1,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where a stopped export to the same --out was."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an engine folder.")] = False,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Split an LLM into engines with an exit graph between them."""
    if layers is not None:
        _require_of_stored_layers(context)
        calibration = ["none"]
    logged = _log_warnings()
    recipe = None if Path(model).is_dir() else load_recipe(model)
    board = find_preset(preset) if preset is not None else None
    target = target or (board.target if board else "ort-cpu")
    precision = precision or (board.precision if board else "int4")
    sensitive = recipe.quantisation if recipe else None
    request = ExportRequest(
        model=model,
        out=out,
        target=target,
        precision=precision,
        preset=board,
        layers_per_engine=layers_per_engine,
        max_seq_len=max_seq_len,
        calibration=_calibration(
            calibration,
            calibration_limit,
            self_texts,
            target_agreement,
            adapters,
            classifier,
            classifier_file,
            entropy=entropy,
            context_exit=context_exit,
            translators=translators,
            shortlist=_shortlist(shortlist, shortlist_tokens),
            known=recipe.exits if recipe else None,
        ),
        revision=revision,
        weights=source,
        force=force,
        storage=choose_storage(
            StorageRequest(
                block_size,
                rounding=rounding.value,
                prefill=prefill.value,
                down_block_size=down_block_size,
                kv_cache=kv_cache_dtype.value,
            ),
            int8_layers,
            sensitive,
            target,
            precision,
        ),
        resume=resume,
        workers=workers,
        layers=None if layers is None else parse_range(layers, "--layers"),
    )
    with stoppable(), terminal_reporter(quiet=quiet or json_output) as reporter:
        result = export(request, reporter)
    if json_output:
        print(json.dumps(_summary(result, logged)))
        return
    console = Console(stderr=True)
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow")
    print(
        f"{result.out}: {len(result.manifest.layer_stages)} engines, {result.manifest.precision}, "
        f"{result.seconds:.1f} s, peak {result.peak_memory_bytes / 1e6:,.0f} MB"
    )
    _print_exits(result.manifest)


def _require_of_stored_layers(context: typer.Context) -> None:
    for name in context.params:
        origin = context.get_parameter_source(name)
        if origin is not None and origin.name == "COMMANDLINE" and name not in _OF_STORED_LAYERS:
            raise UnsupportedError(
                "--layers writes weights of a finished folder again: "
                f"--{name.replace('_', '-')} does not go with it"
            )


def run_calibrate(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    calibration: CalibrationOption = ["builtin"],  # noqa: B006 - typer copies defaults
    calibration_limit: LimitOption = None,
    self_texts: SelfTextsOption = 128,
    target_agreement: AgreementOption = None,
    adapters: AdaptersOption = None,
    classifier: ClassifierOption = None,
    classifier_file: ClassifierFileOption = None,
    entropy: EntropyOption = False,
    context_exit: ContextOption = False,
    translators: TranslatorsOption = TranslatorChoice.distilled,
    shortlist: ShortlistOption = False,
    shortlist_tokens: ShortlistTokensOption = None,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Fit the exit graph of an engine folder again."""
    logged = _log_warnings()
    request = _calibration(
        calibration,
        calibration_limit,
        self_texts,
        target_agreement,
        adapters,
        classifier,
        classifier_file,
        entropy=entropy,
        context_exit=context_exit,
        translators=translators,
        shortlist=_shortlist(shortlist, shortlist_tokens),
    )
    if request is None:
        raise CalibrationError("`none` calibrates nothing: give `builtin`, `self` or task files")
    from .calibrate.pipeline import recalibrate

    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    with stoppable(), terminal_reporter(quiet=quiet or json_output) as reporter:
        manifest = recalibrate(folder, manifest, request, reporter)
    if json_output:
        print(json.dumps(_exits(manifest) | {"warnings": logged}))
        return
    _print_exits(manifest)


def _calibration(
    values: list[str],
    limit: int | None,
    self_texts: int,
    target_agreement: float | None,
    adapters: AdapterChoice | None,
    classifiers: list[ClassifierChoice] | None,
    classifier_file: Path | None,
    *,
    entropy: bool,
    context_exit: bool,
    translators: TranslatorChoice,
    shortlist: ShortlistRequest | None,
    known: ExitSettings | None = None,
) -> CalibrationRequest | None:
    """What the user asked for; what he left open is what is known to be good, or the default."""
    classifiers = classifiers or []
    if ClassifierChoice.auto in classifiers and len(classifiers) > 1:
        raise CalibrationError("--classifier auto goes with no other --classifier")
    if "none" in values:
        if len(values) > 1:
            raise CalibrationError("--calibration none goes with no other --calibration")
        return None
    defaults = known or CalibrationRequest()
    return CalibrationRequest(
        files=tuple(Path(value) for value in values if value not in ("builtin", "self")),
        builtin="builtin" in values,
        self_texts=self_texts if "self" in values else 0,
        limit=limit,
        target_agreement=target_agreement or defaults.target_agreement,
        adapters=adapters.value if adapters else defaults.adapters,
        classifiers=tuple(dict.fromkeys(c.value for c in classifiers)) or defaults.classifiers,
        classifier_file=classifier_file,
        entropy=entropy,
        context_exit=context_exit,
        translators=translators.value,
        shortlist=shortlist,
    )


def _shortlist(low_rank: bool, tokens: int | None) -> ShortlistRequest | None:
    return ShortlistRequest(tokens) if low_rank or tokens is not None else None


def _summary(result: ExportResult, logged: list[str]) -> dict[str, object]:
    return {
        "out": str(result.out),
        "source": result.manifest.source.model_dump(mode="json"),
        "target": result.manifest.target,
        "precision": result.manifest.precision,
        "engines": len(result.manifest.layer_stages),
        **_exits(result.manifest),
        "seconds": round(result.seconds, 2),
        "peak_memory_bytes": result.peak_memory_bytes,
        "warnings": [*logged, *result.warnings],
    }


def _exits(manifest: Manifest) -> dict[str, object]:
    """The exit graphs and the shortlist as they stand in the manifest."""
    fields = {"exit", "other_exits", "choice_exit", "context_exit", "combined_exit", "shortlist"}
    return manifest.model_dump(mode="json", include=fields)


def _print_exits(manifest: Manifest) -> None:
    print(f"exits: {describe_exit(manifest.exit)}")
    for name, spec in manifest.named_exits.items():
        if spec is not manifest.exit:
            print(f"exits ({name}): {describe_exit(spec)}")
    if manifest.combined_exit is not None:
        print(f"exits (combined): {describe_combined(manifest.combined_exit)}")


class _Collected(logging.Handler):
    """Keeps the messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _log_warnings() -> list[str]:
    """Shows warnings as they come, on standard error; the list of them, which fills."""
    collected = _Collected()
    log = logging.getLogger("adainfer_export")
    log.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False))
    log.addHandler(collected)
    return collected.messages
