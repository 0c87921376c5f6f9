"""The shortlist: something cheap proposes rows of the LM head, which are then scored exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.manifest import Manifest, ShortlistSpec
from adainfer_runtime.tasks import TaskExample

from ..cost import multiply_adds
from ..graph_builder import serialise
from ..lower import Precision, find_target, require_shortlist
from ..progress import Reporter
from .data import Parts
from .exit_files import Files
from .frequent_rows import frequent_rows
from .head import Head, read_head
from .low_rank_head import least_rank
from .request import ShortlistRequest

__all__ = ["Proposer", "with_shortlist"]

Float32 = npt.NDArray[np.float32]

_ROWS = 64
_ENOUGH_RECALL = 0.99
_POSITIONS = 24  # of every prompt
_PROMPTS = 160  # of every part: 3,840 positions, at each exit point


class Proposer(Protocol):
    """What proposes tokens."""

    @property
    def form(self) -> dict[str, int]:
        """What the manifest's `ShortlistSpec` says of it."""

    def lower(self, head: Head, precision: Precision, rows: int) -> ir.Model:
        """The stage: `hidden [1, 1, hidden_size]` to `logits [vocab]` of its own, their
        `log_sum_exp [1]`, and `candidates [rows]`, the tokens to score exactly.
        """


def with_shortlist(
    files: Files, manifest: Manifest, parts: Parts, request: ShortlistRequest, reporter: Reporter
) -> Manifest:
    """The manifest with a shortlist, where one is much cheaper than the head.

    A low-rank head has the least rank whose proposals hold the head's own token often enough on
    prompts that it was not fitted on; of frequent tokens there are as many as were asked for. The
    recall in the manifest is measured on yet other prompts, by the stage itself.
    """
    target, _, precision = find_target(manifest.target, manifest.precision)
    require_shortlist(target)
    head = read_head(files.folder, manifest)
    if head is None or head.centred or head.norm_bias is not None:
        return manifest  # more than an RMS norm and a matrix
    engine = Engine.of_manifest(files.folder, manifest)
    to_fit, to_try, to_measure = (
        _some(part) for part in (parts.adapters, parts.classifier, parts.certification)
    )
    reporter.begin("fitting the shortlist", len(to_fit) + len(to_try) + len(to_measure))
    fitted_on = _hidden(engine, to_fit, reporter)
    tried_on = _hidden(engine, to_try, reporter)
    vocabulary = manifest.model.vocab_size
    rows = min(_ROWS, vocabulary)
    proposer: Proposer | None
    if request.tokens is None:
        proposer = least_rank(head, fitted_on, tried_on, rows, _ENOUGH_RECALL)
    else:
        count = min(max(request.tokens, rows), vocabulary)
        proposer = frequent_rows(head, fitted_on, tried_on, count)
    if proposer is None:
        return manifest
    model = proposer.lower(head, precision, rows)
    path = files.save("exit/shortlist.onnx", serialise(model))
    spec = ShortlistSpec(
        file=path,
        rows=rows,
        multiply_adds=multiply_adds(model.graph) + rows * manifest.model.hidden_size,
        recall={},
        **proposer.form,
    )
    record = {path: files.written[path]}
    drafted = manifest.model_copy(
        update={"shortlist": spec, "files": dict(manifest.files) | record}
    )
    recall = _recall_by_layer(files.folder, drafted, to_measure, reporter)
    finished = spec.model_copy(update={"recall": recall})
    return drafted.model_copy(update={"shortlist": finished})


def _recall_by_layer(
    folder: Path, manifest: Manifest, examples: tuple[TaskExample, ...], reporter: Reporter
) -> dict[str, float]:
    """Share of positions at which the head's token is among the proposed, by exit layer: adapted
    hidden states there, and final ones under the number of layers.
    """
    assert manifest.shortlist is not None
    engine = Engine.of_manifest(folder, manifest)
    stage = open_session(folder / manifest.shortlist.file)
    held: dict[int, list[bool]] = {}
    for rows in _hidden_by_layer(engine, examples, reporter):
        for layer, hidden in rows.items():
            tokens = engine.backend.probe_features(hidden)[0]
            for row, token in zip(hidden, tokens, strict=True):
                (proposed,) = stage.run(["candidates"], {"hidden": row.reshape(1, 1, -1)})
                held.setdefault(layer, []).append(bool(np.isin(token, proposed)))
    return {str(layer): round(float(np.mean(hits)), 4) for layer, hits in sorted(held.items())}


def _some(examples: tuple[TaskExample, ...]) -> tuple[TaskExample, ...]:
    """A sample, in the parts' own order."""
    chosen = np.random.default_rng(0).permutation(len(examples))[:_PROMPTS]
    return tuple(examples[place] for place in sorted(chosen.tolist()))


def _hidden(engine: Engine, examples: tuple[TaskExample, ...], reporter: Reporter) -> Float32:
    found = _hidden_by_layer(engine, examples, reporter)
    return np.concatenate([hidden for rows in found for hidden in rows.values()])


def _hidden_by_layer(
    engine: Engine, examples: tuple[TaskExample, ...], reporter: Reporter
) -> Iterator[dict[int, Float32]]:
    """Of some positions of every prompt: what the probe reads, by exit layer and at the end."""
    random = np.random.default_rng(0)
    for example in examples:
        ids = engine.tokenizer.encode(example.prompt)
        at = np.sort(random.permutation(len(ids))[:_POSITIONS])
        with engine.borrow() as session:
            session.extend(ids)
            rows = {}
            for layer in engine.manifest.exit_points:
                session.advance(layer)
                hidden = session.hidden()[at]
                rows[layer] = np.stack([engine.backend.adapt(layer, row)[0] for row in hidden])
            session.complete()
            rows[engine.manifest.depth] = session.hidden()[at].copy()
        reporter.step(example.task)
        yield rows
