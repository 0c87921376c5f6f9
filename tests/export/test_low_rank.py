from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from adainfer_export.calibrate import low_rank
from adainfer_export.calibrate.affine import AffineMap, reduce_rank
from adainfer_export.calibrate.convert import lower_adapter
from adainfer_export.calibrate.low_rank import AdapterBudget, choose_ranks
from adainfer_export.calibrate.ridge import Moments
from adainfer_export.calibrate.traces import candidate_layers, trace_prompts
from adainfer_export.calibrate.trust import Trust
from adainfer_export.cost import multiply_adds
from adainfer_export.progress import SilentReporter
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.tasks import TaskExample


def moments_of(x):
    moments = Moments(x.shape[1])
    moments.add(x, x, np.ones(len(x), np.float32))
    return moments


def test_a_map_of_low_rank_is_kept_and_the_largest_coordinate_takes_nothing_over():
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 12)).astype(np.float32) + 3.0
    matrix = (random.normal(size=(12, 4)) @ random.normal(size=(4, 12))).astype(np.float32)
    matrix[:, 0] *= 1000.0  # as in the residual stream
    full = AffineMap(matrix, random.normal(size=12).astype(np.float32))
    expected = full.apply(x)
    spread = expected.std(axis=0)
    four, two = reduce_rank(full, moments_of(x).inputs(), (4, 2), spread)
    np.testing.assert_allclose(four.apply(x) / spread, expected / spread, atol=2e-3)
    assert (four.rank, two.rank) == (4, 2)
    np.testing.assert_allclose(two.apply(x).mean(0) / spread, expected.mean(0) / spread, atol=2e-3)
    lost = ((two.apply(x) - expected) / spread).var(axis=0).sum()
    assert 0.01 < lost / 12 < 0.6  # two of four directions, and the best two


@pytest.mark.parametrize("up", [None, np.ones((3, 8), np.float32) / 3])
def test_graph_equals_the_stored_map_and_counts_its_cost(tmp_path, up):
    random = np.random.default_rng(0)
    matrix = random.normal(size=(8, 8 if up is None else 3)).astype(np.float32)
    adapter = AffineMap(matrix, random.normal(size=8).astype(np.float32), up).as_stored()
    trust = Trust(random.normal(size=8).astype(np.float32), 0.5)
    model = lower_adapter(adapter, trust)
    ir.save(model, tmp_path / "a.onnx")
    hidden = random.normal(size=(1, 5, 8)).astype(np.float32)
    found, read = open_session(tmp_path / "a.onnx").run(["adapted", "trust"], {"hidden": hidden})
    np.testing.assert_allclose(found[0], adapter.apply(hidden[0]), atol=1e-5)
    np.testing.assert_allclose(read[0], trust.apply(hidden[0]), atol=1e-5)
    weights = matrix.size + (0 if up is None else up.size)
    assert multiply_adds(model.graph) == weights + 8
    assert {node.domain for node in model.graph} == {""}  # plain operators: for every target


@pytest.mark.parametrize(
    ("stored", "full", "rank"),
    [
        (13.5e9, True, 2048),  # Llama-2-7B in float16: 33.6 MB of 13.5 GB a point
        (3.8e9, True, 2048),  # in int4: 0.9% a point, 3.5% for four
        (2.0e9, False, 1525),  # half as large a model of that width
        (0.2e9, False, 152),
    ],
)
def test_budget_at_the_width_of_llama_2_7b(stored, full, rank):
    files = {"stages/all.data": SimpleNamespace(bytes=int(stored))}
    budget = AdapterBudget.of(SimpleNamespace(files=files))
    width = 4096
    assert budget.takes_full(width) is full
    assert max(budget.ranks(width)) == rank
    weights = width * width if full else 2 * width * rank
    assert 4 * 2 * weights <= 0.05 * stored


@pytest.fixture
def traced(tiny):
    engine = tiny("llama").engine
    examples = [TaskExample(prompt=f"{n % 7} {n}: x {n % 5}: y {n}:") for n in range(60)]
    prompts = trace_prompts(engine, examples, SilentReporter(), 0)
    adapters = {layer: prompts.moments[layer].solve(0.01) for layer in candidate_layers(engine)}
    return engine, adapters, prompts


def test_small_models_get_what_fits(traced, monkeypatch):
    engine, adapters, prompts = traced
    width = engine.manifest.model.hidden_size
    for weights, ranks in ((width * width, range(1, width + 1)), (20 * width, range(1, 11))):
        budget = AdapterBudget(weights)
        monkeypatch.setattr(low_rank.AdapterBudget, "of", classmethod(lambda *_, b=budget: b))
        chosen = choose_ranks(engine, adapters, prompts, SilentReporter())
        assert chosen.keys() == adapters.keys()
        for adapter in chosen.values():
            assert adapter.rank in ranks
            assert adapter.rank * width * (1 if adapter.up is None else 2) <= weights


def test_too_few_prompts_take_the_largest_form(traced, monkeypatch):
    engine, adapters, prompts = traced
    monkeypatch.setattr(low_rank, "_FEWEST_HELD_OUT", 10_000)
    width = engine.manifest.model.hidden_size
    budget = AdapterBudget(width * width)
    monkeypatch.setattr(low_rank.AdapterBudget, "of", classmethod(lambda *_: budget))
    chosen = choose_ranks(engine, adapters, prompts, SilentReporter())
    assert all(adapter.up is None for adapter in chosen.values())


def test_graphs_with_too_many_adapters_are_left_out(monkeypatch, caplog):
    from adainfer_export.calibrate import fitting

    def graph(name, *layers):
        return SimpleNamespace(name=name, classifier=SimpleNamespace(layers=layers))

    matrix, bias = np.zeros((8, 8), np.float32), np.zeros(8, np.float32)
    adapters = {layer: AffineMap(matrix, bias) for layer in range(10)}
    monkeypatch.setattr(low_rank.AdapterBudget, "of", classmethod(lambda *_: AdapterBudget(64)))
    graphs = (graph("svm", 1, 2, 3), graph("crf", 1, 4, 5), graph("choice", 2, 4))
    kept = fitting._within_budget(None, graphs, adapters)
    assert [one.name for one in kept] == ["svm", "choice"]  # four different points are paid for
    assert "exit graph crf is left out" in caplog.text
    assert fitting._within_budget(None, graphs, {}) == graphs  # plain AdaInfer stores none
    least = {layer: AffineMap(matrix[:, :1], bias, matrix[:1]) for layer in adapters}
    assert fitting._within_budget(None, graphs, least) == graphs
