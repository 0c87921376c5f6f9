from __future__ import annotations

import pytest

from adainfer_export.architectures import ARCHITECTURES
from adainfer_models import list_recipes, load_recipe


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.alias)
def test_every_recipe_is_complete(recipe):
    assert recipe.architecture in {entry.model_type for entry in ARCHITECTURES}
    assert recipe.licence
    for source in recipe.sources:
        assert source.kind in ("huggingface", "pypi")
        assert source.id
        assert source.revision
        if source.kind == "pypi":
            assert source.member
            assert len(source.sha256 or "") == 64


def test_lookup():
    recipe = load_recipe("llama2-7b")
    assert recipe is not None
    assert recipe.gated
    assert load_recipe("nothing") is None
