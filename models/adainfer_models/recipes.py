"""Recipes are data: where a model is found, under which licence, of which architecture."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = ["Recipe", "Source", "list_recipes", "load_recipe"]


@dataclass(frozen=True)
class Source:
    """Where weights are found.

    Attributes:
        kind: `huggingface` (id, revision) or `pypi` (package, version, member, sha256).
        id: repository id, or package name.
        revision: branch or commit, or package version.
        member: path inside the package, for `pypi`.
        sha256: of the member, for `pypi`.
    """

    kind: str
    id: str
    revision: str
    member: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One alias.

    Attributes:
        gated: what a user must do before the download works, if anything.
    """

    alias: str
    architecture: str
    licence: str
    sources: tuple[Source, ...]
    gated: str | None = None


def list_recipes() -> tuple[Recipe, ...]:
    """All recipes, by alias."""
    folder = resources.files(__package__) / "recipe_files"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return tuple(_parse(name.removesuffix(".toml"), folder / name) for name in names)


def load_recipe(alias: str) -> Recipe | None:
    """The recipe of an alias, or None."""
    return next((recipe for recipe in list_recipes() if recipe.alias == alias), None)


def _parse(alias: str, path: Any) -> Recipe:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    sources = tuple(Source(**source) for source in data.pop("sources"))
    return Recipe(alias=alias, sources=sources, **data)
