"""`adainfer list`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adainfer_models import (
    ExitSettings,
    Published,
    QuantisationSettings,
    Recipe,
    list_recipes,
    load_recipe,
)

from .architectures import ARCHITECTURES
from .errors import UnknownModelError
from .lower import TARGETS
from .sources.resolve import unknown_alias
from .storage import NO_LAYERS

__all__ = ["EXAMPLES", "run_list"]

_NONE_MEASURED = "none measured"
EXAMPLES = """
Examples:

    adainfer list

    adainfer list llama2-7b

    adainfer list --json
"""


def run_list(
    alias: Annotated[
        str | None, typer.Argument(help="Show all that is known of this one.", metavar="ALIAS")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List aliases, architectures, targets and precisions; or one alias with its sources, licence,
    settings that were found good and published figures.
    """
    if alias is not None:
        recipe = load_recipe(alias)
        if recipe is None:
            raise UnknownModelError(unknown_alias(alias))
        print(recipe.model_dump_json() if json_output else "\n".join(_describe(recipe)))
        return
    if json_output:
        print(json.dumps(_everything()))
        return
    console = Console()
    console.print(_recipes(list_recipes()))
    console.print("architectures:", ", ".join(entry.model_type for entry in ARCHITECTURES))
    table = Table("target", "runs on", "precisions", title="targets")
    for target in TARGETS:
        table.add_row(target.name, target.summary, ", ".join(target.precisions))
    console.print(table)


def _everything() -> dict[str, object]:
    return {
        "aliases": [recipe.model_dump(mode="json") for recipe in list_recipes()],
        "architectures": [entry.model_type for entry in ARCHITECTURES],
        "targets": [
            {"name": t.name, "runs_on": t.summary, "precisions": t.precisions} for t in TARGETS
        ],
    }


def _recipes(recipes: tuple[Recipe, ...]) -> Table:
    table = Table("alias", "architecture", "source", "licence", title="models")
    for recipe in recipes:
        gated = " (gated)" if recipe.gated else ""
        table.add_row(
            recipe.alias, recipe.architecture, recipe.sources[0].id, recipe.licence + gated
        )
    return table


def _describe(recipe: Recipe) -> Iterator[str]:
    yield ", ".join([f"{recipe.alias}: architecture {recipe.architecture}", *_sizes(recipe)])
    for source in recipe.sources:
        yield f"source: {source.kind} {source.id} at {source.revision}"
    gated = "; gated: accept it there, then `hf auth login`" if recipe.gated else ""
    yield f"licence: {recipe.licence}, {recipe.licence_page}{gated}"
    if recipe.note:
        yield f"note: {recipe.note}"
    yield f"exits: {_exits(recipe.exits) if recipe.exits else _NONE_MEASURED}"
    quantisation = recipe.quantisation
    yield f"int4: {_sensitive(quantisation) if quantisation else _NONE_MEASURED}"
    for figure in recipe.published:
        yield f"published: {_figure(figure)}"


def _sizes(recipe: Recipe) -> Iterator[str]:
    if recipe.num_layers:
        yield f"{recipe.num_layers} layers"
    if recipe.hidden_size:
        yield f"hidden size {recipe.hidden_size}"


def _exits(exits: ExitSettings) -> str:
    classifiers = " ".join(f"--classifier {kind}" for kind in exits.classifiers)
    return (
        f"--target-agreement {exits.target_agreement} --adapters {exits.adapters} {classifiers} "
        f"({exits.note})"
    )


def _sensitive(settings: QuantisationSettings) -> str:
    head = ["head"] if settings.int8_head else []
    layers = ",".join([*map(str, settings.int8_layers), *head])
    return f"--int8-layers {layers or NO_LAYERS} ({settings.note})"


def _figure(figure: Published) -> str:
    values = {
        "accuracy": figure.accuracy,
        "full model's": figure.dense_accuracy,
        "mean layers": figure.mean_layers,
        "share of compute": figure.compute_share,
        "layers saved": figure.layers_saved,
    }
    said = ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None)
    note = f"; {figure.note}" if figure.note else ""
    origin = "second-hand: " if figure.second_hand else ""
    return f"{figure.task}: {said}{note} [{origin}{figure.source}]"
