"""Bound runs: by ONNX Runtime's own extension where its insides are known, else by its Python."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from adainfer_runtime.backends.ort_stage import OrtStage
from adainfer_runtime.errors import StageError


class Session:
    """What `OrtStage` uses of one; `asked` are the runs, by way and arguments."""

    def __init__(self, *, inner, fails=False):
        self.asked = []
        self.fails = fails
        self.run = None
        if inner:
            self._sess = SimpleNamespace(run_with_iobinding=lambda *a: self.ran("inner", *a))
        self.inner = inner

    def ran(self, way, *arguments):
        self.asked.append((way, *arguments))
        if self.fails:
            raise RuntimeError("out of\nmemory")

    def run_with_iobinding(self, binding):
        self.ran("public", binding)

    def io_binding(self):
        self.binding = SimpleNamespace()
        if self.inner:
            self.binding._iobinding = "bound"
        return self.binding


def test_runs_go_the_short_way_where_there_is_one():
    session = Session(inner=True)
    OrtStage("layer.onnx", session).bind({}, {})()
    assert session.asked == [("inner", "bound", None)]


def test_others_go_by_the_public_one():
    session = Session(inner=False)
    OrtStage("layer.onnx", session).bind({}, {})()
    assert session.asked == [("public", session.binding)]


@pytest.mark.parametrize("inner", [True, False])
def test_errors_name_the_stage(inner):
    run = OrtStage("layer.onnx", Session(inner=inner, fails=True)).bind({}, {})
    with pytest.raises(StageError, match=r"layer\.onnx cannot be run by ONNX Runtime: out of"):
        run()
