"""Hugging Face repositories, from the local cache or the network."""

from __future__ import annotations

from pathlib import Path

from adainfer_runtime.errors import AdaInferError

from ..errors import (
    GatedSourceError,
    GgufSourceError,
    PickledSourceError,
    SourceError,
    UnsupportedError,
)

__all__ = ["download_snapshot"]

_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]


def download_snapshot(repository: str, revision: str) -> tuple[Path, str]:
    """Weights (safetensors only), configuration and tokenizer of a repository.

    Returns:
        the local folder, and the commit it holds.

    Raises:
        GatedSourceError: its licence was not accepted.
        GgufSourceError, PickledSourceError: it is without safetensors.
        UnsupportedError: they are no whole model of transformers.
        SourceError: not in the cache and not to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=_FILES)
    except GatedRepoError as error:
        raise GatedSourceError(
            f"{repository} is gated and this account has no access to it"
        ) from error
    except Exception as error:  # besides the hub's own errors, those of its HTTP client
        raise SourceError(
            f"{repository} cannot be downloaded and is not in the local cache"
        ) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise _without_weights(f"{repository} at revision {revision}", _names(repository, revision))
    return Path(folder), Path(folder).name


def _names(repository: str, revision: str) -> list[str]:
    """Of all files; none where the hub cannot be asked."""
    from huggingface_hub import list_repo_files

    try:
        return sorted(list_repo_files(repository, revision=revision))
    except Exception:  # as above: what is said of the repository is then less exact
        return []


def _without_weights(where: str, names: list[str]) -> AdaInferError:
    if others := [name for name in names if name.endswith(".safetensors")]:
        return UnsupportedError(
            f"{where} holds {others[0]}, but no model*.safetensors: adapters and layouts other "
            "than transformers' are not read; load (and merge) it with transformers, "
            "save_pretrained(DIR), and export DIR"
        )
    if any(name.endswith(".gguf") for name in names):
        return GgufSourceError(f"{where} holds GGUF files and no safetensors")
    return PickledSourceError(f"{where} holds no safetensors, and pickled weights are not read")
