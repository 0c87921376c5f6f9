"""`adainfer certify`: new certificates from a user's own traffic."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from adainfer_runtime.commands.inspect_folder import certificate_tables
from adainfer_runtime.commands.options import DeviceOption
from adainfer_runtime.engine_folder import load_manifest

from .errors import CalibrationError
from .progress import terminal_reporter

if TYPE_CHECKING:
    from .calibrate.fresh_prompts import FreshPrompts
    from .calibrate.recertify import Renewal
    from .calibrate.recertify_texts import TextRenewal

__all__ = ["EXAMPLES", "certify"]

EXAMPLES = """
Examples:

    adainfer certify engines/ --prompts traffic.jsonl

    adainfer certify engines/ --prompts traffic.jsonl --device cuda

    adainfer run engines/ --mode adaptive --level 0.02 --max-new-tokens 1 --prompt "…"

    adainfer certify engines/ --texts traffic.jsonl --max-new-tokens 64

    adainfer run engines/ --mode adaptive --level 0.1 --max-new-tokens 64 --prompt "…"

    adainfer run engines/ --mode context --kv-policy translated --level 0.1 --prompt "…"
"""


class CertifiedMode(str, Enum):
    """Values of --mode."""

    adaptive = "adaptive"
    context = "context"


class Against(str, Enum):
    """Values of --against."""

    model = "model"
    gold = "gold"


def certify(
    folder: Annotated[Path, typer.Argument(help="Engine folder.", metavar="DIR")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Task file (JSON lines with `prompt`) to certify answers of one token on: "
            "repeatable."
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            help="The same, to certify texts of modes adaptive (kv-policy deferred) and context "
            "(translated) on: the share of their tokens that differ from the full model's text; "
            "repeatable."
        ),
    ] = None,
    mode: Annotated[
        CertifiedMode | None,
        typer.Option(help="Of --texts: certify this mode's alone. Default: those the engine has."),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(help="Of --texts: tokens of a text. Shorter ones are certified with it."),
    ] = 64,
    against: Annotated[
        Against,
        typer.Option(
            help="Of --prompts: `model`: exits must give the full model's answer. `gold`: they "
            "must not spoil an answer that the full model has right."
        ),
    ] = Against.model,
    device: DeviceOption = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the certificates.")] = False,
) -> None:
    """Certify the exits of an engine folder on prompts like those that will be asked.

    Texts take one generation per prompt; in mode context one more per exit point, in mode adaptive
    one more for each threshold that makes a difference.
    """
    from .calibrate.recertify import recertify
    from .calibrate.recertify_texts import TEXT_MODES, recertify_texts

    if not prompts and not texts:
        raise CalibrationError("nothing to certify on: give --prompts FILE, --texts FILE, or both")
    if against is Against.gold and not prompts:
        raise CalibrationError("--against gold speaks of answers: it goes with --prompts")
    if mode is not None and not texts:
        raise CalibrationError("--mode speaks of texts: it goes with --texts")
    modes = TEXT_MODES if mode is None else (mode.value,)
    answers: Renewal | None = None
    written: TextRenewal | None = None
    with terminal_reporter(quiet=quiet or json_output) as reporter:
        if prompts:
            answers = recertify(folder, prompts, reporter, against.value, device=device)
        if texts:
            written = recertify_texts(folder, texts, max_new_tokens, reporter, modes, device=device)
    if json_output:
        print(json.dumps(_answers_json(answers) | _texts_json(written)))
        return
    _warn_of_answers(answers)
    _warn_of_texts(written)
    for table in certificate_tables(load_manifest(folder)):
        Console().print(table)


def _answers_json(renewal: Renewal | None) -> dict[str, Any]:
    if renewal is None:
        return {}
    certificates = {
        name: certificate.model_dump(mode="json")
        for name, certificate in renewal.manifest.certificates.items()
    }
    return {"certificates": certificates, **renewal.prompts.left_out}


def _texts_json(renewal: TextRenewal | None) -> dict[str, Any]:
    if renewal is None:
        return {}
    certificates = {
        mode: certificate.model_dump(mode="json")
        for mode, certificate in renewal.certificates.items()
    }
    return {"texts": {"certificates": certificates, **renewal.prompts.left_out}}


def _warn_of_answers(renewal: Renewal | None) -> None:
    if renewal is not None:
        _warn(renewal.prompts, "the engine does not take such long ones")


def _warn_of_texts(renewal: TextRenewal | None) -> None:
    if renewal is not None:
        not_taken = "of one token, or too long for the engine with the new tokens"
        _warn(renewal.prompts, not_taken)


def _warn(prompts: FreshPrompts, not_taken: str) -> None:
    console = Console(stderr=True)
    for count, why in (
        (prompts.fitted_on, "the exits were fitted on them, or on what they ask"),
        (prompts.not_taken, not_taken),
        (prompts.asked_twice, "another one asks the same, and one is certified with"),
    ):
        if count:
            console.print(f"warning: {count} prompts left out: {why}", style="yellow")
