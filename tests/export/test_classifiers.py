"""Every kind of exit classifier: what it learns, and that its ONNX forms say the same."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from adainfer_export.calibrate.classifiers import CLASSIFIERS, FitData, own_entry
from adainfer_export.calibrate.convert import STATE_SIZE, check_parity, lower_classifier
from adainfer_export.calibrate.predictions import Predictions, entropy_of
from adainfer_export.calibrate.scored import score_predictions
from adainfer_export.calibrate.select import choose_threshold, evaluate
from adainfer_export.commands import ClassifierChoice
from adainfer_export.errors import CalibrationError, LoweringError
from adainfer_runtime.backends.ort_cpu import open_session

from .synthetic import fit_classifier, synthetic

KINDS = [(kind, features) for kind, entry in CLASSIFIERS.items() for features in entry.feature_sets]


def save(classifier, folder):
    """Writes both graphs; the reference's path is None where there is none."""
    ir.save(lower_classifier(classifier), folder / "lowered.onnx")
    content = classifier.reference()
    if content is None:
        return folder / "lowered.onnx", None
    (folder / "reference.onnx").write_bytes(content)
    return folder / "lowered.onnx", folder / "reference.onnx"


def test_command_line_names_every_kind():
    assert {choice.value for choice in ClassifierChoice} == {*CLASSIFIERS, "auto"}


@pytest.mark.parametrize(("kind", "features"), KINDS)
def test_graphs_equal_the_fitted_classifier(tmp_path, kind, features):
    classifier = fit_classifier(kind, synthetic(noise=0.05), (4, 8), features)
    lowered, reference = save(classifier, tmp_path)
    assert (reference is None) == (kind in ("crf", "threshold"))
    onnx.checker.check_model(str(lowered), full_check=True)
    domains = {node.domain for node in onnx.load(lowered).graph.node}
    assert domains <= {"", "ai.onnx"}  # no ai.onnx.ml: it runs on every target
    assert check_parity(classifier, lowered, reference, points=100_000) <= 1e-3


@pytest.mark.parametrize(("kind", "features"), KINDS)
def test_every_input_reaches_an_output(kind, features):
    """TensorRT ignores an input that does not, and building its plan fails for that."""
    classifier = fit_classifier(kind, synthetic(noise=0.05), (4, 8), features)
    graph = lower_classifier(classifier).graph
    for value in graph.inputs:
        reached, todo = set(), [value]
        while todo:
            current = todo.pop()
            reached.add(current)
            todo += [out for node, _ in current.uses() for out in node.outputs]
        assert reached & set(graph.outputs), value.name
    looks_back = kind == "crf" or {"stability", "rise"} & set(features)
    wanted = {"token", "top_prob", *({"gap", "depth", "trust"} & set(features))}
    wanted |= {"state"} if looks_back else set()
    wanted |= {"logits"} if "entropy" in features else set()
    assert {value.name for value in graph.inputs} == wanted


def test_entropy_is_that_of_the_softmax():
    random = np.random.default_rng(0)
    logits = (5.0 * random.normal(size=(6, 50))).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    expected = -(p * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(entropy_of(logits), expected, rtol=1e-4)
    certain = np.array([[0.0, -np.inf, -3e38]], np.float32)
    assert entropy_of(certain).tolist() == [0.0]
    assert entropy_of(np.zeros((1, 8), np.float32))[0] == pytest.approx(np.log(8))


@pytest.mark.parametrize("kind", ["svm", "crf", "logistic", "boosting"])
def test_parity_check_notices_another_classifier(tmp_path, kind):
    lowered, reference = save(fit_classifier(kind, synthetic(noise=0.05), (4, 8)), tmp_path)
    other = fit_classifier(kind, synthetic(seed=1, noise=0.2), (4, 6))
    with pytest.raises(LoweringError, match=f"the lowered {kind} differs"):
        check_parity(other, lowered, reference)


@pytest.mark.parametrize(("kind", "features"), KINDS)
def test_state_carries_what_the_next_exit_point_needs(tmp_path, kind, features):
    """The runtime's way, point after point, gives the scores that thresholds are chosen on."""
    logits = np.random.default_rng(0).normal(size=(40, 3, 9), scale=3.0).astype(np.float32)
    predictions = replace(synthetic(40, noise=0.2), entropy=entropy_of(logits))
    classifier = fit_classifier(kind, synthetic(noise=0.05), (4, 6, 8), features)
    lowered, _ = save(classifier, tmp_path)
    session = open_session(lowered)
    state = np.zeros((40, STATE_SIZE), np.float32)
    expected = classifier.scores(predictions)
    for column, layer in enumerate(predictions.layers):
        given = {
            "token": predictions.token[:, column],
            "top_prob": predictions.top_prob[:, column],
            "gap": predictions.gap[:, column],
            "depth": np.full(40, layer / 10, np.float32),
            "trust": predictions.trust[:, column],
            "state": state,
            "logits": logits[:, column],
        }
        feed = {value.name: given[value.name] for value in session.get_inputs()}
        score, state = session.run(["score", "next_state"], feed)
        np.testing.assert_allclose(score, expected[:, column], atol=1e-3)


@pytest.mark.parametrize("kind", ["svm", "crf", "logistic", "boosting"])
def test_labels_of_one_class_give_no_classifier(kind):
    predictions = synthetic()
    always = Predictions(**{**vars(predictions), "token": predictions.final[:, None].repeat(3, 1)})
    assert CLASSIFIERS[kind].fit(FitData.of(always, (4, 6), ("top_prob", "gap")), 0) is None


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_scores_rank_safe_exits_first(kind):
    fit, chosen, new = (synthetic(2000, seed, noise=0.02) for seed in (0, 1, 2))
    classifier = fit_classifier(kind, fit)
    outcome = choose_threshold(score_predictions(classifier, chosen), 0.97)
    assert outcome.layers_saved > 0.15
    assert evaluate(score_predictions(classifier, new), outcome.threshold).agreement >= 0.96


def test_crf_knows_the_past(tmp_path):
    """Where points agree or disagree together, an earlier surety raises a later score."""
    random = np.random.default_rng(0)
    y = np.repeat(random.random((800, 1)) < 0.5, 3, axis=1)
    x = np.stack([y + random.normal(size=y.shape), random.normal(size=y.shape)], axis=-1)
    classifier = CLASSIFIERS["crf"].fit(FitData((4, 6, 8), ("log_odds", "gap"), x, y), 0)
    now = np.zeros((2, 2))
    low, high = classifier.decide(now, np.array([-3.0, 3.0]))
    assert high - low > 2.0
    assert classifier.transitions[1, 1] > classifier.transitions[1, 0]


def own_classifier(path, **changes):
    """A classifier as a user would write one: the gap, minus a half where the token changed."""
    from onnx import TensorProto, checker, helper, save

    n = ["n"]
    inputs = dict.fromkeys(("top_prob", "gap", "depth", "trust"), (TensorProto.FLOAT, n))
    inputs |= {"token": (TensorProto.INT64, n), "state": (TensorProto.FLOAT, ["n", 1])}
    inputs |= changes
    nodes = [
        helper.make_node("Cast", ["token"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["number", "last"], ["next_state"]),
        helper.make_node("Equal", ["next_state", "state"], ["same"]),
        helper.make_node("Squeeze", ["same", "last"], ["kept"]),
        helper.make_node("Sub", ["gap", "half"], ["lower"]),
        helper.make_node("Where", ["kept", "gap", "lower"], ["score"]),
    ]
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, n),
        helper.make_tensor_value_info("next_state", TensorProto.FLOAT, ["n", 1]),
    ]
    constants = [
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("half", TensorProto.FLOAT, [1], [0.5]),
    ]
    values = [helper.make_tensor_value_info(k, *v) for k, v in inputs.items()]
    graph = helper.make_graph(nodes, "own", values, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model)
    save(model, path)
    return path


def test_own_classifier_scores_as_its_graph_says(tmp_path):
    entry = own_entry(own_classifier(tmp_path / "own.onnx"))
    predictions = synthetic(200)
    own = entry.fit(FitData.of(predictions, (4, 8), ("gap",)), 0)
    scores = own.scores(predictions)
    chosen = predictions.at((4, 8))
    changed = chosen.token[:, 1] != chosen.token[:, 0]
    # The state of the first point is 0, which is no answer here.
    np.testing.assert_allclose(scores[:, 0], chosen.gap[:, 0] - 0.5 * (chosen.token[:, 0] != 0))
    np.testing.assert_allclose(scores[:, 1], chosen.gap[:, 1] - 0.5 * changed, atol=1e-6)


def test_own_classifier_is_shipped_and_run(tiny, tmp_path):
    import json
    import shutil

    from adainfer_export.calibrate import CalibrationRequest
    from adainfer_export.calibrate.pipeline import recalibrate
    from adainfer_export.progress import SilentReporter
    from adainfer_runtime import Engine
    from adainfer_runtime.engine_folder import load_manifest

    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, folder)
    prompts = tmp_path / "p.jsonl"
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(160))
    prompts.write_text("\n".join(lines))
    path = own_classifier(tmp_path / "own.onnx")
    request = CalibrationRequest(
        (prompts,), target_agreement=0.5, classifiers=(), classifier_file=path
    )
    manifest = recalibrate(folder, load_manifest(folder), request, SilentReporter())
    assert manifest.exit.classifier.kind == "own"
    assert manifest.exit.classifier.state_size == 1
    # Less the inputs that it does not read, which TensorRT would not take.
    assert manifest.exit.classifier.inputs == ("token", "gap", "state")
    session = open_session(folder / manifest.exit.classifier.graph)
    assert {value.name for value in session.get_inputs()} == {"token", "gap", "state"}
    engine = Engine.load(folder)
    assert engine.generate("x:", max_new_tokens=2, mode="adaptive").tokens
    assert engine.policy("adaptive", classifier="own").exit_layers


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gap": (1, ["n", 1])}, "inputs must be .* found .*gap tensor.float. rank 2"),
        ({"extra": (1, ["n"])}, "found .*extra"),
        ({"state": (1, ["n", "s"])}, "must have a fixed second dimension"),
    ],
)
def test_own_classifiers_that_keep_no_contract(tmp_path, changes, match):
    with pytest.raises(CalibrationError, match=match):
        own_entry(own_classifier(tmp_path / "own.onnx", **changes))


def test_own_classifiers_that_are_no_files(tmp_path):
    with pytest.raises(CalibrationError, match="cannot be used as a classifier"):
        own_entry(tmp_path / "nothing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(CalibrationError, match="cannot be used as a classifier"):
        own_entry(tmp_path / "bad.onnx")


def scoring(path, make_nodes, domain=""):
    """An own classifier whose score is what the nodes give, its state kept."""
    from onnx import TensorProto, helper, save

    inputs = [helper.make_tensor_value_info("token", TensorProto.INT64, ["n"])]
    for name in ("top_prob", "gap", "depth", "trust"):
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]))
    inputs.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, ["n", 1]))
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["m"]),
        helper.make_tensor_value_info("next_state", TensorProto.FLOAT, ["n", 1]),
    ]
    nodes = [*make_nodes(helper.make_node), helper.make_node("Identity", ["state"], ["next_state"])]
    constants = [
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        helper.make_tensor("two", TensorProto.INT64, [2], [2, -1]),
    ]
    graph = helper.make_graph(nodes, "own", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 3))
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        (
            lambda node: [node("Slice", ["gap", "first", "one"], ["score"])],
            r"own\.onnx: output score must have shape \[3\] for n = 3, found \[1\]",
        ),
        (
            lambda node: [node("Div", ["gap", "zero"], ["score"])],
            r"own\.onnx: output score must be finite, found inf for n = 1",
        ),
        (
            lambda node: [
                node("Reshape", ["gap", "two"], ["pairs"]),
                node("ReduceSum", ["pairs", "one"], ["score"], keepdims=0),
            ],
            r"own\.onnx does not run on n = 1: ",
        ),
    ],
)
def test_own_classifiers_are_run_before_any_work(tmp_path, nodes, match):
    with pytest.raises(CalibrationError, match=match) as found:
        own_entry(scoring(tmp_path / "own.onnx", nodes))
    assert "\n" not in str(found.value)


def test_own_classifiers_operators_are_those_of_the_target(tmp_path):
    from adainfer_export.calibrate import CalibrationRequest
    from adainfer_export.calibrate.classifiers import require_domains
    from adainfer_export.calibrate.fitting import check_inputs

    def scaled(node):
        return [node("Scaler", ["gap"], ["score"], domain="ai.onnx.ml", offset=[0.0], scale=[2.0])]

    path = scoring(tmp_path / "own.onnx", scaled, "ai.onnx.ml")
    require_domains(path, "ort-cpu")
    for target in ("ort-cuda", "tensorrt", "tensorrt-basic", "onnx-std"):
        match = rf"own\.onnx: target {target} runs standard operators; found ai\.onnx\.ml\.Scaler"
        with pytest.raises(CalibrationError, match=match):
            check_inputs(CalibrationRequest(classifier_file=path), target)
    standard = own_classifier(tmp_path / "standard.onnx")
    require_domains(standard, "tensorrt")
