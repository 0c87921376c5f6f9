"""Exit graphs: where they look, what decides, and what proposes tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from ..text_certificate_spec import TextCertificate
from .certificates import Certificate
from .record import Count, Layers, Length, Record, Share, Width

__all__ = [
    "CLASSIFIER_INPUTS",
    "ClassifierInput",
    "ClassifierSpec",
    "CombinedExitSpec",
    "ExitPoint",
    "ExitSpec",
    "LengthShares",
    "ShortlistSpec",
    "check_shares",
]

ClassifierInput = Literal["token", "top_prob", "gap", "depth", "trust", "state", "logits"]
CLASSIFIER_INPUTS: tuple[ClassifierInput, ...] = get_args(ClassifierInput)
_ALL_BUT_LOGITS = tuple(name for name in CLASSIFIER_INPUTS if name != "logits")


class ExitPoint(Record):
    """A layer boundary at which the exit graph is evaluated.

    Without an adapter the probe reads the hidden state as it is (AdaInfer's own form). Of a context
    exit `translate` gives K and V of the layers above; `start` is none of its inputs where keys are
    not rotated. `multiply_adds` are of the one or the other, for one position.
    """

    exit_layer: Layers
    adapter: str | None = None
    translate: str | None = None
    translate_inputs: tuple[Literal["hidden", "start"], ...] = ("hidden", "start")
    multiply_adds: Count = 0


class ClassifierSpec(Record):
    """The exit decision: `graph` in plain operators, `reference` as skl2onnx wrote it, if it did.

    `graph` takes token int64 `[n]`, top_prob, gap, depth, trust float `[n]` and state float
    `[n, state_size]` (zeros at the first exit point), and gives score `[n]` and next_state. One
    that knows the entropy also takes logits float `[n, tokens]`, of the vocabulary or of a choice's
    candidates. Of these, `inputs` are those that its outputs depend on: TensorRT ignores others.
    """

    kind: str
    graph: str
    reference: str | None = None
    state_size: Annotated[int, Field(ge=0, le=1 << 16)]
    features: tuple[str, ...]
    inputs: tuple[ClassifierInput, ...] = _ALL_BUT_LOGITS


class LengthShares(Record):
    """`exit_shares` of those held-out prompts that are about as long.

    Attributes:
        tokens: their median length.
        prompts: how many they are.
        exit_shares: as the exit graph's own, towards which they are drawn: few prompts say little.
    """

    tokens: Length
    prompts: Count
    exit_shares: tuple[tuple[Share, ...], ...]


class ExitSpec(Record):
    """What `adaptive` mode evaluates between layers.

    Without points the calibration's answer was "do not exit": adaptive then runs every layer.
    `thresholds` is the grid that certificates test, from the safest down; `exit_shares` says, for
    each of them, which share of held-out prompts leaves at each point, `length_shares` the same by
    the prompts' length, ascending, where there were prompts enough. Of a context exit the last
    `answer_rows` positions do not stop: they run through all layers over the translated ones;
    `certificate` is of its first token; `text_certificate` is of its texts that go on over
    translated K,V, and of an answer exit's with exits at every token.
    """

    points: tuple[ExitPoint, ...]
    classifier: ClassifierSpec | None = None
    threshold: float | None = None
    target_agreement: float
    thresholds: tuple[float, ...] = ()
    exit_shares: tuple[tuple[Share, ...], ...] = ()
    length_shares: tuple[LengthShares, ...] = ()
    certificate: Certificate | None = None
    text_certificate: TextCertificate | None = None
    kv_policy: Literal["deferred"] = "deferred"
    answer_rows: Length = 1
    calibration: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> ExitSpec:
        layers = [point.exit_layer for point in self.points]
        if layers != sorted(set(layers)):
            raise ValueError(f"exit points must be ascending, found {layers}")
        if layers and (self.classifier is None or self.threshold is None):
            raise ValueError("exit points without a classifier or a threshold")
        if self.classifier is not None and self.threshold is None:
            raise ValueError("a classifier without a threshold")
        check_shares(self.exit_shares, len(self.thresholds), len(layers))
        _check_lengths(self.exit_shares, self.length_shares)
        return self


class CombinedExitSpec(Record):
    """What `combined` mode evaluates: the answer exits of one graph, and the context exits.

    Attributes:
        answer: kind of the answer exits' classifier.
        path: thresholds (of answer exits, of context exits), from the safest pair down. One number
            orders them, so that certificates test them like any other: minus the place.
        threshold: minus the place of the pair that is taken by default.
        exit_shares: per place, which share of held-out prompts leaves at each check.
        length_shares: the same by the prompts' length, see `ExitSpec`.
    """

    answer: str
    path: tuple[tuple[float, float], ...]
    threshold: float
    target_agreement: float
    exit_shares: tuple[tuple[Share, ...], ...] = ()
    length_shares: tuple[LengthShares, ...] = ()
    certificate: Certificate | None = None
    calibration: dict[str, Any] = Field(default_factory=dict)

    def thresholds_at(self, place: float) -> tuple[float, float]:
        """The pair that `threshold`, or a certified level's, stands for."""
        return self.path[round(-place)]

    @model_validator(mode="after")
    def _inside(self) -> CombinedExitSpec:
        levels = self.certificate.levels if self.certificate else ()
        places = [self.threshold, *(e.threshold for e in levels if e.threshold is not None)]
        if any(not 0 <= -place < len(self.path) for place in places):
            raise ValueError(f"a threshold is no place on the path of {len(self.path)} pairs")
        _check_lengths(self.exit_shares, self.length_shares)
        return self


class ShortlistSpec(Record):
    """What proposes `rows` tokens, to be scored exactly by `candidates`: an LM head of low `rank`,
    or the rows of the `tokens` that the model predicts most often.

    `file` takes `hidden` and gives its own logits `[vocab_size]`, their `log_sum_exp` and
    `candidates`. `recall` is the share of held-out positions at which the head's own token
    is among them, by the layer that the (adapted) hidden states are of; `agreement` the share of
    held-out prompts on which its own first token is the full model's answer, by exit layer.
    `multiply_adds` counts both steps.
    """

    file: str
    rank: Width | None = None
    tokens: Width | None = None
    rows: Width
    multiply_adds: Count
    recall: dict[str, float]
    agreement: dict[str, float] = Field(default_factory=dict)


def check_shares(shares: tuple[tuple[float, ...], ...], thresholds: int, checks: int) -> None:
    """Raises ValueError unless there is a row for each threshold and a share for each check."""
    if shares and (len(shares) != thresholds or any(len(row) != checks for row in shares)):
        raise ValueError("exit_shares must have a row for each threshold, a share for each check")


def _check_lengths(
    pooled: tuple[tuple[float, ...], ...], by_length: tuple[LengthShares, ...]
) -> None:
    """Raises ValueError unless lengths ascend, and each has as many shares as all of them."""
    lengths = [shares.tokens for shares in by_length]
    if lengths != sorted(set(lengths)):
        raise ValueError(f"lengths of length_shares must be ascending, found {lengths}")
    sizes = [len(row) for row in pooled]
    if any([len(row) for row in shares.exit_shares] != sizes for shares in by_length):
        raise ValueError("length_shares must have as many rows and shares as exit_shares")
