from __future__ import annotations

import pytest

from adainfer_runtime import ClassifierExit
from adainfer_runtime.errors import RequestError
from adainfer_runtime.evaluate import evaluate, wilson_interval
from adainfer_runtime.tasks import TaskExample


class HalfwayEngine:
    """An engine whose adaptive mode always stops after layer 2 of 4."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def policy(self, mode):
        if mode == "off":
            return self._engine.policy("off")
        backend = self._engine.backend

        class Sure:
            def classify(self, kind, result, depth, state):
                assert depth == 0.5
                return 1.0, state

            def __getattr__(self, name):
                return getattr(backend, name)

        return ClassifierExit(Sure(), "svm", (2,), {2: 0.5}, 0.0, 1)


@pytest.fixture
def examples():
    tasks = [TaskExample(prompt=f"x {i}:", answer=" a", task="one") for i in range(6)]
    return tasks + [TaskExample(prompt=f"y {i}: ", labels=("a", "b"), task="two") for i in range(4)]


def test_figures_are_counted(tiny, examples):
    result = evaluate(HalfwayEngine(tiny("llama").engine), examples)
    assert [task.task for task in result.tasks] == ["one", "two"]
    one, two = result.tasks
    assert (one.examples, two.examples, result.mean.examples) == (6, 4, 10)
    assert one.layers_saved == two.layers_saved == result.mean.layers_saved == 0.5
    assert one.mean_layers == 2.0
    assert one.accuracy_off is not None
    assert two.accuracy_off is None
    assert 0.0 <= one.agreement <= 1.0
    assert one.agreement_interval[0] <= one.agreement <= one.agreement_interval[1]
    assert one.minority_examples < 6
    assert result.mean.agreement == pytest.approx((one.agreement + two.agreement) / 2)
    assert result.mean.seconds_off == pytest.approx(one.seconds_off + two.seconds_off)


def test_off_against_itself_agrees(tiny, examples):
    engine = HalfwayEngine(tiny("llama").engine)
    engine.policy = lambda mode: engine._engine.policy("off")
    result = evaluate(engine, examples)
    assert result.mean.agreement == 1.0
    assert result.mean.layers_saved == 0.0


def test_labels_only(tiny, examples):
    engine = HalfwayEngine(tiny("llama").engine)
    result = evaluate(engine, examples[6:], labels_only=True)
    assert result.labels_only
    assert result.tasks[0].layers_saved == 0.5
    with pytest.raises(RequestError, match="needs examples with labels"):
        evaluate(engine, examples, labels_only=True)
    with pytest.raises(RequestError, match="no examples"):
        evaluate(engine, [])


def test_wilson_interval():
    # Wilson (1927), as tabulated: 8 of 10.
    low, high = wilson_interval(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(1.0, 100)[1] == 1.0
