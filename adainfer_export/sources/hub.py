"""Hugging Face repositories, from the local cache or the network."""

from __future__ import annotations

from pathlib import Path

from ..errors import GatedSourceError, PickledSourceError, SourceError

__all__ = ["download_snapshot"]

_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]


def download_snapshot(repository: str, revision: str) -> tuple[Path, str]:
    """Weights (safetensors only), configuration and tokenizer of a repository.

    Returns:
        the local folder, and the commit it holds.

    Raises:
        GatedSourceError: its licence was not accepted.
        PickledSourceError: it is without safetensors.
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
        raise PickledSourceError(
            f"{repository} at revision {revision} holds no safetensors, and pickled weights are "
            "not read"
        )
    return Path(folder), Path(folder).name
