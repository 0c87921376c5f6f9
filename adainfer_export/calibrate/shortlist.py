"""The shortlist: something cheap proposes rows of the LM head, which are then scored exactly.

What it is worth as a probe is measured: its recall, and its agreement with the full model's
answers, by which drafts are planned. It has no threshold of its own: an exit that it sees is
confirmed by the full probe, whose threshold keeps the agreement; one that had to keep it through
the shortlist alone would only lose exits. SmolLM2, int4, 160 held-out prompts, wanted 0.985: with
4,096 frequent tokens .16 of them leave instead of .34, and an answer position costs as much as 38.5
layers instead of 37.9, looks and probes included (37.8 by the best threshold there is); with a low
rank of 128, 39.8 instead of 39.3.
"""

from __future__ import annotations

import logging
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
from .proposals import NoProposerError
from .request import ShortlistRequest

__all__ = ["Proposer", "with_shortlist"]

Float32 = npt.NDArray[np.float32]

_LOG = logging.getLogger(__name__)
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
    """The manifest with a shortlist; where none can be made it stays as it is, and a warning says
    why.
    """
    target, _, precision = find_target(manifest.target, manifest.precision)
    require_shortlist(target)
    try:
        return _with_shortlist(files, manifest, parts, request, precision, reporter)
    except NoProposerError as reason:
        _LOG.warning("no shortlist was made: %s", reason)
        return manifest


def _with_shortlist(
    files: Files,
    manifest: Manifest,
    parts: Parts,
    request: ShortlistRequest,
    precision: Precision,
    reporter: Reporter,
) -> Manifest:
    """What the manifest says of it is measured on prompts that nothing was fitted or tried on, by
    the stage itself.
    """
    head = read_head(files.folder, manifest)
    if head is None:
        raise NoProposerError(
            "what this model has behind its layers is more than a norm and a matrix, or its head "
            "is stored in blocks that are not read"
        )
    engine = Engine.of_manifest(files.folder, manifest)
    to_fit, to_try, to_measure = (
        _some(part) for part in (parts.adapters, parts.classifier, parts.certification)
    )
    reporter.begin("fitting the shortlist", len(to_fit) + len(to_try) + len(to_measure))
    fitted_on = _hidden(engine, to_fit, reporter)
    tried_on = _hidden(engine, to_try, reporter)
    vocabulary = manifest.model.vocab_size
    rows = min(_ROWS, vocabulary)
    proposer = _proposer(head, request, fitted_on, tried_on, rows)
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
    recall, agreement = _measure(files.folder, drafted, to_measure, reporter)
    finished = spec.model_copy(update={"recall": recall, "agreement": agreement})
    return drafted.model_copy(update={"shortlist": finished})


def _proposer(
    head: Head, request: ShortlistRequest, fitted_on: Float32, tried_on: Float32, rows: int
) -> Proposer:
    """A low-rank head has the least rank whose proposals hold the head's own token often enough on
    prompts that it was not fitted on; of frequent tokens there are as many as were asked for.
    """
    if request.tokens is None:
        return least_rank(head, fitted_on, tried_on, rows, _ENOUGH_RECALL)
    count = min(max(request.tokens, rows), len(head.weight))
    return frequent_rows(head, fitted_on, tried_on, count)


def _measure(
    folder: Path, manifest: Manifest, examples: tuple[TaskExample, ...], reporter: Reporter
) -> tuple[dict[str, float], dict[str, float]]:
    """`recall` and `agreement` as `ShortlistSpec` has them."""
    assert manifest.shortlist is not None
    engine = Engine.of_manifest(folder, manifest)
    stage = open_session(folder / manifest.shortlist.file)
    held: dict[int, list[bool]] = {}
    agrees: dict[int, list[bool]] = {}
    for rows in _hidden_by_layer(engine, examples, reporter):
        answer = engine.backend.probe(rows[manifest.depth][-1]).token
        for layer, hidden in rows.items():
            tokens = engine.backend.probe_features(hidden)[0]
            for row, token in zip(hidden, tokens, strict=True):
                (proposed,) = stage.run(["candidates"], {"hidden": row.reshape(1, 1, -1)})
                held.setdefault(layer, []).append(bool(np.isin(token, proposed)))
            if layer < manifest.depth:
                token = engine.backend.shortlist(hidden[-1]).token
                agrees.setdefault(layer, []).append(token == answer)
    return _shares(held), _shares(agrees)


def _shares(hits: dict[int, list[bool]]) -> dict[str, float]:
    return {str(layer): round(float(np.mean(found)), 4) for layer, found in sorted(hits.items())}


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
    """Of some positions of every prompt, its last one at the end: what the probe reads, by exit
    layer and after all layers.
    """
    random = np.random.default_rng(0)
    for example in examples:
        ids = engine.tokenizer.encode(example.prompt)
        last = len(ids) - 1
        at = np.append(np.sort(random.permutation(last)[: _POSITIONS - 1]), last)
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
