from __future__ import annotations

import pytest

from adainfer_export.architectures import ARCHITECTURES
from adainfer_models import RecipeError, list_recipes, load_recipe, parse_recipe

GOOD = """
architecture = "llama"
licence = "MIT"
licence_page = "https://example.org"
[[sources]]
kind = "huggingface"
id = "a/b"
revision = "main"
"""
WANTED = {
    "llama2": ["7b", "13b", "70b"],
    "opt": ["1.3b", "6.7b", "13b"],
    "tinyllama": ["1.1b"],
    "llama3": ["8b"],
    "llama3.2": ["1b", "3b"],
    "mistral": ["7b"],
    "qwen2.5": ["0.5b", "1.5b", "3b", "7b"],
    "qwen3": ["0.6b", "1.7b", "4b", "8b"],
    "gemma2": ["2b"],
    "gemma3": ["270m", "1b"],
    "phi3": ["mini"],
    "smollm2": ["135m", "360m", "1.7b"],
    "pythia": ["70m", "410m", "1b", "1.4b", "6.9b", "12b"],
    "gpt-neox": ["20b"],
}


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.alias)
def test_every_recipe_is_of_a_supported_architecture(recipe):
    assert recipe.architecture in {entry.model_type for entry in ARCHITECTURES}
    assert recipe.licence_page.startswith("https://")
    assert load_recipe(recipe.alias) == recipe
    assert recipe.num_layers
    assert recipe.hidden_size


def test_the_registry_has_the_known_models():
    wanted = {f"{family}-{size}" for family, sizes in WANTED.items() for size in sizes}
    assert wanted | {"gpt2"} <= {recipe.alias for recipe in list_recipes()}


def test_every_published_figure_says_where_it_is_from():
    figures = [figure for recipe in list_recipes() for figure in recipe.published]
    assert len(figures) > 10
    assert any(not figure.second_hand for figure in figures)
    for figure in figures:
        assert figure.source
        first_hand = "abstract" in figure.source  # the only text of the paper that was read
        assert figure.second_hand is not first_hand


def test_lookup():
    recipe = load_recipe("llama2-7b")
    assert recipe is not None
    assert recipe.gated
    assert recipe.next_step("a folder") == (
        "accept the licence at https://huggingface.co/meta-llama/Llama-2-7b-hf, log in with "
        "`hf auth login` and try again, or give a folder with the weights as --source"
    )
    assert load_recipe("nothing") is None
    assert load_recipe("../recipes") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("licence = ", "license = "), "recipe x: licence: Field required"),
        (('"huggingface"', '"ftp"'), "recipe x: sources.0.kind: Input should be 'huggingface'"),
        (('"a/b"', '"b"'), "recipe x: sources.0: Value error, a huggingface id is owner/name"),
        (('kind = "huggingface"', 'kind = "pypi"'), "a pypi source needs member and sha256"),
        (('revision = "main"', "revision = 1"), "recipe x: sources.0.revision: Input should be"),
        (('licence = "MIT"', 'licence = "MIT"\nnum_layers = 0'), "num_layers: Input should be"),
        (('licence = "MIT"', 'licence = "MIT'), "recipe x: no valid TOML"),
        (('licence = "MIT"', 'licence = "MIT"\nexit = 1'), "recipe x: exit: Extra inputs"),
        (
            ('"main"', '"main"\n[quantisation]\nint8_layers = [0]\nnote = "x"'),
            "recipe x: quantisation.int8_layers.0: Input should be greater than 0",
        ),
        (
            ('"main"', '"main"\n[quantisation]\nint8_layers = [1]'),
            "recipe x: quantisation.note: Field required",
        ),
    ],
)
def test_a_damaged_recipe_is_named(change, message):
    assert parse_recipe("x", GOOD).alias == "x"
    with pytest.raises(RecipeError) as caught:
        parse_recipe("x", GOOD.replace(*change))
    assert str(caught.value).startswith(message) or message in str(caught.value)
