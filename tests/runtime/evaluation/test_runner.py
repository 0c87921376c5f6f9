from __future__ import annotations

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

from adainfer_runtime import FixedExit
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.errors import RequestError
from adainfer_runtime.evaluation import AnswerLog, Method, evaluate, make_methods
from adainfer_runtime.evaluation.shortgpt import drop_layers
from adainfer_runtime.exit_policy import ExitCheck
from adainfer_runtime.manifest import ExitSpec
from adainfer_runtime.tasks import TaskExample


@pytest.fixture
def examples():
    tasks = [TaskExample(prompt=f"x {i}:", answer=" a", task="one") for i in range(6)]
    return tasks + [TaskExample(prompt=f"y {i}: ", labels=("a", "b"), task="two") for i in range(4)]


@pytest.fixture
def halfway(tiny):
    """`off`, and a method that always stops after layer 2 of 4."""
    engine = tiny("llama").engine
    return (Method.of("off", engine, engine.policy("off")), Method.of("half", engine, FixedExit(2)))


def test_figures_are_counted(halfway, examples):
    result = evaluate(halfway, examples)
    assert [method.method for method in result.methods] == ["off", "half"]
    assert result.num_layers == 4
    half = result["half"]
    assert [task.task for task in half.tasks] == ["one", "two"]
    one, two = half.tasks
    assert (one.examples, two.examples, half.mean.examples) == (6, 4, 10)
    assert one.layers_saved == two.layers_saved == half.mean.layers_saved == 0.5
    assert 0.0 < one.compute_saved < 0.5  # the head is not saved
    assert (one.mean_layers, one.layers_deviation) == (2.0, 0.0)
    assert one.exits == {2: 6}
    assert result["off"].mean.exits == {4: 10}
    assert one.accuracy is not None
    assert two.accuracy is None
    assert two.accuracy_difference is None
    assert 0.0 <= one.agreement <= 1.0
    assert one.agreement_interval[0] <= one.agreement <= one.agreement_interval[1]
    assert one.minority_examples < 6
    assert half.mean.agreement == pytest.approx((one.agreement + two.agreement) / 2)
    assert half.mean.seconds == pytest.approx(one.seconds + two.seconds)
    assert half.mean.relative_time == pytest.approx(half.mean.seconds / result["off"].mean.seconds)


def test_off_against_itself_agrees(halfway, examples):
    mean = evaluate(halfway[:1], examples)["off"].mean
    assert (mean.agreement, mean.layers_saved, mean.compute_saved) == (1.0, 0.0, 0.0)
    assert (mean.accuracy_difference, mean.relative_time) == (0.0, 1.0)


def test_labels_only(halfway, examples):
    result = evaluate(halfway, examples[6:], labels_only=True)
    assert result.labels_only
    assert result["half"].tasks[0].layers_saved == 0.5
    with pytest.raises(RequestError, match="needs examples with labels"):
        evaluate(halfway, examples, labels_only=True)


def test_examples_that_cannot_be_asked_about(halfway, examples, monkeypatch):
    """Found before anything is run, the first by its place."""
    engine = halfway[0].engine
    monkeypatch.setattr(engine, "borrow", lambda: pytest.fail("run"))
    long = TaskExample(prompt="x" * 500, task="long")
    with pytest.raises(RequestError) as caught:
        evaluate(halfway, [examples[0], long, long])
    assert str(caught.value) == (
        "example 2, of task long: 500 tokens do not fit this engine's maximum of 128; shorten the "
        "prompt, or export with a larger --max-seq-len (and 1 more that cannot be used)"
    )
    for labels, reason in (
        (("a",), "a choice needs at least two labels, found 1"),
        (("a", "a"), "two labels have the same tokens"),
        (("a", "b" * 200), "prompt and longest label take"),
    ):
        few = TaskExample(prompt="x:", labels=labels, task="few")
        with pytest.raises(RequestError, match=f"^example 1, of task few: {reason}"):
            evaluate(halfway, [few], labels_only=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "3: 500 tokens do not fit"),
        (["--limit", "1", "--labels-only"], "1: labels_only needs examples with labels"),
    ],
)
def test_the_command_names_file_and_line(tiny, tmp_path, options, message):
    path = tmp_path / "over.jsonl"
    lines = [{"prompt": "x", "task": "short"}, {"prompt": "x" * 500, "task": "long"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    command = ["eval", str(tiny("llama").folder), "--tasks", str(path), "--methods", "off"]
    done = CliRunner().invoke(build_app(), [*command, *options])
    assert isinstance(done.exception, RequestError)
    assert str(done.exception).startswith(f"{path}:{message}")


def test_nothing_to_do(halfway, examples):
    with pytest.raises(RequestError, match="no examples"):
        evaluate(halfway, [])
    with pytest.raises(RequestError, match="first method must be 'off'"):
        evaluate(halfway[1:], examples)


class Counting:
    """Exits after a layer, and counts how often it was asked; may stop the run."""

    state_size = 0
    over_candidates = False
    checks = (ExitCheck(2),)

    def __init__(self, patience=1000):
        self.asked = 0
        self.patience = patience

    def decide(self, check, evidence, state):
        self.asked += 1
        if self.asked > self.patience:
            raise KeyboardInterrupt
        return True, state


def test_a_stopped_run_goes_on_from_its_log(tiny, halfway, examples, tmp_path):
    engine = tiny("llama").engine
    path = tmp_path / "answers.jsonl"
    question = {"labels_only": False}
    with pytest.raises(KeyboardInterrupt):
        stopped = (halfway[0], Method.of("half", engine, Counting(patience=5)))
        evaluate(stopped, examples, log=AnswerLog.open(path, engine.manifest, question))
    with path.open("a") as stream:
        stream.write('{"method": "half", "pro')  # killed in the middle of a line
    rest = Counting()
    again = evaluate(
        (halfway[0], Method.of("half", engine, rest)),
        examples,
        log=AnswerLog.open(path, engine.manifest, question),
    )
    assert rest.asked == 1 + 10 - 4  # the first of them warmed up, and so did the run before
    fresh = evaluate(halfway, examples)
    for mine, theirs in zip(again["half"].tasks, fresh["half"].tasks, strict=True):
        assert mine.exits == theirs.exits
        assert mine.agreement == theirs.agreement
    assert len(path.read_text().splitlines()) == 1 + 2 * len(examples)


def test_a_log_of_tasks_whose_names_hold_ends_of_lines(tiny, halfway, tmp_path):
    engine = tiny("llama").engine
    path = tmp_path / "answers.jsonl"
    examples = [TaskExample(prompt=f"x {n}:", task="one\u2028two\x85") for n in range(2)]
    evaluate(halfway, examples, log=AnswerLog.open(path, engine.manifest, {}))
    written = path.read_bytes()
    again = Counting()
    methods = (halfway[0], Method.of("half", engine, again))
    evaluate(methods, examples, log=AnswerLog.open(path, engine.manifest, {}))
    assert again.asked == 0
    assert path.read_bytes() == written


def test_a_log_of_something_else_is_refused(tiny, tmp_path):
    manifest = tiny("llama").engine.manifest
    path = tmp_path / "answers.jsonl"
    AnswerLog.open(path, manifest, {"level": None})
    with pytest.raises(RequestError, match="no log of this engine and question"):
        AnswerLog.open(path, manifest, {"level": 0.02})
    path.write_text(path.read_text() + '{"method": 3}\n')
    with pytest.raises(RequestError, match=r"answers.jsonl:2 is no answer"):
        AnswerLog.open(path, manifest, {"level": None})
    with pytest.raises(RequestError, match="cannot be used as a log"):
        AnswerLog.open(tmp_path, manifest, {})


def test_fixed_depth_and_shortgpt(tiny, examples):
    folder, engine = tiny("llama").folder, tiny("llama").engine
    influence = {"1": 0.9, "2": 0.1, "3": 0.3, "4": 0.5}
    spec = ExitSpec(points=(), target_agreement=0.9, calibration={"block_influence": influence})
    manifest = engine.manifest.model_copy(update={"exit": spec})
    measured = type(engine)(manifest, engine.backend, engine.tokenizer)
    methods = make_methods(["fixed:3", "shortgpt:1", "shortgpt:2"], folder, measured)
    assert [stage.first_layer for stage in methods[2].engine.manifest.cut] == [1, 3, 4]
    assert [stage.first_layer for stage in methods[3].engine.manifest.cut] == [1, 4]
    result = evaluate(methods, examples)
    assert result["fixed:3"].mean.layers_saved == 0.25
    assert result["shortgpt:1"].mean.layers_saved == 0.25
    assert result["shortgpt:2"].mean.exits == {2: 10}


def test_shortgpt_runs_the_layers_that_are_left(tiny):
    """Equal to transformers with that layer taken out."""
    made = tiny("llama")
    spec = ExitSpec(
        points=(),
        target_agreement=0.9,
        calibration={"block_influence": {"1": 1, "2": 0.1, "3": 1, "4": 1}},
    )
    manifest = drop_layers(made.engine.manifest.model_copy(update={"exit": spec}), 1)
    engine = type(made.engine).of_manifest(made.folder, manifest)
    ids = [5, 9, 3, 7, 11]
    session = engine.session()
    session.extend(ids)
    logits = session.predict(engine.policy("off")).result.logits
    model = copy.deepcopy(made.reference)
    del model.model.layers[1]
    model.config.num_hidden_layers = 3
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()
    assert abs(logits - expected).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "method 'nothing' is unknown: off, adaptive, context, combined, auto, "),
        ("svm", "this engine.s: none"),
        ("fixed:x", "needs a number of layers"),
        ("fixed:4", "layer 4 is no boundary between engines: 1, 2, 3"),
        ("shortgpt:1", "needs block influences"),
    ],
)
def test_unusable_methods(tiny, name, message):
    with pytest.raises(RequestError, match=message):
        make_methods([name], tiny("llama").folder, tiny("llama").engine)


def test_results_are_json(halfway, examples):
    from dataclasses import asdict

    data = json.loads(json.dumps(asdict(evaluate(halfway, examples))))
    assert data["methods"][1]["mean"]["layers_saved"] == 0.5
