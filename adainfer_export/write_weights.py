"""Writes the data files of an export: all at once, or layer by layer behind what rounds them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from threadpoolctl import threadpool_limits

from adainfer_runtime.tokenizer import Tokenizer

from .errors import UnsupportedError
from .float_decoder import builtin_prompts
from .gptq import ErrorFeedback
from .input_moments import InputMoments
from .journal import Journal, Written
from .layout import DataPlan
from .progress import Reporter
from .sources import Checkpoint
from .stage_plan import StagePlan
from .weights import Blocked, Columns, Feedbacks
from .writer import DataWriter

__all__ = ["write_weights"]


def write_weights(
    plan: StagePlan,
    files: Sequence[DataPlan],
    journal: Journal,
    source: Checkpoint,
    tokenizer: Tokenizer | None,
    workers: int,
    reporter: Reporter,
) -> dict[str, Written]:
    """Writes data files of a planned export, or finds them finished; by path.

    Args:
        files: of the plan's.
        journal: where finished ones are noted.
        source: the checkpoint under its own names, of which the plan has a view.
        tokenizer: the checkpoint's, which `--rounding gptq` needs.
        workers: files that are written at a time.

    Raises:
        UnsupportedError: `--rounding gptq` without a tokenizer, or not of this model.
        CheckpointError: see `DataWriter.write_all`.
    """
    root = plan.layout.root
    writer = DataWriter(root, plan.checkpoint, journal)
    reporter.begin("writing weights", len(files))

    def on_file(file: str) -> None:
        reporter.step(plan.progress_of(file))

    if plan.precision.rounding == "nearest":
        return writer.write_all(files, workers, on_file)
    if tokenizer is None:
        raise UnsupportedError(
            "--rounding gptq runs the model on prompts, and the checkpoint has no tokenizer; "
            "export with --rounding nearest"
        )
    wanted = _unfinished(files, writer)
    written: dict[str, Written] = {}
    # Within the folder: what a kill leaves of it goes with the next export's start.
    # BLAS on one thread: sums, and so codes, are the same on any number of cores.
    with (
        threadpool_limits(1, user_api="blas"),
        tempfile.TemporaryDirectory(prefix="rounding-", dir=root) as scratch,
    ):
        moments = InputMoments(source, plan.precision, plan.max_seq_len, Path(scratch))
        feedbacks = moments.feedbacks(builtin_prompts(tokenizer, plan.max_seq_len), wanted)
        for ready, known in _as_they_come(files, feedbacks, moments.tensors & wanted):
            written |= replace(writer, feedbacks=known).write_all(ready, workers, on_file)
    return written


def _unfinished(files: Sequence[DataPlan], writer: DataWriter) -> frozenset[str]:
    """Tensors in 4 bits of files that no killed export has finished."""
    names: set[str] = set()
    for file in files:
        if writer.journal.find(file.file, writer.root) is None:
            names |= _in_four_bits(file)
    return frozenset(names)


def _in_four_bits(file: DataPlan) -> frozenset[str]:
    return frozenset(
        name
        for group in file.groups
        if isinstance(expr := group[0], Blocked | Columns)
        and expr.blocks.bits == 4
        and not expr.blocks.kept
        for name in expr.parts
    )


def _as_they_come(
    files: Sequence[DataPlan],
    feedbacks: Iterable[tuple[tuple[str, ...], ErrorFeedback]],
    expected: frozenset[str],
) -> Iterator[tuple[list[DataPlan], Feedbacks]]:
    """Each file as soon as what rounds all of its tensors is there, which is then given up: files
    are written before the next step is asked for.
    """
    waiting = [(file, _in_four_bits(file) & expected) for file in files]
    held: dict[str, ErrorFeedback] = {}
    coming = iter(feedbacks)
    while True:
        ready = [file for file, needed in waiting if needed <= held.keys()]
        if ready:
            yield ready, held
        waiting = [(file, needed) for file, needed in waiting if not needed <= held.keys()]
        needed_later = frozenset[str]().union(*(needed for _, needed in waiting))
        for name in held.keys() - needed_later:
            del held[name]
        found = next(coming, None)
        if found is None:
            return
        held |= dict.fromkeys(*found)
        del found
