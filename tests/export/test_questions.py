"""Nothing that exits are judged on is among what they were fitted on."""

import json
import shutil
from random import Random

import numpy as np
import pytest

from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.calibrate.certify import certify
from adainfer_export.calibrate.data import Parts, load_examples, split_parts
from adainfer_export.calibrate.fresh_prompts import fitted_on, fresh_prompts
from adainfer_export.calibrate.questions import (
    first_of_each,
    positions_to_fit,
    questions_of,
    solved_by,
)
from adainfer_export.calibrate.scored import Scored
from adainfer_export.calibrate.traces import (
    AnswerTraces,
    answer_positions,
    trace_answers,
    trace_prompts,
)
from adainfer_export.errors import CalibrationError
from adainfer_export.progress import SilentReporter
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.few_shot import recombine
from adainfer_runtime.fitted_on import asked
from adainfer_runtime.tasks import TaskExample


def few_shot(count, shots=3, copies=1):
    """Prompts that ask n and are shown the answers of others."""
    queries = [
        TaskExample(prompt=f"Q: n{n}\nA: x\n\nQ: q{n}\nA:", answer=f" {n}", task="t")
        for n in range(count)
    ]
    return recombine(queries, shots=shots, copies=copies)


def test_parts_share_no_question():
    examples = few_shot(40, copies=3)
    Random(0).shuffle(examples)
    parts = split_parts(examples)
    questions = [questions_of(part) for part in vars(parts).values()]
    assert sum(map(len, questions)) == len(frozenset.union(*questions)) == 40
    assert [len(q) for q in questions] == pytest.approx([14, 10, 6, 10], abs=1)
    assert len(parts.certification) == len(questions[-1])
    assert len(parts.adapters) == 3 * len(questions[0])
    assert parts.held_out == questions[2] | questions[3]


def test_one_question_comes_into_one_part():
    same = [TaskExample(prompt="Q: a\nA: b\n\n" * n + "Q: x\nA:") for n in range(1, 30)]
    parts = split_parts(same)
    assert sorted(len(part) for part in vars(parts).values()) in ([0, 0, 0, 29], [0, 0, 0, 1])


def test_too_few_questions(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = (example.model_dump_json(exclude_none=True) for example in few_shot(30, copies=5))
    path.write_text("\n".join(lines))
    with pytest.raises(
        CalibrationError,
        match=r"^150 prompts ask 30 different questions, which are too few to calibrate: at least "
        r"60 are needed, a few hundred are better$",
    ):
        load_examples(CalibrationRequest(files=(path,)))


def test_questions_that_come_again_are_named(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    lines = (example.model_dump_json(exclude_none=True) for example in few_shot(70, copies=2))
    path.write_text("\n".join(lines))
    load_examples(CalibrationRequest(files=(path,)))
    assert "70 of 140 prompts ask what another one asks" in caplog.text


def test_the_built_in_prompts_have_questions():
    examples = builtin_examples()
    assert len(questions_of(examples)) > 1200
    assert all(len(solved_by([example])) >= 3 for example in examples)


@pytest.fixture(scope="module")
def engine(tiny):
    return tiny("llama").engine


def test_answers_of_held_out_questions_are_not_fitted_on(engine):
    (example,) = few_shot(9, shots=6)[:1]
    ids = engine.tokenizer.encode(example.prompt)
    answers = answer_positions(ids)
    assert len(answers) == 5  # the first two are left out, the last is the prompt's own
    texts = [engine.tokenizer.decode(ids[: n + 1]) for n in answers.tolist()]
    solved = [" ".join(text.rsplit("\n\n", 1)[-1].split()) for text in texts]
    assert solved[-1] == asked(example)[1]
    held_out = {("t", solved[1]), ("t", solved[3]), ("other", solved[2]), asked(example)}
    kept = positions_to_fit(engine, example, ids, answers, held_out)
    assert kept.tolist() == [answers[0], answers[2], answers[4]]
    everything = {("t", text) for text in solved}
    (own,) = positions_to_fit(engine, example, ids, answers, everything)
    assert own == answers[-1]

    def traced(held):
        settings = {"in_context": True, "held_out": frozenset(held)}
        return trace_answers(engine, [example], SilentReporter(), **settings)

    np.testing.assert_array_equal(traced(held_out).final, traced(()).final[[0, 2, 4]])


def test_moments_hold_neither_held_out_answers_nor_prompts_to_compare_by(engine):
    examples = few_shot(20, shots=4)

    def moments(*some, held_out=()):
        traced = trace_prompts(
            engine,
            some,
            SilentReporter(),
            0,
            (engine.manifest.boundaries[-2],),
            frozenset(held_out),
        )
        (found,) = traced.moments.values()
        return found, traced.answers

    first_nine, _ = moments(*examples[:9])
    ten, answers = moments(*examples[:10])
    assert answers.held_out.any()
    assert ten.solve(0.01).matrix == pytest.approx(first_nine.solve(0.01).matrix)
    everything = solved_by(examples[:9])
    _, kept = moments(*examples[:9], held_out=everything)
    assert len(kept.token) == 9  # their own


def test_prompts_to_compare_by_stay_those_when_traces_are_put_together(engine):
    examples = few_shot(25, shots=2)
    traced = [
        trace_answers(engine, some, SilentReporter(), in_context=False)
        for some in (examples[:12], examples[12:])
    ]
    together = AnswerTraces.concatenate(traced)
    held_out = np.concatenate([part.held_out for part in traced])
    np.testing.assert_array_equal(together.held_out, held_out)
    assert held_out.sum() == 2
    assert len(set(together.prompts.tolist())) == 25


def test_certifying_prompts_ask_what_was_not_fitted_on(tiny, tmp_path):
    examples = few_shot(80, shots=2, copies=2)
    parts = split_parts(examples)
    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, folder)
    report = "reports/calibration.0123456789ab.json"
    (folder / "reports").mkdir(exist_ok=True)
    (folder / report).write_text(json.dumps({"fitted_on": fitted_on(parts)}))
    manifest = load_manifest(folder)
    manifest = manifest.model_copy(
        update={"files": {**manifest.files, report: next(iter(manifest.files.values()))}}
    )
    path = tmp_path / "traffic.jsonl"

    def fresh(*prompts):
        path.write_text("\n".join(p.model_dump_json(exclude_none=True) for p in prompts))
        return fresh_prompts(folder, manifest, [path], lambda example: True)

    certifying = parts.certification[:5]
    other_examples = [
        example.model_copy(update={"prompt": "Q: n\nA: y\n\n" + example.prompt})
        for example in (*certifying, *parts.adapters[:4], *parts.selection[:2])
    ]
    found = fresh(*certifying, *other_examples)
    assert found.usable == certifying
    # Questions, whatever stands before them; the certifying ones ask twice what they ask.
    assert found.left_out == {"fitted_on": 6, "not_taken": 0, "asked_twice": 5}
    other_task = [example.model_copy(update={"task": "u"}) for example in other_examples[5:6]]
    assert fresh(*other_task).left_out == {"fitted_on": 0, "not_taken": 0, "asked_twice": 0}


def test_what_examples_answer_was_fitted_on(tiny):
    """Also where no prompt of the parts asks it."""
    prompt = "Q: a\nA: b\n\nQ: c\nA: d\n\nQ: {}\nA:"
    parts = Parts(
        tuple(TaskExample(prompt=prompt.format(n), task="t") for n in range(3)),
        (),
        (),
        (TaskExample(prompt="Q: z\nA: y\n\nQ: c\nA:", task="t"),),
    )
    three_prompts, three_questions, shown = 3, 3, 1  # Q: a; Q: c is held out
    assert len(fitted_on(parts)) == three_prompts + three_questions + shown


def clustered(random, questions, copies):
    """Prompts whose exits are wrong by their question alone, at a share of .05."""
    wrong = np.repeat(random.random(questions) < 0.05, copies)
    count = questions * copies
    shape = (count, 1)
    return Scored((5,), 10, np.ones(shape), ~wrong[:, None], ("a",) * count, (0.1,), (0.0,))


def test_one_prompt_per_question_keeps_the_level():
    """With all copies the level would break far more often than it may."""
    random, draws = np.random.default_rng(0), 1000
    grid = np.array([0.5])
    level = 0.0499  # the true share is above it: each certificate is a false one
    examples = [TaskExample(prompt=f"Q: {n}\nA: b\n\nQ: {n // 5}\nA:") for n in range(750)]
    firsts = {example.prompt for example in first_of_each(examples)}
    one = np.array([example.prompt in firsts for example in examples])
    false = {"all": 0, "one": 0}
    for _ in range(draws):
        scored = clustered(random, 150, 5)
        for name, rows in (("all", np.ones(750, bool)), ("one", one)):
            (entry,) = certify(scored.rows(rows), grid, (level,))
            false[name] += entry.threshold is not None
    assert false["one"] / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5
    assert false["all"] / draws > 0.12


def test_the_best_of_several_graphs_is_tested_more_strictly():
    """Three graphs of the same risk, of which the luckiest is taken."""
    random = np.random.default_rng(0)
    grid, level, draws = np.array([0.5]), 0.0499, 1000
    false = {1: 0, 3: 0}
    for _ in range(draws):
        graphs = [clustered(random, 300, 1) for _ in range(3)]
        best = min(graphs, key=lambda scored: scored.wrong(0.5).sum())
        for tried in false:
            (entry,) = certify(best, grid, (level,), tried=tried)
            false[tried] += entry.threshold is not None
    assert false[3] / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5
    assert false[1] / draws > 0.08
