"""The tool for machines with a GPU, with the CPU in the GPU's place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, write_manifest

from .export.context_folder import examples, make_context_folder

PROMPTS = [example.prompt for example in examples(60, 66)]
TOOL = Path(__file__).parents[1] / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A context exit that takes every prompt."""
    made = make_context_folder(tiny("llama").folder, tmp_path_factory.mktemp("check") / "engines")
    manifest = load_manifest(made)
    always = manifest.context_exit.model_copy(update={"threshold": -1e9})
    write_manifest(made, manifest.model_copy(update={"context_exit": always}))
    return made


def rows(tool, device, cpu):
    found = tool.compare(device, cpu)
    return {"precision": "fp16", **found, "modes": tool.run_modes(device, PROMPTS)}


def test_equal_engines_pass_with_every_mode(tool, folder):
    engine = Engine.load(folder)
    row = rows(tool, engine, Engine.load(folder))
    assert (row["same_tokens"], row["hidden_relative"], row["cache_relative"]) == (1.0, 0.0, 0.0)
    assert tool.failures(row | {"modes": {}}) == []
    context = row["modes"]["context"]
    assert context["left_early"] == len(PROMPTS)
    assert 0.0 < context["layers_saved"] < 1.0
    assert {"same_first_token", "same_text"} <= set(context)


def test_depths_come_from_the_manifest(tool, tiny):
    """Four layers, and one engine that holds them all."""
    for settings in ({}, {"layers_per_engine": 4}):
        engine = tiny("llama", **settings).engine
        assert tool.compare(engine, engine)["cache_relative"] == 0.0


def test_modes_without_exits_are_marked_and_pass(tool, tiny):
    engine = tiny("llama").engine
    row = rows(tool, engine, engine)
    assert "unavailable" in row["modes"]["context"]
    assert tool.failures(row) == []


def test_what_leaves_the_tolerances_is_named(tool):
    row = {
        "precision": "fp16",
        "same_tokens": 0.5,
        "hidden_relative": 0.5,
        "cache_relative": np.nan,
        "modes": {
            "verified": {"same_text": 0.5, "same_first_token": 1.0},
            "context": {"same_text": 0.0, "same_first_token": 0.9},
            "adaptive": {"unavailable": "none"},
        },
    }
    assert tool.failures(row) == [
        "same_tokens 0.500 < 0.95",
        "hidden_relative 0.5 > 0.03",
        "cache_relative nan > 0.03",
        "verified: same_text 0.50 < 0.7",
    ]
    assert tool.failures(row | {"precision": "bf16"})[0] == "same_tokens 0.500 < 0.85"


def test_other_engines_fail(tool, tiny):
    """Another model's weights behind the same shapes."""
    found = tool.compare(tiny("llama-bias").engine, tiny("llama").engine)
    assert tool.failures({"precision": "fp16", **found, "modes": {}})


def test_bf16_is_compared_with_the_graphs_in_fp16(tool, tiny, tmp_path):
    made = tiny("llama")
    check = tool.Check(tmp_path, str(made.checkpoint), "tensorrt", "bf16", "tensorrt", 0)
    assert check.reference().manifest.precision == "fp16"
    assert [path.name for path in tmp_path.iterdir()] == ["tensorrt-fp16"]
