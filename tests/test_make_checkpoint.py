"""Shapes of the tool that writes random checkpoints are those of the models."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adainfer_models import list_recipes

PATH = Path(__file__).resolve().parents[1] / "tools" / "make_checkpoint.py"
RECIPES = {recipe.alias: recipe for recipe in list_recipes()}
PARAMETERS = {  # of all weights, as published with the models
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "gemma3-270m": 268_098_176,
    "phi3-mini": 3_821_079_552,
    "llama2-7b": 6_738_415_616,
}


@pytest.fixture(scope="module")
def shapes():
    return runpy.run_path(str(PATH))["SHAPES"]


def test_shapes_are_those_of_the_aliases(shapes):
    for name, (model_type, settings) in shapes.items():
        recipe = RECIPES[name]
        assert model_type == recipe.architecture
        assert settings["num_hidden_layers"] == recipe.num_layers
        assert settings["hidden_size"] == recipe.hidden_size


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_numbers_of_parameters(shapes, name, count):
    model_type, settings = shapes[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
