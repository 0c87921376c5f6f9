"""Hugging Face repositories, from the local cache or the network."""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError

__all__ = ["download_snapshot"]

_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja"]


def download_snapshot(repository: str, revision: str) -> tuple[Path, str]:
    """Weights (safetensors only), configuration and tokenizer of a repository.

    Returns:
        the local folder, and the commit it holds.

    Raises:
        SourceError: not in the cache and not to be had; the message names the next step.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=_FILES)
    except GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated: accept its licence on its model page, log in with "
            "`hf auth login`, and try again"
        ) from error
    except Exception as error:  # besides the hub's own errors, those of its HTTP client
        raise SourceError(
            f"{repository} cannot be downloaded and is not in the local cache; check the name "
            "and the network, or give a local folder instead"
        ) from error
    return Path(folder), Path(folder).name
