from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from adainfer_export.calibrate import CalibrationRequest, pipeline
from adainfer_export.calibrate.affine import AffineMap
from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.calibrate.classifiers import CLASSIFIERS, Entry, FittedClassifier
from adainfer_export.calibrate.convert import lower_adapter
from adainfer_export.calibrate.data import load_examples, split_parts
from adainfer_export.calibrate.fitting import FittedGraph, fit_graphs
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.calibrate.predictions import Predictions
from adainfer_export.calibrate.ridge import Moments
from adainfer_export.calibrate.scored import Scored, observe, score_predictions
from adainfer_export.calibrate.select import Outcome, choose_threshold, evaluate, select_classifiers
from adainfer_export.calibrate.traces import AnswerTraces, answer_positions, candidate_layers
from adainfer_export.calibrate.trust import Trust, cross_fit, fit_trust
from adainfer_export.errors import CalibrationError
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, verify_files
from adainfer_runtime.errors import ManifestError, TaskFileError

from .synthetic import fit_classifier, synthetic

SVM = {"svm": CLASSIFIERS["svm"]}


def test_ridge_finds_an_affine_map_and_ignores_the_scale_of_coordinates():
    random = np.random.default_rng(0)
    scale = np.array([1.0, 1.0, 500.0, 1.0], np.float32)
    x = (random.normal(size=(4000, 4)) * scale).astype(np.float32)
    matrix = np.eye(4) + random.normal(size=(4, 4)) * 0.3 / scale[:, None]
    y = (x @ matrix + 2.0).astype(np.float32)
    moments = Moments(4)
    for rows in np.split(np.arange(4000), 8):
        moments.add(x[rows], y[rows], np.ones(500, np.float32))
    adapter = moments.solve(1e-6)
    np.testing.assert_allclose(adapter.apply(x), y, atol=2e-2)


def test_ridge_without_evidence_is_the_identity():
    random = np.random.default_rng(0)
    moments = Moments(3)
    x = random.normal(size=(50, 3)).astype(np.float32)
    moments.add(x, random.normal(size=(50, 3)).astype(np.float32), np.ones(50, np.float32))
    np.testing.assert_allclose(moments.solve(1e9).matrix, np.eye(3), atol=1e-6)
    with pytest.raises(CalibrationError, match="no tokens"):
        Moments(3).solve(0.1)


def test_adapter_graph_equals_its_map(tmp_path):
    from adainfer_runtime.backends.ort_cpu import open_session

    random = np.random.default_rng(0)
    adapter = AffineMap(
        random.normal(size=(8, 8)).astype(np.float32), random.normal(size=8).astype(np.float32)
    ).as_stored()
    import onnx_ir as ir

    trust = Trust(random.normal(size=8).astype(np.float32), 0.5)
    ir.save(lower_adapter(adapter, trust), tmp_path / "a.onnx")
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    hidden = random.normal(size=(1, 5, 8)).astype(np.float32)
    found, read = open_session(tmp_path / "a.onnx").run(["adapted", "trust"], {"hidden": hidden})
    np.testing.assert_allclose(found[0], adapter.apply(hidden[0]), atol=1e-5)
    np.testing.assert_allclose(read[0], trust.apply(hidden[0]), atol=1e-5)


def test_trust_is_read_off_the_hidden_state_without_the_prompt_itself():
    random = np.random.default_rng(0)
    predictions = synthetic(400, noise=0.3)
    hidden = random.normal(size=(400, 3, 16)).astype(np.float32)
    hidden[:, 1, 4] += predictions.agrees[:, 1] * 4.0  # only the second exit point shows it
    traces = AnswerTraces(
        predictions.layers,
        hidden,
        hidden[:, -1],
        predictions.final,
        predictions.tasks,
        np.arange(400) // 2,
        ((),) * 400,
        1.0,
    )
    trusts = fit_trust(traces, predictions)
    assert np.abs(trusts[6].weight).argmax() == 4
    crossed = cross_fit(traces, predictions)

    def difference(column, trust):
        agrees = predictions.agrees[:, column]
        return trust[agrees, column].mean() - trust[~agrees, column].mean()

    assert difference(1, crossed.trust) > 0.5
    # Noise looks like evidence in-sample, and does not once it is cross-fitted.
    in_sample = np.stack([trusts[4].apply(hidden[:, 0])] * 3, axis=1)
    assert difference(0, in_sample) > 3 * abs(difference(0, crossed.trust))


def test_plain_adainfer_has_no_trust():
    bare = Predictions(**{**vars(synthetic(500)), "trust": None})
    assert "trust" not in bare.known_features
    classifier = select_classifiers(bare, bare, 0.98, 0, SVM)["svm"]
    assert "trust" not in classifier.features


def test_threshold_counts_layers_checks_and_agreement():
    scores = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])
    scored = Scored(
        (4, 6, 8), 10, scores, np.ones((3, 3), bool), ("a",) * 3, (0.1,) * 3, (0.0,) * 3
    )
    outcome = evaluate(scored, 0.5)
    assert outcome.layers_saved == pytest.approx(1 - (4 + 6 + 10) / 30)
    # Failed checks: none, one, three, a tenth of a layer each.
    assert outcome.net_saved == pytest.approx(outcome.layers_saved - 4 / 3 * 0.1 / 10)


def test_threshold_keeps_the_target_on_new_prompts():
    fit, chosen, new = (synthetic(2000, seed, noise=0.03) for seed in (0, 1, 2))
    classifier = fit_classifier("svm", fit)
    outcome = choose_threshold(score_predictions(classifier, chosen), 0.97)
    assert outcome.agreement >= 0.97
    assert evaluate(score_predictions(classifier, new), outcome.threshold).agreement >= 0.96


def test_too_few_prompts_give_no_exit():
    """With 20 prompts not even none of them disagreeing is evidence for 99%."""
    right = np.ones((20, 1), bool)
    outcome = choose_threshold(
        Scored((4,), 10, right * 1.0, right, ("a",) * 20, (0.1,), (0.0,)), 0.99
    )
    assert math.isinf(outcome.threshold)
    assert outcome.layers_saved == 0.0


def test_selection_finds_paying_exits_and_refuses_dear_ones():
    fit, selection = synthetic(500, 0), synthetic(400, 1)
    assert list(select_classifiers(fit, selection, 0.98, 0, SVM)) == ["svm"]
    dear = replace(selection, check_layers=(50.0,) * len(selection.layers))
    assert select_classifiers(fit, dear, 0.98, 0, SVM) == {}


def test_points_whose_checks_are_dear_are_left_out():
    """Each point has its own price: a context exit's falls with the layers above it."""
    fit, selection = synthetic(500, 0), synthetic(400, 1)
    dear_first = replace(selection, check_layers=(50.0, 0.1, 0.1))
    (chosen,) = select_classifiers(fit, selection, 0.98, 0, SVM).values()
    assert 4 in chosen.layers
    prices = {"check_layers": (50.0, 0.1, 0.1), "exit_check_layers": (50.0, 0.0, 0.0)}
    dear = [replace(predictions, **prices) for predictions in (fit, selection)]
    (chosen,) = select_classifiers(*dear, 0.98, 0, SVM).values()
    assert 4 not in chosen.layers
    scored = score_predictions(chosen, dear_first)
    assert scored.check_layers == (0.1,) * len(chosen.layers)


@dataclass(frozen=True)
class Memory(FittedClassifier):
    """Knows the answers that it was fitted on by heart, and is sure of nothing else."""

    layers: tuple[int, ...]
    features: tuple[str, ...]
    known: frozenset[tuple[float, ...]]
    kind: str = "memory"

    def decide(self, x, previous):
        return np.array([float(tuple(row) in self.known) for row in x.tolist()])

    def lower(self, graph, x, previous, first):
        raise NotImplementedError


def memorise(data, seed, *, most_rows=0):
    x, y = data.rows
    return Memory(data.layers, data.features, frozenset(map(tuple, x[y].tolist())))


def test_what_a_classifier_saves_is_measured_on_prompts_it_has_not_seen():
    fit, selection = synthetic(500, 0), synthetic(400, 1)
    entries = {**SVM, "memory": Entry(memorise, (("trust",),), 0)}
    assert list(select_classifiers(fit, selection, 0.98, 0, entries)) == ["svm"]


def test_answers_in_context_are_fitted_on_but_not_counted():
    predictions = replace(synthetic(6), prompts=np.array([1, 1, 2, 3, 3, 3]))
    assert predictions.own.tolist() == [False, True, True, False, False, True]
    own = predictions.rows(predictions.own)
    assert own.groups.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(own.token, predictions.token[[1, 2, 5]])
    assert own.tasks == ("a",) * 3


def test_a_layer_that_is_never_wrong_is_an_exit():
    """There is nothing to learn for a classifier: the plain threshold takes its place."""
    predictions = synthetic(300)
    token = predictions.token.copy()
    token[:, 1:] = predictions.final[:, None]
    always = replace(predictions, token=token)
    found = select_classifiers(always, always, 0.98, 0, SVM)
    assert found["threshold"].layers[0] <= 6


def test_parts_are_disjoint_and_hold_every_task():
    examples = load_examples(CalibrationRequest(limit=600))
    assert len({example.task for example in examples}) == 15
    parts = split_parts(examples)
    prompts = [{e.prompt for e in part} for part in vars(parts).values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) > 580  # a few ask the same
    assert all(len({e.task for e in part}) == 15 for part in vars(parts).values())
    sizes = [len(part) for part in prompts]
    assert sizes == pytest.approx([210, 150, 90, 150], abs=12)


def test_limit_is_shared_out_among_tasks(tmp_path):
    lines = [
        {"prompt": f"{t} {i}", "task": t} for t, n in (("a", 20), ("b", 300)) for i in range(n)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    chosen = load_examples(CalibrationRequest(files=(path,), limit=100))
    assert [e.task for e in chosen].count("a") == 20
    assert len(chosen) == 100


def test_builtin_prompts():
    examples = builtin_examples()
    assert examples == builtin_examples()
    assert len({example.prompt for example in examples}) == len(examples) == 1500
    assert all(example.answer and example.answer.startswith(" ") for example in examples)
    assert not any(example.prompt.endswith(" ") for example in examples)


def test_answer_positions_are_the_places_before_answers():
    # "Q x A : y" five times: A=7, :=8
    ids = [token for i in range(5) for token in (1, 20 + i, 7, 8, 40 + i)] + [1, 30, 7, 8]
    assert answer_positions(ids).tolist() == [13, 18, 23, 28]
    assert answer_positions([5, 6, 7]).tolist() == [2]
    assert answer_positions([5]).tolist() == [0]


@pytest.mark.parametrize(("layers", "expected"), [(8, (4, 5, 6, 7)), (80, tuple(range(40, 80, 3)))])
def test_candidate_layers_are_few_however_deep_the_model(layers, expected):
    model = SimpleNamespace(num_layers=layers)
    manifest = SimpleNamespace(model=model, boundaries=tuple(range(1, layers + 1)))
    assert candidate_layers(SimpleNamespace(manifest=manifest)) == expected


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny("llama").folder, tmp_path / "engines")
    return tmp_path / "engines"


def calibrated(folder, **settings):
    prompts = folder.parent / "short.jsonl"  # the built-in ones are long, counted in bytes
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(120))
    prompts.write_text("\n".join(lines))
    request = CalibrationRequest(**{"files": (prompts,), "target_agreement": 0.6, **settings})
    return recalibrate(folder, load_manifest(folder), request, SilentReporter())


def test_calibrating_twice_replaces_the_exit_graph(folder):
    first = calibrated(folder)
    verify_files(folder, load_manifest(folder), sha256=True)
    second = calibrated(folder, adapters="none", seed=3)
    verify_files(folder, load_manifest(folder), sha256=True)
    assert load_manifest(folder).exit == second.exit
    stale = first.files.keys() - second.files.keys()
    assert stale
    assert not any((folder / name).exists() for name in stale)
    # A tiny random model agrees with itself or not; either way adaptive runs.
    Engine.load(folder).generate("hello", max_new_tokens=3, mode="adaptive")


def test_entropy_is_what_the_engine_gives_the_classifier(folder, monkeypatch):
    """Scores of the graph as it runs are those that exits were chosen by."""
    entry = replace(CLASSIFIERS["svm"], feature_sets=(("top_prob", "gap", "depth", "entropy"),))
    monkeypatch.setitem(CLASSIFIERS, "svm", entry)
    found = []
    monkeypatch.setattr(pipeline, "fit_graphs", lambda *a: found.append(fit_graphs(*a)) or found[0])
    manifest = calibrated(folder, entropy=True, target_agreement=0.5)
    (fitted,) = found
    graph = fitted.graphs[0]
    assert "logits" in manifest.exit.classifier.inputs
    assert np.ptp(graph.selection.entropy) > 0.0
    engine = Engine.load(folder)
    seen = observe(engine, fitted.parts.selection, {}, SilentReporter())["svm"]
    expected = score_predictions(graph.classifier, graph.selection)
    np.testing.assert_allclose(seen.scores, expected.scores, atol=1e-3)
    assert engine.generate("hello", max_new_tokens=3, mode="adaptive").tokens


def test_without_entropy_no_classifier_reads_all_logits(folder):
    manifest = calibrated(folder, target_agreement=0.5)
    assert "logits" not in manifest.exit.classifier.inputs


def test_failed_calibration_leaves_the_folder_as_it_was(folder, monkeypatch):
    from adainfer_export.calibrate import fitting

    before = load_manifest(folder)
    monkeypatch.setattr(fitting, "select_classifiers", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrated(folder)
    assert load_manifest(folder) == before


def test_exits_that_do_not_pay_leave_nothing_behind(folder, monkeypatch):
    dear = Outcome(
        0.0, layers_saved=0.1, net_saved=-0.1, disagreements=0, agreement=1.0, task_agreement=1.0
    )
    monkeypatch.setattr(pipeline, "choose_threshold", lambda *a: dear)
    manifest = calibrated(folder, target_agreement=0.5)
    assert manifest.exit.points == ()
    assert manifest.boundaries == (4,)  # nothing to stop at: one engine
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "manifest.json"}


def test_certificates_are_of_the_engines_that_run(folder, monkeypatch):
    """Where a graph is dropped, engines are joined over its exit points: they are tried again."""
    observe_once, judge = pipeline._observe, pipeline._judge
    cuts, judged = [], []

    def with_another(*given):
        fitted = fit_graphs(*given)
        (graph,) = fitted.graphs
        assert graph.classifier.layers == (2,)
        other = fit_classifier("logistic", graph.selection, (3,), ("top_prob", "gap"))
        return replace(fitted, graphs=(graph, FittedGraph("logistic", other, graph.selection)))

    def observed(folder, written, *rest):
        cuts.append(written.boundaries)
        return observe_once(folder, written, *rest)

    def without_other(*given):
        judged.append({name: found for name, found in judge(*given).items() if name == "svm"})
        return judged[-1]

    monkeypatch.setattr(pipeline, "fit_graphs", with_another)
    monkeypatch.setattr(pipeline, "_observe", observed)
    monkeypatch.setattr(pipeline, "_judge", without_other)
    manifest = calibrated(folder, target_agreement=0.5)
    assert cuts == [(2, 3, 4), (2, 4)]
    assert manifest.boundaries == (2, 4)
    assert manifest.exit.threshold == judged[-1]["svm"].outcome.threshold
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "manifest.json"}


def test_bad_task_files(folder, tmp_path):
    path = tmp_path / "bad.jsonl"
    for content, match in (
        ('{"prompt": "x"}\n{"prompt": 3}\n', r"bad\.jsonl:2: prompt: "),
        ("{nonsense\n", r"bad\.jsonl:1: .*expected one JSON object"),
        ("", "hold no examples"),
        ('{"answer": "x"}', r"bad\.jsonl:1: prompt: Field required"),
        (
            '{"prompt": "x", "labels": ["a", ""]}',
            r"bad\.jsonl:1: labels\.1: .*at least 1 character",
        ),
    ):
        path.write_text(content)
        with pytest.raises(TaskFileError, match=match):
            calibrated(folder, files=(path,))
    with pytest.raises(TaskFileError, match="cannot be read"):
        calibrated(folder, files=(tmp_path / "none.jsonl",))


def test_too_few_and_too_long_prompts(folder, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"word {i}"}) for i in range(10)))
    with pytest.raises(CalibrationError, match="10 different prompts are too few"):
        calibrated(folder, files=(path,))
    path.write_text("\n".join(json.dumps({"prompt": f"{i} " + "x" * 400}) for i in range(70)))
    with pytest.raises(CalibrationError, match="70 of 70 prompts are longer"):
        calibrated(folder, files=(path,))


def test_some_too_long_prompts_are_counted(folder, tmp_path, caplog):
    from adainfer_export.calibrate.fitting import _usable_parts

    path = tmp_path / "mixed.jsonl"
    prompts = [f"{i} " + "x" * (400 if i < 5 else 1) for i in range(70)]
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    request = CalibrationRequest((path,))
    _, skipped = _usable_parts(Engine.load(folder), request)
    assert skipped == 5
    (record,) = caplog.records
    assert "5 of 70 prompts are left out: they are longer than" in record.getMessage()


def test_prompts_of_token_ids_are_named(folder, tmp_path):
    """Task files hold text: ids, whoever's tokeniser made them, are no prompt."""
    from adainfer_runtime.tasks import read_tasks

    path = tmp_path / "ids.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": [5, -1, 999999]}\n')
    match = r"ids\.jsonl:2: prompt: Input should be a valid string"
    with pytest.raises(TaskFileError, match=match):
        calibrated(folder, files=(path,))
    with pytest.raises(TaskFileError, match=match):  # what certify and eval read by
        read_tasks([path])


def test_labels_that_are_no_tokens(folder, tmp_path, monkeypatch):
    path = tmp_path / "labels.jsonl"
    line = {"prompt": "x", "labels": ["a", "b"], "task": "t"}
    path.write_text("\n".join(json.dumps({**line, "prompt": f"{i}:"}) for i in range(70)))
    before = load_manifest(folder)
    known = Engine.load(folder).tokenizer.encode_continuation("a")
    monkeypatch.setattr(Engine, "label_tokens", lambda *_: [known, []])
    with pytest.raises(CalibrationError, match="task t: the label 'b' is no token"):
        calibrated(folder, files=(path,))
    assert load_manifest(folder) == before


def test_answers_of_one_class_calibrate_nothing(folder, tmp_path, monkeypatch):
    from adainfer_export.calibrate import fitting

    before, traced = load_manifest(folder), fitting.trace_answers

    def constant(*arguments, **settings):
        traces = traced(*arguments, **settings)
        return replace(traces, token=np.zeros_like(traces.token))

    monkeypatch.setattr(fitting, "trace_answers", constant)
    with pytest.raises(CalibrationError, match="one and the same answer to all 18 prompts"):
        calibrated(folder)
    assert load_manifest(folder) == before


def test_duplicates_are_named_and_used_once(tmp_path, caplog):
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i % 70}"}) for i in range(100)))
    assert len(load_examples(CalibrationRequest(files=(path,)))) == 70
    assert "30 of 100 prompts are there twice" in caplog.text


def test_engine_without_boundary_to_exit_at(tiny, tmp_path):
    shutil.copytree(tiny("llama", layers_per_engine=4).folder, tmp_path / "engines")
    with pytest.raises(CalibrationError, match="no layer boundary"):
        calibrated(tmp_path / "engines")


def test_calibrating_what_is_no_engine_folder(tmp_path):
    with pytest.raises(ManifestError, match="is no engine folder"):
        calibrated(tmp_path)
