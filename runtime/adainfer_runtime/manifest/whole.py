"""The manifest of a folder: all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from ..plan_spec import PlanSpec
from .certificates import Certificate
from .exits import (
    ClassifierSpec,
    CombinedExitSpec,
    ExitPoint,
    ExitSpec,
    ShortlistSpec,
    check_shares,
)
from .model import KvGeometry, ModelSpec, Quantisation, SourceSpec
from .record import Layers, Length, Record
from .stages import FileRecord, StageSpec, TensorSpec, TokenizerSpec

__all__ = ["SCHEMA_VERSION", "Manifest"]

SCHEMA_VERSION = 5
_INTEGER_BITS = {"int4": 4, "int8": 8}  # by precision; others have no `quantisation`
_EXIT_FILES = ("adapters/", "exit/", "reports/calibration.")


class Manifest(Record):
    """Everything a runtime needs to know about an engine folder.

    `stages` is the decoder as it was cut. Where `joined` is not empty, neighbouring stages without
    an exit point between them were joined: these graphs run the layers instead. That is done
    unless the user fixed `layers_per_engine`; `most_layers_per_engine` is what the board that the
    folder is for can build. Stages that are `batched` take a position of each of
    several sequences in one pass.

    `exit` is the exit graph of mode `adaptive`, `other_exits` are further ones, each with another
    kind of classifier, that requests and evaluations may name. `choice_exit` is for choices among
    labels: it reads features over the labels' rows of the head alone. They share the adapters:
    there is at most one per exit layer. `context_exit` lets all positions but the last few stop,
    `combined_exit` looks for answer exits and context exits in one request. `plan` is what mode
    `auto` decides by.
    `shortlist` is a cheaper probe for drafts and first looks at exit points.
    """

    schema_version: int
    exporter: dict[str, str]
    source: SourceSpec
    model: ModelSpec
    target: str
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "keep"]
    quantisation: Quantisation | None = None
    max_seq_len: Length
    layers_per_engine: Layers | None = None
    most_layers_per_engine: Layers | None = None
    kv: KvGeometry
    stages: tuple[StageSpec, ...]
    pass_tensors: tuple[TensorSpec, ...] = ()
    batched: bool = False
    joined: tuple[StageSpec, ...] = ()
    exit: ExitSpec | None = None
    other_exits: tuple[ExitSpec, ...] = ()
    choice_exit: ExitSpec | None = None
    context_exit: ExitSpec | None = None
    combined_exit: CombinedExitSpec | None = None
    plan: PlanSpec | None = None
    shortlist: ShortlistSpec | None = None
    tokenizer: TokenizerSpec | None = None
    files: dict[str, FileRecord]

    @property
    def embed(self) -> StageSpec:
        """The stage that turns token ids into hidden states."""
        return next(stage for stage in self.stages if stage.kind == "embed")

    @property
    def positions(self) -> StageSpec | None:
        """The stage that computes what all layers of a pass share, where there is one."""
        return next((stage for stage in self.stages if stage.kind == "positions"), None)

    @property
    def probe(self) -> StageSpec:
        """The stage of final norm, LM head and top-2 features."""
        return next(stage for stage in self.stages if stage.kind == "probe")

    @property
    def candidates(self) -> StageSpec:
        """The probe over candidate rows of the LM head."""
        return next(stage for stage in self.stages if stage.kind == "candidates")

    @property
    def kv_fills(self) -> dict[int, StageSpec]:
        """The stages that give a skipped layer's K and V, by layer; none on some targets."""
        return {stage.first_layer: stage for stage in self.stages if stage.kind == "kv_fill"}

    @property
    def layer_stages(self) -> tuple[StageSpec, ...]:
        """The graphs that run the decoder layers, in order."""
        return self.joined or self.cut

    @property
    def cut(self) -> tuple[StageSpec, ...]:
        """The stages that hold decoder layers as they were cut, in order."""
        return tuple(stage for stage in self.stages if stage.kind == "layers")

    @property
    def joins(self) -> frozenset[str]:
        """Files of joined engines alone: not of stages that stand as they were cut."""
        files = {name for stage in self.joined for name in (stage.file, stage.wide_file) if name}
        return frozenset(
            files - {n for stage in self.stages for n in (stage.file, stage.wide_file)}
        )

    def uncalibrated(self) -> Manifest:
        """Without exit graph, and with every boundary of the cut: what calibration starts from."""
        bare = self.model_copy(
            update={
                "exit": None,
                "other_exits": (),
                "choice_exit": None,
                "context_exit": None,
                "combined_exit": None,
                "plan": None,
                "shortlist": None,
                "joined": (),
                "files": {},
            }
        )
        gone = {*self.joins, *(point.translate for point in self.context_points.values())}
        files = {
            name: record
            for name, record in self.files.items()
            if name not in gone and not name.startswith(_EXIT_FILES)
        }
        return bare.model_copy(update={"files": files})

    @property
    def exit_graphs(self) -> dict[str, ExitSpec]:
        """Exit graphs by their classifier's kind, the default first."""
        specs = (self.exit, *self.other_exits)
        return {spec.classifier.kind: spec for spec in specs if spec and spec.classifier}

    @property
    def named_exits(self) -> dict[str, ExitSpec]:
        """All that have a classifier: by its kind, then `choice` and `context`."""
        named = {"choice": self.choice_exit, "context": self.context_exit}
        further = {name: spec for name, spec in named.items() if spec and spec.classifier}
        return self.exit_graphs | further

    def with_exits(self, changed: Mapping[str, ExitSpec]) -> Manifest:
        """The same with other specs for some of its exits, by the names of `named_exits`."""
        graphs = {kind: changed.get(kind, spec) for kind, spec in self.exit_graphs.items()}
        default, *others = graphs.values() or (self.exit,)
        return self.model_copy(
            update={
                "exit": default,
                "other_exits": tuple(others),
                "choice_exit": changed.get("choice", self.choice_exit),
                "context_exit": changed.get("context", self.context_exit),
            }
        )

    @property
    def certificates(self) -> dict[str, Certificate]:
        """By the name of what they certify: see `named_exits`, and `combined`."""
        specs: dict[str, ExitSpec | CombinedExitSpec | None] = {**self.named_exits}
        specs["combined"] = self.combined_exit
        return {name: spec.certificate for name, spec in specs.items() if spec and spec.certificate}

    @property
    def classifiers(self) -> tuple[ClassifierSpec, ...]:
        """Those of all exit graphs."""
        specs = self.named_exits.values()
        return tuple(spec.classifier for spec in specs if spec.classifier)

    @property
    def context_points(self) -> dict[int, ExitPoint]:
        """The points of the context exit by layer."""
        points = self.context_exit.points if self.context_exit else ()
        return {point.exit_layer: point for point in points}

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Boundaries at which anything may stop, ascending."""
        return tuple(sorted({*self.exit_points, *self.context_points}))

    @property
    def exit_points(self) -> dict[int, ExitPoint]:
        """The answer exit points of all exit graphs by layer, ascending."""
        specs = [spec for name, spec in self.named_exits.items() if name != "context"]
        points = [point for spec in specs for point in spec.points]
        return {point.exit_layer: point for point in sorted(points, key=lambda p: p.exit_layer)}

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Layer boundaries between engines: the exit layers that are possible, L included."""
        return tuple(stage.last_layer for stage in self.layer_stages)

    @property
    def depth(self) -> int:
        """Layers that a full run executes: all, unless a baseline left some out."""
        return sum(stage.last_layer - stage.first_layer + 1 for stage in self.layer_stages)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        self._check_stages()
        self._check_sizes()
        self._check_precision()
        self._check_exits()
        return self

    def _check_stages(self) -> None:
        kinds: list[str] = [stage.kind for stage in self.stages]
        singles = ("embed", "probe", "candidates")
        if any(kinds.count(kind) != 1 for kind in singles) or "layers" not in kinds:
            raise ValueError(f"stages must hold layers, and one each of {', '.join(singles)}")
        if kinds.count("positions") != bool(self.pass_tensors):
            raise ValueError("pass_tensors and the stage `positions` go together")
        _check_layers(self.cut, self.model.num_layers)
        _check_layers(self.layer_stages, self.model.num_layers)
        fills = self.kv_fills
        if fills and fills.keys() != {*range(1, self.model.num_layers + 1)}:
            raise ValueError(f"kv_fill stages for {len(fills)} of {self.model.num_layers} layers")

    def _check_sizes(self) -> None:
        for heads in (self.kv.layer_heads, self.model.layer_attention_heads):
            if heads and len(heads) != self.model.num_layers:
                raise ValueError(f"heads of {len(heads)} layers, expected {self.model.num_layers}")
        if self.max_seq_len > self.kv.max_length:
            raise ValueError(
                f"max_seq_len {self.max_seq_len} does not fit caches of {self.kv.max_length}"
            )

    def _check_precision(self) -> None:
        bits = self.quantisation.bits if self.quantisation else None
        expected = _INTEGER_BITS.get(self.precision)
        if bits != expected:
            raise ValueError(
                f"precision {self.precision} with quantisation of {bits} bits, expected {expected}"
            )

    def _check_exits(self) -> None:
        for layer in self.exit_layers:
            if layer not in self.boundaries[:-1]:
                raise ValueError(f"exit point {layer} is no boundary between engines")
        for layer, point in self.context_points.items():
            if point.translate is None:
                raise ValueError(f"context exit point {layer} without translation")
        combined, context = self.combined_exit, self.context_exit
        if combined is None:
            return
        answer = self.exit_graphs.get(combined.answer)
        if answer is None or context is None or context.classifier is None:
            raise ValueError("combined exits without the answer or the context exits they combine")
        checks = len(answer.points) + len(context.points)
        check_shares(combined.exit_shares, len(combined.path), checks)

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Paths of all files that belong to the tokenizer."""
        return self.tokenizer.files if self.tokenizer else ()

    def referenced_files(self) -> tuple[str, ...]:
        """Every path that the manifest names, relative to the folder."""
        stages = (*self.stages, *self.joined)
        paths = [*self.files, *(stage.file for stage in stages)]
        paths += [stage.wide_file for stage in stages if stage.wide_file]
        paths += [stage.logits_file for stage in stages if stage.logits_file]
        paths += [point.adapter for point in self.exit_points.values() if point.adapter]
        paths += [point.translate for point in self.context_points.values() if point.translate]
        paths += [self.shortlist.file] if self.shortlist else []
        paths += [self.kv.scales] if self.kv.scales else []
        for classifier in self.classifiers:
            paths.append(classifier.graph)
            if classifier.reference:
                paths.append(classifier.reference)
        if self.tokenizer:
            paths += [self.tokenizer.file, *self.tokenizer.files]
        return tuple(dict.fromkeys(paths))


def _check_layers(stages: tuple[StageSpec, ...], num_layers: int) -> None:
    expected = 1
    for stage in stages:
        if stage.first_layer != expected or stage.last_layer < stage.first_layer:
            raise ValueError(f"stage {stage.name} does not continue at layer {expected}")
        expected = stage.last_layer + 1
    if expected != num_layers + 1:
        raise ValueError(f"stages hold {expected - 1} of {num_layers} layers")
