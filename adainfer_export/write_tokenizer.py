"""The checkpoint's tokenizer, into an engine folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.errors import ManifestError
from adainfer_runtime.manifest import FileRecord, TokenizerSpec
from adainfer_runtime.tokenizer import Tokenizer, load_tokenizer

from .errors import CheckpointError, one_line
from .sources import Checkpoint
from .stage_plan import StagePlan

__all__ = ["WrittenTokenizer", "write_tokenizer"]


@dataclass(frozen=True)
class WrittenTokenizer:
    """The manifest's entry, the files' records by relative path, and the tokenizer itself; nothing
    of a checkpoint without one.
    """

    spec: TokenizerSpec | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    loaded: Tokenizer | None = None


def write_tokenizer(folder: Path, plan: StagePlan) -> WrittenTokenizer:
    """Writes it as the plan's checkpoint has it, and reads it as the runtime will.

    Raises:
        CheckpointError: it is damaged.
    """
    if not plan.checkpoint.write_tokenizer(folder / "tokenizer"):
        return WrittenTokenizer()
    for path in _files(folder / "tokenizer"):
        _require_readable(path, plan.checkpoint)
    records = {path.relative_to(folder).as_posix(): path for path in _files(folder / "tokenizer")}
    spec = TokenizerSpec(file="tokenizer/tokenizer.json", files=tuple(sorted(records)))
    files = {name: record_file(path) for name, path in records.items()}
    try:
        loaded = load_tokenizer(folder, plan.manifest(spec, files))
    except ManifestError as error:
        raise _damaged(spec.file, plan.checkpoint, error.__cause__ or error) from error
    return WrittenTokenizer(spec, files, loaded)


def _require_readable(path: Path, checkpoint: Checkpoint) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
    except ValueError as error:  # no UTF-8, or no JSON
        raise _damaged(path.name, checkpoint, error) from error


def _damaged(name: str, checkpoint: Checkpoint, reason: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.source_name}: {Path(name).name} of the checkpoint is damaged: "
        f"{one_line(reason)}"
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())
