"""The `ort-cuda` dialect: every node has a kernel of ONNX Runtime's CUDA provider.

No CUDA provider is here to ask, so its documented kernels are looked up: those of
`docs/OperatorKernels.md` in ONNX Runtime's repository (as of TensorScatter's kernel), for the
operators that the dialect uses: versions, and types of elements.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import defs

from adainfer_export import ExportRequest, export
from adainfer_export.calibrate.affine import AffineMap
from adainfer_export.calibrate.classifiers import CLASSIFIERS
from adainfer_export.calibrate.convert import lower_adapter, lower_classifier
from adainfer_export.calibrate.translate import Translator, lower_translator, read_rotary
from adainfer_export.calibrate.trust import Trust
from adainfer_export.graph_builder import serialise
from adainfer_export.lower.cuda import OPSET
from adainfer_runtime.backends.layout import FIRST_POSITION
from adainfer_runtime.backends.ort_cpu import open_session

from .synthetic import fit_classifier, synthetic
from .test_standard_dialects import differences

VARIANTS = ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "phi3"]

# First and last version of each kernel; without a last one it serves its first version alone.
KERNELS = {
    "Abs": [(6, 12), (13, None)],
    "Add": [(7, 12), (13, 13), (14, None)],
    "And": [(7, None)],
    "Cast": [(6, 8), (9, 12), (13, 18), (19, 20), (21, 22), (23, None)],
    "Concat": [(4, 10), (11, 12), (13, None)],
    "Div": [(7, 12), (13, 13), (14, None)],
    "Equal": [(7, 10), (11, 12), (13, None)],
    "Exp": [(6, 12), (13, None)],
    "Gather": [(1, 10), (11, 12), (13, None)],
    "GatherElements": [(11, 12), (13, None)],
    "GatherND": [(11, 11), (12, 12), (13, None)],
    "Gelu": [(20, None)],
    "Gemm": [(7, 8), (9, 10), (11, 12), (13, None)],
    "Identity": [(1, 12), (13, 13), (14, 18), (19, None)],
    "LayerNormalization": [(1, 16), (17, None)],
    "Less": [(7, 8), (9, 12), (13, None)],
    "LessOrEqual": [(12, 15), (16, None)],
    "Log": [(6, 12), (13, None)],
    "MatMul": [(1, 8), (9, 12), (13, None)],
    "Max": [(6, 11), (12, 12), (13, None)],
    "Min": [(6, 11), (12, 12), (13, None)],
    "Mod": [(10, 12), (13, None)],
    "Mul": [(7, 12), (13, 13), (14, None)],
    "Neg": [(6, 12), (13, None)],
    "Not": [(1, None)],
    "Pad": [(2, 10), (11, 12), (13, 17), (18, None)],
    "ReduceLogSumExp": [(1, 17), (18, None)],
    "ReduceMax": [(1, 17), (18, None)],
    "ReduceMin": [(1, 17), (18, None)],
    "ReduceSum": [(1, 12), (13, None)],
    "Relu": [(6, 12), (13, 13), (14, None)],
    "Reshape": [(5, 12), (13, 13), (14, 18), (19, 20), (21, 22), (23, None)],
    "ScatterElements": [(11, 12), (13, 15), (16, 17), (18, None)],
    "Slice": [(1, 9), (10, 10), (11, 12), (13, None)],
    "Softmax": [(1, 10), (11, 12), (13, None)],
    "Split": [(2, 10), (11, 12), (13, 17), (18, None)],
    "Squeeze": [(1, 10), (11, 12), (13, 20), (21, 22), (23, None)],
    "Sub": [(7, 12), (13, 13), (14, None)],
    "Tanh": [(6, 12), (13, None)],
    "TopK": [(1, 9), (10, 10), (11, None)],
    "Transpose": [(1, 12), (13, 20), (21, 22), (23, None)],
    "Unsqueeze": [(1, 10), (11, 12), (13, 20), (21, 22), (23, None)],
    "Where": [(9, 15), (16, None)],
}
# Of ONNX Runtime's own operators, all of version 1; the first is in ONNX's domain there.
CONTRIB = {
    "SimplifiedLayerNormalization",
    "FastGelu",
    "Gelu",
    "GroupQueryAttention",
    "MatMulNBits",
    "QuickGelu",
    "RotaryEmbedding",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}
# Element types of the data that kernels take at opset 18, of those types that graphs hold.
INTEGERS, HALVES = {"INT32", "INT64"}, {"FLOAT16", "BFLOAT16"}
FLOATS = {"FLOAT", *HALVES}
NUMBERS = FLOATS | INTEGERS
ANYTHING = NUMBERS | {"BOOL", "UINT8"}
WITHOUT_BF16 = {"FLOAT", "FLOAT16"}
TYPES = {
    **dict.fromkeys(("Cast", "Concat", "Gather", "GatherElements", "Identity"), ANYTHING),
    **dict.fromkeys(("Reshape", "ScatterElements", "Slice", "Split", "Squeeze"), ANYTHING),
    **dict.fromkeys(("Transpose", "Unsqueeze"), ANYTHING),
    **dict.fromkeys(("Abs", "Add", "Div", "Max", "Min", "Mod", "Mul", "Neg", "Sub"), NUMBERS),
    **dict.fromkeys(("ReduceSum", "Where"), NUMBERS),
    **dict.fromkeys(("Exp", "Gemm", "LayerNormalization", "MatMul", "Relu"), FLOATS),
    **dict.fromkeys(("Softmax", "Tanh"), FLOATS),
    **dict.fromkeys(("Less", "LessOrEqual", "ReduceMax", "ReduceMin"), WITHOUT_BF16 | INTEGERS),
    **dict.fromkeys(("Log", "ReduceLogSumExp"), WITHOUT_BF16),
    "And": {"BOOL"},
    "Equal": WITHOUT_BF16 | INTEGERS | {"BOOL"},
    "GatherND": FLOATS | {"INT64"},
    "Not": {"BOOL"},
    "Pad": WITHOUT_BF16 | {"BOOL"},
    "TopK": WITHOUT_BF16 | INTEGERS,
    **dict.fromkeys(CONTRIB, FLOATS),
    "GroupQueryAttention": HALVES,
}
MADE = {"And": "BOOL", "Equal": "BOOL", "Less": "BOOL", "LessOrEqual": "BOOL", "Not": "BOOL"}


def refused_types(graph):
    """Operators whose kernel does not take the type of their data, with that type."""
    known = {value: value.dtype.name for value in graph.inputs}
    known |= {value: value.dtype.name for value in graph.initializers.values()}
    found = set()
    for node in graph:
        types = [None if value is None else known[value] for value in node.inputs]
        data = types[1:] if node.op_type == "Where" else types  # behind the condition
        # Further inputs that are no floats are indices, shapes and axes.
        for kind in {data[0], *(FLOATS & {*data})} - TYPES[node.op_type]:
            found.add(f"{node.op_type} of {kind}")
        for value, kind in zip(node.outputs, made_types(node, types), strict=False):
            assert value.dtype is None or value.dtype.name == kind, (node.op_type, value.name)
            known[value] = kind
    return sorted(found)


def made_types(node, types):
    """Of a node's outputs: mostly the first input's."""
    if node.op_type == "Cast":
        return [ir.DataType(node.attributes["to"].as_int()).name]
    if node.op_type == "TopK":
        return [types[0], "INT64"]
    if node.op_type == "GroupQueryAttention":
        return [types[0], types[3], types[4]]
    place = node.op_type in ("SimplifiedLayerNormalization", "Where")  # the scale's; behind it
    return [MADE.get(node.op_type, types[int(place)])] * len(node.outputs)


def lacking(graph, opset):
    """Operators of a graph that the CUDA provider would leave to the CPU."""
    return sorted({node.op_type for node in graph if not has_kernel(node, opset)})


def has_kernel(node, opset):
    if node.domain == "com.microsoft" or node.op_type == "SimplifiedLayerNormalization":
        return node.op_type in CONTRIB
    version = defs.get_schema(node.op_type, opset).since_version
    return any(
        first == version or (last is not None and first <= version <= last)
        for first, last in KERNELS.get(node.op_type, ())
    )


def check_onnx(path):
    """ONNX's own checker; it does not know what ONNX Runtime added to ONNX's domain."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    external = path.with_name("checked.onnx")
    onnx.save(model, external)
    try:
        onnx.checker.check_model(str(external))
    finally:
        external.unlink()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_node_of_every_stage_has_a_cuda_kernel(tiny, tmp_path, variant, precision):
    """Of the stage's opset, for the types that it gets. (bf16 does not load on a CPU.)"""
    checkpoint, folder = str(tiny(variant).checkpoint), tmp_path / "engines"
    request = ExportRequest(checkpoint, folder, target="ort-cuda", precision=precision)
    for stage in export(request).manifest.stages:
        model = ir.load(folder / stage.file)
        assert (model.opset_imports[""], model.ir_version) == (OPSET, 10) == (18, 10)
        assert lacking(model.graph, OPSET) == [], stage.name
        assert refused_types(model.graph) == [], stage.name
        check_onnx(folder / stage.file)


def test_types_without_a_kernel_are_found(tiny):
    """Every 16-bit value made a bfloat16, which TopK does not take."""
    made = tiny("llama", target="ort-cuda", precision="fp16")
    graphs = [ir.load(made.folder / stage.file).graph for stage in made.engine.manifest.stages]
    for graph in graphs:
        for node in list(graph):
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.BFLOAT16)
        for value in [value for node in graph for value in node.outputs]:
            value.dtype = None
    found = {line for graph in graphs for line in refused_types(graph)}
    assert "TopK of BFLOAT16" in found


def test_newer_opsets_would_leave_nodes_to_the_cpu(tiny):
    """What the opset is for: the probe's features, in which forms changed since."""
    made = tiny("llama", target="ort-cuda", precision="fp16")
    probe = ir.load(made.folder / made.engine.manifest.probe.file).graph
    assert lacking(probe, 21) == ["ReduceMax"]
    assert lacking(probe, 24) == ["Cast", "ReduceMax", "Reshape", "Squeeze", "TopK", "Unsqueeze"]


@pytest.mark.parametrize("variant", ["gpt_neox", "gemma2", "gpt2"])
def test_stages_equal_those_of_ort_cpu(tiny, variant):
    """Positions that are given, and GELU in ONNX Runtime's own operator."""
    made = tiny(variant, target="ort-cuda", precision="fp16")
    hidden, caches = differences(made, tiny(variant))
    assert hidden <= 0.03
    assert caches <= 0.03


def test_the_first_position_is_an_input_where_rotary_stands_apart(tiny):
    for variant, told in (("gpt_neox", True), ("llama", False)):
        manifest = tiny(variant, target="ort-cuda", precision="fp16").engine.manifest
        assert {FIRST_POSITION in stage.inputs for stage in manifest.layer_stages} == {told}


def test_exit_graphs_have_cuda_kernels(tiny):
    made = tiny("llama", target="ort-cuda", precision="fp16")
    manifest, random = made.engine.manifest, np.random.default_rng(0)
    width, outputs = manifest.model.hidden_size, 2 * 2 * 2 * 16

    def affine(count):
        matrix = random.normal(size=(width, count)).astype(np.float32)
        return AffineMap(matrix, np.zeros(count, np.float32))

    adapter = lower_adapter(affine(width), Trust(np.ones(width, np.float32), 0.0))
    rotary = read_rotary(made.folder, manifest)
    translator = lower_translator(Translator(2, affine(outputs)), rotary, manifest)
    for model in (adapter, translator):
        assert lacking(model.graph, model.opset_imports[""]) == []
        assert refused_types(model.graph) == []
    path = made.folder / "stages" / "translate.onnx"
    path.write_bytes(serialise(translator))
    check_onnx(path)
    hidden = random.normal(size=(5, width)).astype(np.float32)
    key, _ = open_session(path).run(None, {"hidden": hidden, "start": np.array([3])})
    path.unlink()
    plain = (hidden @ translator_matrix(translator)).reshape(5, 2, 2, 2, 16)[:, :, 0]
    turned = rotary.undo(
        np.concatenate([np.zeros((4, 3, 16), np.float32), key.reshape(4, 5, 16)], 1)
    )
    np.testing.assert_allclose(
        turned[:, 3:].reshape(2, 2, 5, 16), plain.transpose(1, 2, 0, 3), atol=0.02
    )


@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_classifiers_have_cuda_kernels(kind):
    features = CLASSIFIERS[kind].feature_sets[-1]
    model = lower_classifier(fit_classifier(kind, synthetic(noise=0.05), (4, 8), features))
    assert lacking(model.graph, model.opset_imports[""]) == []
    assert refused_types(model.graph) == []
    assert "Equal" in lacking(model.graph, 21)  # what they had


def translator_matrix(model):
    return model.graph.initializers["matrix"].const_value.numpy().astype(np.float32)
