"""What the manifest says of a graph's inputs and outputs, held against the graph itself.

A manifest that was changed, or is another folder's, is found out before the first request, and not
by a run that fails in the middle of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import StageError
from ..manifest import ClassifierSpec, ExitPoint, Manifest, StageSpec
from .layout import Region, SequenceLayout, StageRun

__all__ = ["GraphForm", "TensorForm", "graph_forms", "require_form"]

_ELEMENTS = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}
# Of a pass, two that differ in positions and in what is before them.
_PASSES = ((1, 0), (2, 3))


@dataclass(frozen=True)
class TensorForm:
    """A tensor's element type and its dimensions; None for those that are free."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class GraphForm:
    """Tensors by name. A graph may have more outputs than these."""

    inputs: Mapping[str, TensorForm]
    outputs: Mapping[str, TensorForm]


def require_form(file: str, session: Any, form: GraphForm) -> None:
    """Compares an ONNX Runtime session with what is expected of it; dimensions that the graph
    leaves open fit any.

    Raises:
        StageError: names, element types or dimensions differ.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    if inputs.keys() != form.inputs.keys():
        raise _differs(file, "inputs", _listed(inputs), _listed(form.inputs))
    if not form.outputs.keys() <= outputs.keys():
        raise _differs(file, "outputs", _listed(outputs), _listed(form.outputs))
    for found, expected in ((inputs, form.inputs), (outputs, form.outputs)):
        for name, tensor in expected.items():
            _require_tensor(file, name, found[name], tensor)


def graph_forms(manifest: Manifest, max_rows: int) -> dict[str, list[GraphForm]]:
    """What is expected of every graph that runs, by its file; there may be several things.

    Raises:
        StageError: the manifest lists other tensors of a stage than the runtime binds.
    """
    found: dict[str, list[GraphForm]] = {}
    for file, form in _all_forms(manifest, SequenceLayout(manifest, max_rows)):
        found.setdefault(file, []).append(form)
    return found


def _all_forms(manifest: Manifest, layout: SequenceLayout) -> Iterator[tuple[str, GraphForm]]:
    width = manifest.model.hidden_size
    yield from _layer_forms(manifest, layout)
    for spec, runs in (
        (manifest.embed, lambda rows, past: layout.embed(rows)),
        (manifest.positions, layout.positions),
    ):
        if spec is not None:
            yield from _stage_forms(spec, runs)
    yield from _probe_forms(manifest)
    for layer, fill in manifest.kv_fills.items():
        caches = _tensor((1, manifest.kv.heads(layer), None, manifest.kv.head_dim))
        yield from _named(fill, _rows(width), {"key": caches, "value": caches})
    for point in manifest.exit_points.values():
        if point.adapter is not None:
            adapted = {"adapted": _tensor((1, None, width)), "trust": _tensor((1, None))}
            yield point.adapter, GraphForm({"hidden": _tensor((None, None, width))}, adapted)
    for layer, point in manifest.context_points.items():
        if point.translate is not None:
            yield point.translate, _translator_form(manifest, layer, point)
    for classifier in manifest.classifiers:
        yield classifier.graph, _classifier_form(classifier)


def _layer_forms(manifest: Manifest, layout: SequenceLayout) -> Iterator[tuple[str, GraphForm]]:
    for index, spec in enumerate(manifest.layer_stages):

        def run(rows: int, past: int, index: int = index) -> StageRun:
            return layout.stage(index, rows, past)

        yield from _stage_forms(spec, run)
        if manifest.batched:
            yield from _named_run(spec, layout.batch_stage(index, 0, 2))


def _stage_forms(
    spec: StageSpec, runs: Callable[[int, int], StageRun | None]
) -> Iterator[tuple[str, GraphForm]]:
    for rows, past in _PASSES:
        run = runs(rows, past)
        if run is not None:
            yield from _named_run(spec, run)


def _named_run(spec: StageSpec, run: StageRun) -> Iterator[tuple[str, GraphForm]]:
    form = GraphForm(_of_regions(run.inputs), _of_regions(run.outputs))
    yield from _named(spec, form.inputs, form.outputs)


def _named(
    spec: StageSpec, inputs: Mapping[str, TensorForm], outputs: Mapping[str, TensorForm]
) -> Iterator[tuple[str, GraphForm]]:
    """Of both graphs of a stage, whose manifest entry must name the same tensors."""
    for what, listed, used in (
        ("inputs", spec.inputs, inputs),
        ("outputs", spec.outputs, outputs),
    ):
        if {*listed} != used.keys():
            raise _differs(spec.file, what, _listed(used), _listed(listed))
    for file in (spec.file, spec.wide_file):
        if file is not None:
            yield file, GraphForm(inputs, outputs)


def _probe_forms(manifest: Manifest) -> Iterator[tuple[str, GraphForm]]:
    width, vocabulary = manifest.model.hidden_size, manifest.model.vocab_size
    hidden = {"hidden": _tensor((None, None, width))}
    found = {"token": TensorForm("int64", (None, None))}
    found |= {name: _tensor((None, None)) for name in ("top_prob", "gap")}
    all_rows = {"logits": _tensor((None, None, vocabulary)), **found}
    yield from _named(manifest.probe, hidden, all_rows)
    if manifest.probe.logits_file is not None:
        yield manifest.probe.logits_file, GraphForm(hidden, {"logits": all_rows["logits"]})
    candidates = {"candidates": TensorForm("int64", (None,))}
    some_rows = {"logits": _tensor((None, None, None)), **found}
    yield from _named(manifest.candidates, hidden | candidates, some_rows)
    if manifest.shortlist is not None:
        proposed = {"logits": _tensor((vocabulary,)), "log_sum_exp": _tensor((None,))}
        yield manifest.shortlist.file, GraphForm(hidden, proposed | candidates)


def _rows(width: int) -> dict[str, TensorForm]:
    return {"hidden": _tensor((None, None, width)), "start": TensorForm("int64", (1,))}


def _translator_form(manifest: Manifest, layer: int, point: ExitPoint) -> GraphForm:
    known = {
        "hidden": _tensor((None, manifest.model.hidden_size)),
        "start": TensorForm("int64", (1,)),
    }
    above = manifest.model.num_layers - layer
    caches = _tensor((above, manifest.kv.num_heads, None, manifest.kv.head_dim))
    inputs: dict[str, TensorForm] = {name: known[name] for name in point.translate_inputs}
    return GraphForm(inputs, {"key": caches, "value": caches})


def _classifier_form(classifier: ClassifierSpec) -> GraphForm:
    state = _tensor((None, classifier.state_size))
    known = {
        "token": TensorForm("int64", (None,)),
        "state": state,
        "logits": _tensor((None, None)),
    }
    inputs: dict[str, TensorForm] = {
        name: known.get(name, _tensor((None,))) for name in classifier.inputs
    }
    return GraphForm(inputs, {"score": _tensor((None,)), "next_state": state})


def _tensor(shape: tuple[int | None, ...]) -> TensorForm:
    return TensorForm("float32", shape)


def _of_regions(regions: Mapping[str, Region]) -> dict[str, TensorForm]:
    return {name: TensorForm(region.dtype, region.shape) for name, region in regions.items()}


def _require_tensor(file: str, name: str, found: Any, expected: TensorForm) -> None:
    if _ELEMENTS.get(found.type) != expected.dtype:
        raise _differs(file, name, found.type, expected.dtype)
    # ONNX Runtime writes [] for a tensor of unknown rank as for a scalar.
    if found.shape and not _fits(found.shape, expected.shape):
        raise _differs(file, name, _dimensions(found.shape), _dimensions(expected.shape))


def _fits(found: Iterable[object], expected: tuple[int | None, ...]) -> bool:
    sizes = tuple(size if isinstance(size, int) else None for size in found)
    return len(sizes) == len(expected) and all(
        None in (here, there) or here == there for here, there in zip(sizes, expected, strict=True)
    )


def _differs(file: str, what: str, found: str, expected: str) -> StageError:
    return StageError(
        f"{file}: {what}: the graph has {found}, the manifest {expected}; export the model again"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _dimensions(shape: Iterable[object]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
