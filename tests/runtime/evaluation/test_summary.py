from __future__ import annotations

from dataclasses import asdict

import pytest

from adainfer_runtime import FixedExit
from adainfer_runtime.commands.evaluate import _as_json
from adainfer_runtime.evaluation import Method, evaluate, summary_rows
from adainfer_runtime.tasks import TaskExample

EXAMPLES = [
    *(TaskExample(prompt=f"x {n}:", answer=" a", task="one") for n in range(4)),
    *(TaskExample(prompt=f"y {n}:", task="two") for n in range(2)),
]


def evaluation(engine, name):
    methods = (
        Method.of("off", engine, engine.policy("off")),
        Method.of(name, engine, FixedExit(2)),
    )
    return evaluate(methods, EXAMPLES)


def test_a_flat_row_per_task_and_the_mean(tiny):
    result = evaluation(tiny("llama").engine, "adaptive")
    rows = summary_rows(result)
    assert [(row.task, row.examples) for row in rows] == [("one", 4), ("two", 2), ("mean", 6)]
    off, adaptive = result["off"], result["adaptive"]
    assert asdict(rows[0]) == {
        "task": "one",
        "examples": 4,
        "accuracy_off": off.tasks[0].accuracy,
        "accuracy_adaptive": adaptive.tasks[0].accuracy,
        "agreement": adaptive.tasks[0].agreement,
        "mean_layers": 2.0,
        "layers_deviation": 0.0,
        "layers_saved": 0.5,
        "seconds_off": off.tasks[0].seconds,
        "seconds_adaptive": adaptive.tasks[0].seconds,
    }
    assert rows[1].accuracy_off is None
    assert rows[2].seconds_off == pytest.approx(rows[0].seconds_off + rows[1].seconds_off)
    content = _as_json(result)
    assert content["summary"] == [asdict(row) for row in rows]
    assert len(content["methods"]) == 2


def test_no_summary_without_adaptive(tiny):
    result = evaluation(tiny("llama").engine, "half")
    assert summary_rows(result) == ()
    assert "summary" not in _as_json(result)
