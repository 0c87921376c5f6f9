"""Recipes are data: where a model is found, under which licence, and what is known of its exits."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

__all__ = [
    "ExitSettings",
    "Published",
    "QuantisationSettings",
    "Recipe",
    "RecipeError",
    "Source",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
]

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class RecipeError(ValueError):
    """A recipe file is not what the schema asks for; the message names file, field and fault."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Record):
    """Where weights are found.

    Attributes:
        kind: `huggingface` (id, revision) or `pypi` (package, version, member, sha256).
        id: repository id, or package name.
        revision: branch or commit, or package version.
        member: path inside the package, for `pypi`.
        sha256: of the member, for `pypi`.
    """

    kind: Literal["huggingface", "pypi"]
    id: Text
    revision: Text
    member: Text | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Source:
        if self.kind == "pypi" and not (self.member and self.sha256):
            raise ValueError("a pypi source needs member and sha256")
        if self.kind == "huggingface" and self.id.count("/") != 1:
            raise ValueError(f"a huggingface id is owner/name, found {self.id!r}")
        return self


class ExitSettings(_Record):
    """Settings of the calibration that were found good; the export's defaults for this alias.

    Attributes:
        note: what was measured, and where.
    """

    target_agreement: Share
    classifiers: tuple[Literal["svm", "crf", "logistic", "boosting", "threshold"], ...] = ("svm",)
    adapters: Literal["distilled", "ridge", "none"] = "distilled"
    note: Text


class QuantisationSettings(_Record):
    """Layers to which 4 bits were found to be too few; the export's defaults for this alias in
    int4. None may be an answer too: that nothing is gained.

    Attributes:
        int8_layers: sensitive layers (1-based) that get 8 bits.
        int8_head: the LM head too, and with it a tied embedding.
        note: what was measured, and where.
    """

    int8_layers: tuple[PositiveInt, ...] = ()
    int8_head: bool = False
    note: Text


class Published(_Record):
    """A figure of the paper's method that somebody published for this model.

    Attributes:
        accuracy, dense_accuracy: in percent, with exits and of the full model.
        mean_layers: executed on average.
        compute_share: operations executed, as a share of the full model's.
        layers_saved: share of layers not executed.
        source: where the figure stands.
        second_hand: read in somebody else's work, not in the paper itself.
    """

    task: Text
    accuracy: Annotated[float, Field(ge=0, le=100)] | None = None
    dense_accuracy: Annotated[float, Field(ge=0, le=100)] | None = None
    mean_layers: Annotated[float, Field(gt=0)] | None = None
    compute_share: Share | None = None
    layers_saved: Share | None = None
    source: Text
    second_hand: bool
    note: Text | None = None


class Recipe(_Record):
    """One alias.

    Attributes:
        architecture: `model_type` of the configuration.
        num_layers, hidden_size: by which weights are known to be this model's.
        licence_page: where the licence stands, and is accepted where the weights are gated.
        gated: weights are to be had only by users who accepted the licence.
        note: what a user should know before the download.
    """

    alias: Text
    architecture: Text
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    licence: Text
    licence_page: Text
    gated: bool = False
    note: Text | None = None
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    exits: ExitSettings | None = None
    quantisation: QuantisationSettings | None = None
    published: tuple[Published, ...] = ()

    def next_step(self, weights: str) -> str:
        """What to do where no source can be fetched.

        Args:
            weights: what can be read instead: "a folder", "a folder or .gguf file".
        """
        give = f"give {weights} with the weights as --source"
        if self.gated:
            return (
                f"accept the licence at {self.licence_page}, log in with `hf auth login` and try "
                f"again, or {give}"
            )
        return f"try again with a network, or {give}"


def list_recipes() -> tuple[Recipe, ...]:
    """All recipes, by alias.

    Raises:
        RecipeError: one of the files is damaged.
    """
    folder = resources.files(__package__) / "recipe_files"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return tuple(_read(folder / name, name.removesuffix(".toml")) for name in names)


def load_recipe(alias: str) -> Recipe | None:
    """The recipe of an alias, or None.

    Raises:
        RecipeError: its file is damaged.
    """
    folder = resources.files(__package__) / "recipe_files"
    if alias not in {entry.name.removesuffix(".toml") for entry in folder.iterdir()}:
        return None
    return _read(folder / f"{alias}.toml", alias)


def parse_recipe(alias: str, content: str) -> Recipe:
    """A recipe file's content (TOML).

    Raises:
        RecipeError: no TOML, or not of this schema.
    """
    try:
        return Recipe.model_validate({"alias": alias} | tomllib.loads(content))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {alias}: no valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(f"recipe {alias}: {place}: {first['msg']}") from error


def _read(path: Any, alias: str) -> Recipe:
    return parse_recipe(alias, path.read_text(encoding="utf-8"))
