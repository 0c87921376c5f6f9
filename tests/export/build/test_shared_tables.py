"""What TensorRT-RTX makes of a product with a matrix that is an input."""

from __future__ import annotations

import importlib
import re

import onnx
import pytest
from onnx import TensorProto, helper

from adainfer_export.build import worker
from adainfer_export.build.shared_tables import multiplies_in_place
from adainfer_export.build.worker import Job

from ...needs import needs_rtx


def write_product(path, vocabulary, width):
    """`logits = x @ table.T`, as probes multiply."""
    half = TensorProto.FLOAT16
    content = bytes(2 * vocabulary * width)
    table = helper.make_tensor("table", half, [vocabulary, width], content, raw=True)
    product = helper.make_node("Gemm", ["x", "table"], ["logits"], transB=1)
    x = helper.make_tensor_value_info("x", half, ["n", width])
    logits = helper.make_tensor_value_info("logits", half, ["n", vocabulary])
    graph = helper.make_graph([product], "g", [x], [logits], [table])
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def scratch_bytes(path, width, monkeypatch, tables):
    """Of the largest profile: one row, or up to 32."""
    trt, said = importlib.import_module("tensorrt_rtx"), []
    make_log = worker._make_log

    def listening(module):
        base = type(make_log(module))

        class Log(base):
            def log(self, level, message):
                said.append(message)
                super().log(level, message)

        return Log()

    monkeypatch.setattr(worker, "_make_log", listening)
    one = (1, width)
    profiles = ({"x": (one, one, one)}, {"x": (one, (32, width), (32, width))})
    plan = path.with_suffix(".plan")
    job = Job("tensorrt-rtx", str(path), str(plan), (86, 120), profiles, 3, None, tables)
    assert worker._build(trt, job).error is None
    monkeypatch.undo()
    sizes = re.findall(r"Max Scratch Memory: (\d+) bytes", "\n".join(said))
    assert len(sizes) == len(profiles)
    return max(map(int, sizes))


@needs_rtx
@pytest.mark.parametrize(
    ("vocabulary", "width", "copied"),
    [(8192, 256, False), (8200, 264, False), (8193, 256, True), (8192, 257, True)],
)
def test_products_read_an_input_where_it_lies(tmp_path, monkeypatch, vocabulary, width, copied):
    """A copy in every run would read and write all of the LM head for a token."""
    path = tmp_path / "product.onnx"
    write_product(path, vocabulary, width)
    held, given = (scratch_bytes(path, width, monkeypatch, tables) for tables in ((), ("table",)))
    assert (given - held >= 2 * vocabulary * width) == copied
    assert multiplies_in_place((vocabulary, width)) == (not copied)
