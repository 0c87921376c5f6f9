"""What TensorRT answers with no word but -1 or None is an error of the build, with its log."""

from __future__ import annotations

from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from adainfer_export.build import worker
from adainfer_export.build.builder import SubprocessBuilder
from adainfer_export.build.worker import Job


class ILogger:
    """TensorRT's."""

    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2, INFO=3)


class ScriptedTensorRT:
    """A builder that says no where it is told to, and puts why into its log."""

    ILogger = ILogger
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    ProfilingVerbosity = SimpleNamespace(DETAILED=2)
    BuilderFlag = SimpleNamespace()

    def __init__(self, no):
        self._no = no
        self._input = SimpleNamespace(name="x", shape=(-1, 4))

    def Builder(self, log):
        self._log = log
        network = SimpleNamespace(num_inputs=1, get_input=lambda index: self._input)
        profile = SimpleNamespace(set_shape=lambda *given: self._answer("shape", None))
        config = SimpleNamespace(
            add_optimization_profile=lambda profile: self._answer("added", 0, -1)
        )
        return SimpleNamespace(
            create_network=lambda flags: self._answer("network", network),
            create_builder_config=lambda: self._answer("config", config),
            create_optimization_profile=lambda: self._answer("profile", profile),
            build_serialized_network=lambda network, config: self._answer("plan", b"plan"),
        )

    def OnnxParser(self, network, log):
        return SimpleNamespace(parse_from_file=lambda path: True)

    def _answer(self, what, value, no=None):
        if what != self._no:
            return value
        self._log.log(ILogger.Severity.ERROR, "the reason\nof TensorRT")
        if what == "shape":
            raise ValueError("shape")
        return no


def outcome_of(tmp_path, no, shapes=((1, 4), (2, 4), (8, 4)), name="x"):
    job = Job(
        "tensorrt", "a.onnx", str(tmp_path / "a.plan"), (), ({name: shapes}, {name: shapes}), 3
    )
    return worker._build(ScriptedTensorRT(no), job)


@pytest.mark.parametrize(
    ("no", "error"),
    [
        ("network", "it makes no network"),
        ("config", "it makes no builder configuration"),
        ("profile", "it makes no profile"),
        ("shape", "input x [-1, 4] does not take [(1, 4), (2, 4), (8, 4)]"),
        ("added", "profile 0 is refused"),
        ("plan", "the builder refuses it"),
    ],
)
def test_every_refusal_is_an_outcome(tmp_path, no, error):
    assert outcome_of(tmp_path, no).error == f"{error}: the reason of TensorRT"
    assert not (tmp_path / "a.plan").exists()


def test_what_is_not_refused_is_written(tmp_path):
    assert outcome_of(tmp_path, None).error is None
    assert (tmp_path / "a.plan").read_bytes() == b"plan"


def test_an_input_that_the_layout_does_not_know(tmp_path):
    found = outcome_of(tmp_path, None, name="y").error
    assert found == "input x has no shapes; export the model again"


def test_tensorrt_rtx_refuses_a_profile_in_one_line(tmp_path):
    """The real one: it only logs that the smallest shape is larger than the largest."""
    pytest.importorskip("tensorrt_rtx")
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", 4]) for name in ("x", "y")
    )
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "a.onnx")
    for shapes, message in (
        (((8, 4), (2, 4), (1, 4)), "profile 0 is refused: "),
        (((1, 4), (2, 4), (8, 4)), None),
    ):
        job = Job(
            "tensorrt-rtx",
            str(tmp_path / "a.onnx"),
            str(tmp_path / "a.plan"),
            (89,),
            ({"x": shapes},),
            3,
        )
        error = SubprocessBuilder("tensorrt-rtx").build(job).error
        assert (error or "").startswith(message or "")
        assert (error is None) == (message is None)
        assert "\n" not in (error or "")
    job = Job("tensorrt-rtx", job.onnx, job.plan, (87,), job.profiles, 3)
    error = SubprocessBuilder("tensorrt-rtx").build(job).error
    assert "does not build for SM 87" in error
