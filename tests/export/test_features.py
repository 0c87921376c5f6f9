"""AdaInfer's features as ONNX operators, against NumPy, for vocabularies of every kind."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from adainfer_export.features import add_features


def session_of(vocabulary):
    logits = ir.Value(
        name="in", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "tokens", vocabulary])
    )
    same = ir.Node("", "Identity", [logits])
    same.outputs[0].type, same.outputs[0].shape = logits.type, logits.shape
    graph = ir.Graph([logits], [same.outputs[0]], nodes=[same], opset_imports={"": 24})
    add_features(graph)
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options)


@pytest.fixture(autouse=True)
def shared_pool(tiny):
    tiny("llama")  # makes the process's one thread pool


@pytest.mark.parametrize("vocabulary", [2, 3, 5, 97, 128, 509, 32003, 49152])
def test_features_equal_numpy(vocabulary):
    generator = np.random.default_rng(vocabulary)
    logits = generator.normal(size=(1, 6, vocabulary)).astype(np.float32) * 4
    logits[0, 1] -= 1e4  # far from zero
    logits[0, 2, -1] = 40.0  # the last token, beside the padding
    logits[0, 3, :2] = 50.0, 49.5  # both in one chunk
    token, top_prob, gap = session_of(vocabulary).run(["token", "top_prob", "gap"], {"in": logits})
    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    ordered = np.sort(exact, axis=-1)
    assert (token == logits.argmax(-1)).all()
    # Sums of float32, in an order that depends on the processor.
    np.testing.assert_allclose(top_prob, ordered[..., -1], atol=5e-6)
    np.testing.assert_allclose(gap, ordered[..., -1] - ordered[..., -2], atol=5e-6)


@pytest.mark.parametrize("places", [(3, 4), (3, 90), (96, 0)])
def test_of_equal_logits_the_lowest_token_wins(places):
    logits = np.zeros((1, 1, 97), np.float32)
    logits[0, 0, list(places)] = 9.0
    token, gap = session_of(97).run(["token", "gap"], {"in": logits})
    assert token[0, 0] == min(places)
    assert gap[0, 0] == pytest.approx(0.0, abs=1e-7)
