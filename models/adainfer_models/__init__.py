"""The registry of known models: one TOML recipe per alias, and the loader."""

from .recipes import Recipe, Source, list_recipes, load_recipe

__all__ = ["Recipe", "Source", "list_recipes", "load_recipe"]
