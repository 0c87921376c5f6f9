"""One method's answer to one prompt."""

from __future__ import annotations

import hashlib
import time

from pydantic import BaseModel, ConfigDict

from ..engine import Engine
from ..errors import RequestError
from ..planning import RequestShape
from ..tasks import TaskExample
from .methods import Method

__all__ = ["Answer", "ask", "prompt_key"]


class Answer(BaseModel):
    """What came out, and what it cost.

    Attributes:
        prompt: key of the prompt, see `prompt_key`.
        value: token id, or index of the chosen label.
        expected: the right value; None where the task file gives none, -1 where it is no label.
        exit_layer: layers executed for the answer, 1 … L.
        executed: position-layers; `compute`: multiply-adds; `seconds`: wall clock.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    prompt: str
    task: str
    value: int
    expected: int | None
    exit_layer: int
    executed: int
    compute: int
    seconds: float


def prompt_key(example: TaskExample) -> str:
    """Names a prompt in a log, without its text."""
    return hashlib.sha256(f"{example.task}\n{example.prompt}".encode()).hexdigest()[:16]


def ask(method: Method, example: TaskExample, *, labels_only: bool) -> Answer:
    """Answers by one greedy token of the whole vocabulary, or by one of the example's labels.

    Raises:
        RequestError: `labels_only`, and the example has no labels.
    """
    return _choose_label(method, example) if labels_only else _greedy_token(method, example)


def _greedy_token(method: Method, example: TaskExample) -> Answer:
    ids = method.engine.tokenizer.encode(example.prompt)
    policy = method.policy_of(RequestShape(len(ids)))
    with method.engine.borrow() as session:
        before, start = session.count, time.perf_counter()
        session.extend(ids)
        prediction = session.predict(policy)
        seconds = time.perf_counter() - start
        count = session.count - before
    method.engine.recent.record(policy, prediction.exit_layer)
    return Answer(
        method=method.name,
        prompt=prompt_key(example),
        task=example.task,
        value=prediction.result.token,
        expected=_first_token(method.engine, example.answer),
        exit_layer=prediction.exit_layer,
        executed=count.executed,
        compute=count.compute,
        seconds=seconds,
    )


def _choose_label(method: Method, example: TaskExample) -> Answer:
    if not example.labels:
        raise RequestError(f"task {example.task}: labels_only needs examples with labels")
    ids = method.engine.tokenizer.encode(example.prompt)
    policy = method.policy_of(RequestShape(len(ids), candidates=True))
    done = method.engine.choose_with(example.prompt, example.labels, policy)
    return Answer(
        method=method.name,
        prompt=prompt_key(example),
        task=example.task,
        value=done.index,
        expected=_label_index(example),
        exit_layer=done.exit_layer,
        executed=done.count.executed,
        compute=done.count.compute,
        seconds=done.seconds,
    )


def _first_token(engine: Engine, answer: str | None) -> int | None:
    tokens = engine.tokenizer.encode_continuation(answer) if answer is not None else []
    return tokens[0] if tokens else None


def _label_index(example: TaskExample) -> int | None:
    if example.answer is None:
        return None
    labels = [label.strip() for label in example.labels or ()]
    answer = example.answer.strip()
    return labels.index(answer) if answer in labels else -1
