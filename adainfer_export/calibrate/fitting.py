"""The first three parts of the data: adapters, classifiers, and which exit graphs to take."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.tasks import TaskExample

from ..errors import CalibrationError
from ..progress import Reporter
from .affine import AffineMap
from .classifiers import CLASSIFIERS, Entry, ExitClassifier, own_entry, require_domains
from .data import Parts, check_examples, load_examples, split_parts
from .distil import distil_adapters
from .distilled import KeepLayer, keep_nothing
from .head import read_head
from .kept import KeptSteps
from .low_rank import AdapterBudget, choose_ranks
from .predictions import Predictions, predict_candidates, predict_layers
from .request import CalibrationRequest
from .scored import CHOICE
from .select import select_classifiers
from .self_text import write_texts
from .traces import (
    AnswerTraces,
    PromptTraces,
    candidate_layers,
    candidates_of,
    fits,
    trace_answers,
    trace_prompts,
)
from .trust import Trust, cross_fit, fit_trust, with_trust

__all__ = [
    "Fitted",
    "FittedGraph",
    "TracedParts",
    "check_inputs",
    "classifier_entries",
    "fit_graphs",
    "fit_traced",
]

_LOG = logging.getLogger(__name__)
_RIDGE = 0.01
_LEAST_CHOICES = 30  # own prompts with labels, in every part


@dataclass(frozen=True)
class FittedGraph:
    """An exit graph without its threshold.

    Attributes:
        name: the classifier's kind; `CHOICE` where features are over a choice's candidates.
        selection: predictions of the selection part.
    """

    name: str
    classifier: ExitClassifier
    selection: Predictions


@dataclass(frozen=True)
class Fitted:
    """Everything but thresholds and certificates.

    Attributes:
        skipped: prompts that are longer than the engine takes.
        block_influence: see `PromptTraces`.
        selection: predictions of the selection part at all candidate layers.
        graphs: those that seem to pay, the default first, the one for choices last.
    """

    parts: Parts
    skipped: int
    adapters: Mapping[int, tuple[AffineMap, Trust]]
    block_influence: Mapping[int, float]
    selection: Predictions
    graphs: tuple[FittedGraph, ...]

    def of_graphs(self, names: Collection[str]) -> Fitted:
        """The same with the graphs of these names alone."""
        return replace(self, graphs=tuple(graph for graph in self.graphs if graph.name in names))


@dataclass(frozen=True)
class FittedMaps:
    """What is fitted to the first part of the data; `block_influence`: see `PromptTraces`."""

    adapters: Mapping[int, AffineMap]
    block_influence: Mapping[int, float]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name, to be kept."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "influence_layers": np.array(list(self.block_influence), np.int64),
            "influence": np.array(list(self.block_influence.values())),
            "layers": np.array(list(self.adapters), np.int64),
        }
        for layer, adapter in self.adapters.items():
            arrays |= adapter.arrays(str(layer))
        return arrays

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> FittedMaps:
        """What `arrays` gave."""
        adapters = {
            layer: AffineMap.of_arrays(arrays, str(layer)) for layer in arrays["layers"].tolist()
        }
        influence = zip(
            arrays["influence_layers"].tolist(), arrays["influence"].tolist(), strict=True
        )
        return cls(adapters, dict(influence))


@dataclass(frozen=True)
class TracedParts:
    """What the first three parts of the data look like inside the model."""

    prompts: PromptTraces
    classifier: AnswerTraces
    selection: AnswerTraces


def fit_graphs(
    folder: Path,
    manifest: Manifest,
    request: CalibrationRequest,
    reporter: Reporter,
    kept: KeptSteps,
) -> Fitted:
    """Traces prompts through all layers and fits everything that is fitted.

    Raises:
        TaskFileError: a task file cannot be read.
        CalibrationError: too few usable prompts, or no room for an exit point.
    """
    _check_classifier(request, manifest.target)  # before any work: a file may be wrong
    engine = Engine.of_manifest(folder, manifest)
    parts, skipped = _usable_parts(engine, request)
    if not candidate_layers(engine):
        raise CalibrationError(
            "no layer boundary in the upper half of the model to exit at: export with fewer "
            "--layers-per-engine"
        )
    if request.self_texts:
        texts = write_texts(engine, request.self_texts, request.seed, reporter)
        parts = replace(parts, adapters=(*parts.adapters, *texts))
    held_out = parts.held_out
    reporter.begin("tracing answers", len(parts.classifier) + len(parts.selection))
    classifier = trace_answers(
        engine, parts.classifier, reporter, in_context=True, held_out=held_out
    )
    selection = trace_answers(engine, parts.selection, reporter, in_context=False)
    _check_answers(selection)

    def fit_maps() -> dict[str, npt.NDArray[Any]]:
        reporter.begin("tracing prompts", len(parts.adapters))
        prompts = trace_prompts(engine, parts.adapters, reporter, request.seed, held_out=held_out)
        keep = kept.layers("adapters")
        adapters = _fit_adapters(folder, engine, prompts, request, reporter, keep)
        return FittedMaps(adapters, prompts.block_influence).arrays()

    maps = FittedMaps.of_arrays(kept.arrays("adapters", fit_maps))
    return _fit_exits(engine, parts, maps, classifier, selection, request, reporter, skipped)


def fit_traced(
    folder: Path,
    engine: Engine,
    parts: Parts,
    traced: TracedParts,
    request: CalibrationRequest,
    reporter: Reporter,
    skipped: int = 0,
) -> Fitted:
    """Everything that is fitted, on prompts that have been traced; see `fit_graphs`."""
    _check_answers(traced.selection)
    adapters = _fit_adapters(folder, engine, traced.prompts, request, reporter, keep_nothing)
    maps = FittedMaps(adapters, traced.prompts.block_influence)
    classifier, selection = traced.classifier, traced.selection
    return _fit_exits(engine, parts, maps, classifier, selection, request, reporter, skipped)


def _fit_exits(
    engine: Engine,
    parts: Parts,
    maps: FittedMaps,
    traces: AnswerTraces,
    new: AnswerTraces,
    request: CalibrationRequest,
    reporter: Reporter,
    skipped: int,
) -> Fitted:
    """Classifiers over adapters, fitted on `traces` and chosen by `new`."""
    entries, adapters = classifier_entries(request), maps.adapters
    fit, selection = (
        predict_layers(engine, some, adapters, entropy=request.entropy) for some in (traces, new)
    )
    trusts: dict[int, Trust] = {}
    if adapters:  # plain AdaInfer reads nothing off the hidden state but its prediction
        trusts = fit_trust(traces, fit)
        fit, selection = cross_fit(traces, fit), with_trust(new, selection, trusts)
    reporter.begin("choosing exits", 2)
    target, seed = request.target_agreement, request.seed
    found = select_classifiers(fit, selection, target, seed, entries)
    graphs = _choose_graphs(found, selection, entries, request)
    reporter.step()
    if _enough_choices(engine, parts):
        fit = predict_candidates(engine, traces, adapters, fit)
        choices = predict_candidates(engine, new, adapters, selection)
        best = tuple(select_classifiers(fit, choices, target, seed, entries).values())[:1]
        graphs += tuple(FittedGraph(CHOICE, classifier, choices) for classifier in best)
    reporter.step()
    graphs = _within_budget(engine.manifest, graphs, adapters)
    with_trusts = {layer: (adapter, trusts[layer]) for layer, adapter in adapters.items()}
    return Fitted(parts, skipped, with_trusts, maps.block_influence, selection, graphs)


def _within_budget(
    manifest: Manifest, graphs: tuple[FittedGraph, ...], adapters: Mapping[int, AffineMap]
) -> tuple[FittedGraph, ...]:
    """Those whose adapters, stored once for all graphs, are small beside the model."""
    budget, kept = AdapterBudget.of(manifest), list[FittedGraph]()
    for graph in graphs:
        layers = {layer for one in (*kept, graph) for layer in one.classifier.layers}
        if budget.takes_all(adapters[layer] for layer in layers if layer in adapters):
            kept.append(graph)
        else:
            _LOG.warning(
                "exit graph %s is left out: with its adapters, all of them would take more than "
                "5%% of the model",
                graph.name,
            )
    return tuple(kept)


def _usable_parts(engine: Engine, request: CalibrationRequest) -> tuple[Parts, int]:
    examples = load_examples(request)
    _check_labels(engine, examples)
    usable = [example for example in examples if fits(engine, example)]
    skipped = len(examples) - len(usable)
    if skipped * 2 > len(examples):
        raise CalibrationError(
            f"{skipped} of {len(examples)} prompts are longer than this engine's "
            f"{engine.manifest.max_seq_len} positions: export with a larger --max-seq-len"
        )
    if skipped:
        _LOG.warning(
            "%d of %d prompts are left out: they are longer than this engine's %d positions",
            skipped,
            len(examples),
            engine.manifest.max_seq_len,
        )
    return split_parts(usable), skipped


def _check_labels(engine: Engine, examples: list[TaskExample]) -> None:
    for example in examples:
        tokens = engine.label_tokens(example.prompt, example.labels or ())
        for label, found in zip(example.labels or (), tokens, strict=True):
            if not any(engine.tokenizer.has_text(token) for token in found):
                raise CalibrationError(
                    f"task {example.task}: the label {label!r} is no token of this model's"
                )


def _check_answers(traces: AnswerTraces) -> None:
    """A constant answer must not pass for a good exit: nothing could be told from it."""
    if len(np.unique(traces.token)) == 1:
        raise CalibrationError(
            f"the model gives one and the same answer to all {len(traces.token)} prompts that "
            "exits would be judged on: give prompts with different answers"
        )


def _fit_adapters(
    folder: Path,
    engine: Engine,
    prompts: PromptTraces,
    request: CalibrationRequest,
    reporter: Reporter,
    keep: KeepLayer,
) -> dict[int, AffineMap]:
    if request.adapters == "none":
        return {}
    fitted = {layer: moment.solve(_RIDGE) for layer, moment in prompts.moments.items()}
    distilled = request.adapters == "distilled"
    head = read_head(folder, engine.manifest) if distilled else None
    if head is not None:
        answers, seed = prompts.answers, request.seed
        fitted = distil_adapters(engine, head, answers, fitted, reporter, seed, keep)
    elif distilled:
        _LOG.warning(
            "adapters and translators stay ridge regressions: the head of this model is more than "
            "a norm and a matrix, and is not distilled through"
        )
    return choose_ranks(engine, fitted, prompts, reporter)


def check_inputs(request: CalibrationRequest, target: str) -> None:
    """Reads the files that a request names, for callers that have long work to do before it.

    Raises:
        TaskFileError: a task file cannot be read.
        CalibrationError: too few prompts, or a classifier's file does not keep the contract, or
            the target does not run its operators.
    """
    _check_classifier(request, target)
    check_examples(request)


def _check_classifier(request: CalibrationRequest, target: str) -> None:
    classifier_entries(request)
    if request.classifier_file:
        require_domains(request.classifier_file, target)


def classifier_entries(request: CalibrationRequest) -> dict[str, Entry]:
    """The kinds to try, in the order asked for."""
    if request.classifiers == ("auto",):
        return dict(CLASSIFIERS)
    own = {"own": own_entry(request.classifier_file)} if request.classifier_file else {}
    return own | {kind: CLASSIFIERS[kind] for kind in request.classifiers}


def _choose_graphs(
    found: Mapping[str, ExitClassifier],
    selection: Predictions,
    entries: Mapping[str, Entry],
    request: CalibrationRequest,
) -> tuple[FittedGraph, ...]:
    asked = [kind for kind in entries if kind in found]
    best_alone = request.classifiers == ("auto",) or not asked
    chosen = tuple(found)[:1] if best_alone else tuple(asked)
    return tuple(FittedGraph(kind, found[kind], selection) for kind in chosen)


def _enough_choices(engine: Engine, parts: Parts) -> bool:
    return all(
        sum(bool(candidates_of(engine, example)) for example in part) >= _LEAST_CHOICES
        for part in (parts.classifier, parts.selection, parts.certification)
    )
