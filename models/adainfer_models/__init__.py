"""The registry of known models: one TOML recipe per alias, and the loader."""

from .recipes import (
    ExitSettings,
    Published,
    QuantisationSettings,
    Recipe,
    RecipeError,
    Source,
    list_recipes,
    load_recipe,
    parse_recipe,
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
