"""Choice among labels: the one that the model finds most likely to follow the prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import DeadlineError, PromptTooLongError, RequestCancelledError, RequestError
from .exit_policy import ExitPolicy, NoExit
from .generation_options import CancelToken, require_cancel, require_timeout
from .ledger import WorkCount
from .mode_options import check_mode_options
from .mode_policies import Mode
from .session import Session, log_softmax

__all__ = [
    "ChoiceOptions",
    "Chosen",
    "choose",
    "first_tokens",
    "join_label",
    "listed_labels",
    "longest_label",
    "require_choice",
]


@dataclass(frozen=True)
class ChoiceOptions:
    """A choice, apart from its prompt and labels; fields as of `GenerationOptions`.

    Raises:
        RequestError: a value of the wrong kind or outside its range, or a threshold in a mode that
            has no use for it.
    """

    mode: Mode = "off"
    threshold: float | None = None
    level: float | None = None
    timeout: float | None = None
    cancel: CancelToken | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None:
            require_timeout(self.timeout)
        if self.cancel is not None:
            require_cancel(self.cancel)
        check_mode_options(self.mode, () if self.threshold is None else ("threshold",))

    def interruption(self) -> Callable[[], None]:
        """Raises DeadlineError or RequestCancelledError where it is time; counts from now on."""
        start = time.perf_counter()

        def check() -> None:
            if self.cancel is not None and self.cancel():
                raise RequestCancelledError("the choice was cancelled before a label was found")
            if self.timeout is not None and time.perf_counter() - start > self.timeout:
                raise DeadlineError(
                    f"the deadline of {self.timeout} s passed before a label was found"
                )

        return check


@dataclass(frozen=True)
class Chosen:
    """Index of the best label, and each label's log-probability among the labels."""

    index: int
    scores: tuple[float, ...]
    exit_layer: int
    count: WorkCount
    seconds: float


def listed_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in their order.

    Raises:
        RequestError: no list of texts. (One text would be a list of its letters.)
    """
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise RequestError(f"labels must be a list of texts, found {labels!r}")
    names = tuple(labels)
    for name in names:
        if not isinstance(name, str):
            raise RequestError(f"labels must be a list of texts, found {name!r} in it")
    return names


def join_label(prompt: str, label: str) -> str:
    """The label as it continues the prompt: with a space between two words that would touch."""
    touching = bool(prompt) and not prompt[-1].isspace() and prompt[-1] not in "([{\"'"
    return f" {label}" if touching and label[:1].isalnum() else label


def choose(
    session: Session,
    prompt: Sequence[int],
    labels: Sequence[Sequence[int]],
    policy: ExitPolicy,
    max_length: int,
) -> Chosen:
    """Scores labels after the prompt; the session ends with the prompt, without a label.

    Of the LM head only the rows of the labels' first tokens are computed. Those tokens are judged
    where the policy stops; further ones, if labels have any, after all layers. (With one first
    token for all labels there is nothing to judge early: every layer is run.)

    Raises:
        RequestError: fewer than two labels, an empty one, or two with the same tokens.
        PromptTooLongError: prompt and label exceed `max_length`.
    """
    require_choice(len(prompt), labels, max_length)
    start, before = time.perf_counter(), session.count
    session.extend(prompt)
    candidates = first_tokens(labels)
    several = len(candidates) > 1
    prediction = session.predict(policy if several else NoExit(), candidates if several else None)
    logits = prediction.result.logits if several else np.zeros(1, np.float32)
    first = dict(zip(candidates.tolist(), logits.tolist(), strict=True))
    scores = [float(first[label[0]]) for label in labels]
    for index, label in enumerate(labels):
        if len(label) > 1:
            scores[index] += _score_rest(session, label)
    return Chosen(
        int(np.argmax(scores)),
        tuple(log_softmax(np.array(scores, np.float32)).tolist()),
        prediction.exit_layer,
        session.count - before,
        time.perf_counter() - start,
    )


def first_tokens(labels: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """The different first tokens of some labels, ascending."""
    return np.unique([label[0] for label in labels]).astype(np.int64)


def longest_label(labels: Sequence[Sequence[int]]) -> int:
    """How many tokens decide between labels at most; 1 where an exit has no say in it, for they
    begin alike.
    """
    alike = len({tuple(label[:1]) for label in labels}) < 2
    return 1 if alike else max(map(len, labels))


def _score_rest(session: Session, label: Sequence[int]) -> float:
    """Log-probability of the label's tokens after its first, given that first one."""
    length = session.length
    session.extend(label[:-1])
    log_probs = session.log_probs(length)
    session.truncate(length)
    return float(sum(log_probs[i, token] for i, token in enumerate(label[1:])))


def require_choice(prompt: int, labels: Sequence[Sequence[int]], max_length: int) -> None:
    """Raises what `choose` does, for labels after a prompt of so many tokens."""
    if len(labels) < 2:
        raise RequestError(f"a choice needs at least two labels, found {len(labels)}")
    if any(len(label) == 0 for label in labels):
        raise RequestError("a label holds no tokens")
    if len({tuple(label) for label in labels}) != len(labels):
        raise RequestError("two labels have the same tokens")
    total = prompt + max(len(label) for label in labels) - 1
    if total > max_length:
        raise PromptTooLongError(
            f"prompt and longest label take {total} tokens, this engine's maximum is {max_length}; "
            "shorten the prompt, or export with a larger --max-seq-len"
        )
