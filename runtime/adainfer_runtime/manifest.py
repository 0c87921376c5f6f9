"""The engine folder's manifest: the only contract between the compiler and the runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .plan_spec import PlanSpec
from .text_certificate_spec import TextCertificate

__all__ = [
    "CLASSIFIER_INPUTS",
    "SCHEMA_VERSION",
    "Certificate",
    "CertificateGroup",
    "CertificateLevel",
    "ClassifierInput",
    "ClassifierSpec",
    "CombinedExitSpec",
    "ExitPoint",
    "ExitSpec",
    "FileRecord",
    "KvGeometry",
    "Manifest",
    "ModelSpec",
    "Quantisation",
    "ShortlistSpec",
    "SourceFile",
    "SourceSpec",
    "StageSpec",
    "TensorSpec",
    "TokenizerSpec",
]

SCHEMA_VERSION = 5
ElementType = Literal["float32", "float16", "bfloat16"]
ClassifierInput = Literal["token", "top_prob", "gap", "depth", "trust", "state"]
CLASSIFIER_INPUTS: tuple[ClassifierInput, ...] = get_args(ClassifierInput)
_EXIT_FILES = ("adapters/", "exit/", "reports/calibration.")

# Bounds that no model comes near: beyond them buffers cannot even be asked for.
_Layers = Annotated[int, Field(gt=0, le=1 << 16)]
_Width = Annotated[int, Field(gt=0, le=1 << 24)]
_Length = Annotated[int, Field(gt=0, le=1 << 24)]
_Count = Annotated[int, Field(ge=0, le=1 << 62)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFile(_Record):
    """One file of the checkpoint that was exported."""

    name: str
    bytes: _Count
    sha256: str


class SourceSpec(_Record):
    """Where the weights came from."""

    kind: Literal["huggingface", "folder", "gguf", "onnx"]
    id: str
    revision: str | None = None
    files: tuple[SourceFile, ...] = ()


class ModelSpec(_Record):
    """The decoder's shape. `num_layers` counts decoder blocks; widths are in elements.

    `layer_attention_heads` are each layer's query heads where layers differ, else empty.
    """

    architecture: str
    num_layers: _Layers
    hidden_size: _Width
    vocab_size: _Width
    num_attention_heads: _Width
    layer_attention_heads: tuple[_Width, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def attention_heads(self, layer: int) -> int:
        """Query heads of a layer (1-based)."""
        heads = self.layer_attention_heads
        return heads[layer - 1] if heads else self.num_attention_heads


class KvGeometry(_Record):
    """One K and one V buffer per layer.

    `bnsh`: `[1, heads, max_length, head_dim]`, which a stage reads whole and writes in place.
    `prefix`: `[1, 1 + max_length, row_elements]`, position after position, so that what is filled
    is contiguous: a stage reads a view of it as its past, and writes the new rows right behind,
    where the runtime points its output to. Row 0 is a sink of zeros that masks hide: no view is
    ever empty. Rows are padded from `num_heads * head_dim` elements to a multiple of 256 bytes.

    `layer_heads` are each layer's heads where layers differ; else empty: `num_heads` in all.
    """

    layout: Literal["bnsh", "prefix"] = "bnsh"
    dtype: ElementType = "float32"
    num_heads: _Width
    layer_heads: tuple[_Width, ...] = ()
    head_dim: _Width
    max_length: _Length
    row_elements: _Width | None = None

    @model_validator(mode="after")
    def _padded(self) -> KvGeometry:
        width = self.num_heads * self.head_dim
        if (self.layout == "prefix") != (self.row_elements is not None):
            raise ValueError("row_elements belongs to the layout prefix, and to no other")
        if self.row_elements is not None and self.row_elements < width:
            raise ValueError(f"row_elements {self.row_elements} is less than {width}")
        if max(self.layer_heads, default=0) > self.num_heads:
            raise ValueError(f"layer_heads has more than the {self.num_heads} of num_heads")
        return self

    def heads(self, layer: int) -> int:
        """Heads of K and V of a layer (1-based)."""
        return self.layer_heads[layer - 1] if self.layer_heads else self.num_heads


class TensorSpec(_Record):
    """A tensor that the stage `positions` computes once per pass for all layer stages.

    Dimensions are numbers, `rows` (positions of the pass) or `keys` (positions that it attends to,
    the sink included).
    """

    name: str
    dtype: ElementType | Literal["bool"]
    shape: tuple[_Width | Literal["rows", "keys"], ...]


class Quantisation(_Record):
    """Block-wise symmetric weight quantisation of the linear operators.

    From `wide_rows` positions in one pass on, a stage's wide graph is the faster one; None where
    stages have none. `int8_layers` (1-based) and the head, if `int8_head`, have 8 bits instead.
    """

    bits: Literal[4, 8]
    block_size: _Width
    accuracy_level: int | None = None  # of MatMulNBits alone
    wide_rows: _Length | None = None
    int8_layers: tuple[_Layers, ...] = ()
    int8_head: bool = False


class FileRecord(_Record):
    """Size in bytes and sha256 of one file of the folder."""

    bytes: _Count
    sha256: str


class StageSpec(_Record):
    """One graph. Layer numbers are 1-based and inclusive; 0 for stages that hold no layer.

    `positions` is there where layer stages share tensors that depend on the positions of a pass:
    masks, rotary rows. `probe` is final norm and LM head with AdaInfer's features, `candidates` the
    same over some of the head's rows, `kv_fill` one layer's K and V from the hidden state of a
    position that skipped the layer.

    `wide_file` is the same stage on the same weights, for passes of many positions.
    `multiply_adds` counts one position through the stage's weight matrices.
    """

    name: str
    kind: Literal["embed", "positions", "layers", "probe", "candidates", "kv_fill"]
    file: str
    wide_file: str | None = None
    first_layer: _Count = 0
    last_layer: _Count = 0
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    multiply_adds: _Count

    @model_validator(mode="after")
    def _weighs(self) -> StageSpec:
        if self.kind in ("layers", "probe") and self.multiply_adds == 0:
            raise ValueError(f"stage {self.name} without multiply-adds")  # costs are shares of them
        return self


class ExitPoint(_Record):
    """A layer boundary at which the exit graph is evaluated.

    Without an adapter the probe reads the hidden state as it is (AdaInfer's own form). Of a context
    exit `translate` gives K and V of the layers above; `start` is none of its inputs where keys are
    not rotated. `multiply_adds` are of the one or the other, for one position.
    """

    exit_layer: _Layers
    adapter: str | None = None
    translate: str | None = None
    translate_inputs: tuple[Literal["hidden", "start"], ...] = ("hidden", "start")
    multiply_adds: _Count = 0


class ClassifierSpec(_Record):
    """The exit decision: `graph` in plain operators, `reference` as skl2onnx wrote it, if it did.

    `graph` takes token int64 `[n]`, top_prob, gap, depth, trust float `[n]` and state float
    `[n, state_size]` (zeros at the first exit point), and gives score `[n]` and next_state. Of
    these, `inputs` are those that its outputs depend on: TensorRT ignores others.
    """

    kind: str
    graph: str
    reference: str | None = None
    state_size: Annotated[int, Field(ge=0, le=1 << 16)]
    features: tuple[str, ...]
    inputs: tuple[ClassifierInput, ...] = CLASSIFIER_INPUTS


class CertificateGroup(_Record):
    """One task at the pooled threshold: its share of disagreement is at most `upper_bound`."""

    prompts: _Count
    disagreements: _Count
    upper_bound: float


class CertificateLevel(_Record):
    """Disagreement of greedy answers is at most `level`, with `confidence`.

    Without a threshold the level could not be certified; `prompts_needed` then says how many
    prompts could at best, where there were fewer.
    """

    level: float
    confidence: float
    prompts: _Count
    threshold: float | None = None
    disagreements: _Count | None = None
    layers_saved: float | None = None
    prompts_needed: _Count | None = None
    groups: dict[str, CertificateGroup] = {}


class Certificate(_Record):
    """What is certified, and for what: it does not carry over to another target or device class.

    A disagreement is an answer that is not the full model's; against gold answers, one that is
    wrong where the full model's is right.
    """

    target: str
    precision: str
    device_class: str
    data: tuple[str, ...]
    against: Literal["model", "gold"] = "model"
    levels: tuple[CertificateLevel, ...]


class ExitSpec(_Record):
    """What `adaptive` mode evaluates between layers.

    Without points the calibration's answer was "do not exit": adaptive then runs every layer.
    `thresholds` is the grid that certificates test, from the safest down; `exit_shares` says, for
    each of them, which share of held-out prompts leaves at each point. Of a context exit the last
    `answer_rows` positions do not stop: they run through all layers over the translated ones;
    `certificate` is of its first token, `text_certificate` of texts that go on over translated K,V.
    """

    points: tuple[ExitPoint, ...]
    classifier: ClassifierSpec | None = None
    threshold: float | None = None
    target_agreement: float
    thresholds: tuple[float, ...] = ()
    exit_shares: tuple[tuple[_Share, ...], ...] = ()
    certificate: Certificate | None = None
    text_certificate: TextCertificate | None = None
    kv_policy: Literal["deferred"] = "deferred"
    answer_rows: _Length = 1
    calibration: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> ExitSpec:
        layers = [point.exit_layer for point in self.points]
        if layers != sorted(set(layers)):
            raise ValueError(f"exit points must be ascending, found {layers}")
        if layers and (self.classifier is None or self.threshold is None):
            raise ValueError("exit points without a classifier or a threshold")
        if self.classifier is not None and self.threshold is None:
            raise ValueError("a classifier without a threshold")
        _check_shares(self.exit_shares, len(self.thresholds), len(layers))
        return self


class CombinedExitSpec(_Record):
    """What `combined` mode evaluates: the answer exits of one graph, and the context exits.

    Attributes:
        answer: kind of the answer exits' classifier.
        path: thresholds (of answer exits, of context exits), from the safest pair down. One number
            orders them, so that certificates test them like any other: minus the place.
        threshold: minus the place of the pair that is taken by default.
        exit_shares: per place, which share of held-out prompts leaves at each check.
    """

    answer: str
    path: tuple[tuple[float, float], ...]
    threshold: float
    target_agreement: float
    exit_shares: tuple[tuple[_Share, ...], ...] = ()
    certificate: Certificate | None = None
    calibration: dict[str, Any] = {}

    def thresholds_at(self, place: float) -> tuple[float, float]:
        """The pair that `threshold`, or a certified level's, stands for."""
        return self.path[round(-place)]

    @model_validator(mode="after")
    def _inside(self) -> CombinedExitSpec:
        levels = self.certificate.levels if self.certificate else ()
        places = [self.threshold, *(e.threshold for e in levels if e.threshold is not None)]
        if any(not 0 <= -place < len(self.path) for place in places):
            raise ValueError(f"a threshold is no place on the path of {len(self.path)} pairs")
        return self


class ShortlistSpec(_Record):
    """What proposes `rows` tokens, to be scored exactly by `candidates`: an LM head of low `rank`,
    or the rows of the `tokens` that the model predicts most often.

    `file` takes `hidden` and gives its own logits `[vocab_size]`, their `log_sum_exp` and
    `candidates`. `recall` is the share of held-out positions at which the head's own token
    is among them, by the layer that the (adapted) hidden states are of; `agreement` the share of
    held-out prompts on which its own first token is the full model's answer, by exit layer.
    `multiply_adds` counts both steps.
    """

    file: str
    rank: _Width | None = None
    tokens: _Width | None = None
    rows: _Width
    multiply_adds: _Count
    recall: dict[str, float]
    agreement: dict[str, float] = {}


class TokenizerSpec(_Record):
    """Files of the Hugging Face tokenizer."""

    file: str
    files: tuple[str, ...]


class Manifest(_Record):
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
    max_seq_len: _Length
    layers_per_engine: _Layers | None = None
    most_layers_per_engine: _Layers | None = None
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
        _check_shares(combined.exit_shares, len(combined.path), checks)

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Paths of all files that belong to the tokenizer."""
        return self.tokenizer.files if self.tokenizer else ()

    def referenced_files(self) -> tuple[str, ...]:
        """Every path that the manifest names, relative to the folder."""
        stages = (*self.stages, *self.joined)
        paths = [*self.files, *(stage.file for stage in stages)]
        paths += [stage.wide_file for stage in stages if stage.wide_file]
        paths += [point.adapter for point in self.exit_points.values() if point.adapter]
        paths += [point.translate for point in self.context_points.values() if point.translate]
        paths += [self.shortlist.file] if self.shortlist else []
        for classifier in self.classifiers:
            paths.append(classifier.graph)
            if classifier.reference:
                paths.append(classifier.reference)
        if self.tokenizer:
            paths += [self.tokenizer.file, *self.tokenizer.files]
        return tuple(dict.fromkeys(paths))


def _check_shares(shares: tuple[tuple[float, ...], ...], thresholds: int, checks: int) -> None:
    if shares and (len(shares) != thresholds or any(len(row) != checks for row in shares)):
        raise ValueError("exit_shares must have a row for each threshold, a share for each check")


def _check_layers(stages: tuple[StageSpec, ...], num_layers: int) -> None:
    expected = 1
    for stage in stages:
        if stage.first_layer != expected or stage.last_layer < stage.first_layer:
            raise ValueError(f"stage {stage.name} does not continue at layer {expected}")
        expected = stage.last_layer + 1
    if expected != num_layers + 1:
        raise ValueError(f"stages hold {expected - 1} of {num_layers} layers")
