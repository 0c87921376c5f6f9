"""The shapes that a plan is built for: one profile for decoding, one for prompts.

They are read off the layout that the runtime binds by, at its smallest, usual and largest pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adainfer_runtime.backends.layout import (
    CANDIDATE_ROWS,
    PROBED_ROWS,
    SequenceLayout,
    StageRun,
)
from adainfer_runtime.manifest import Manifest

__all__ = ["Profile", "ShapeRange", "profiles_of"]

Shape = tuple[int, ...]
_USUAL_ROWS = 128
_FEWEST_LOGITS = 2  # of a choice


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, usual and largest shape of an input."""

    smallest: Shape
    usual: Shape
    largest: Shape


Profile = Mapping[str, ShapeRange]


def profiles_of(
    manifest: Manifest, file: str, max_rows: int, *, single: bool = False
) -> tuple[Profile, ...]:
    """Profiles of one of the folder's ONNX files; the first is for one position at a time.

    With `single` there is one that spans them, tuned for one position: a plan with two may hold
    16-bit weights twice, in a layout for each.
    """
    profiles = _profiles(manifest, file, max_rows)
    if not single:
        return profiles
    first, last = profiles[0], profiles[-1]
    spanning = {
        name: ShapeRange(first[name].smallest, first[name].usual, last[name].largest)
        for name in first
    }
    return (spanning,)


def _profiles(manifest: Manifest, file: str, max_rows: int) -> tuple[Profile, ...]:
    layout = SequenceLayout(manifest, max_rows)
    length = manifest.kv.max_length
    usual = min(_USUAL_ROWS, max_rows)
    # (rows, past) of the smallest, usual and largest pass; a profile is a box of shapes, so the
    # largest rows and the largest past stand together although no pass has both.
    decode = ((1, 0), (1, length // 4), (1, length))
    prefill = ((1, 0), (usual, length // 4), (max_rows, length))
    for index, stage in enumerate(manifest.layer_stages):
        if stage.file == file:
            return tuple(
                _merge(*(layout.stage(index, rows, past) for rows, past in passes))
                for passes in (decode, prefill)
            )
    return _other_profiles(manifest, layout, file, prefill)


def _other_profiles(
    manifest: Manifest, layout: SequenceLayout, file: str, passes: tuple[tuple[int, int], ...]
) -> tuple[Profile, ...]:
    width = manifest.model.hidden_size
    rows = tuple(count for count, _ in passes)
    one = _range((1, 1, width), 1, 1, 1)
    if file == manifest.embed.file:
        return (_merge(*(layout.embed(count) for count in rows)),)
    if manifest.positions is not None and file == manifest.positions.file:
        runs = [layout.positions(count, past) for count, past in passes]
        return (_merge(*(run for run in runs if run is not None)),)
    if file == manifest.probe.file:
        most = min(PROBED_ROWS, rows[-1])
        return {"hidden": one}, {"hidden": _range((1, 1, width), 1, most, most)}
    if file == manifest.candidates.file:
        limit = min(CANDIDATE_ROWS, manifest.model.vocab_size)
        return ({"hidden": one, "candidates": ShapeRange((2,), (4,), (limit,))},)
    for point in manifest.context_points.values():
        if point.translate == file:
            hidden = ShapeRange(*((count, width) for count in rows))
            shapes = {"hidden": hidden, "start": ShapeRange((1,), (1,), (1,))}
            return ({name: shapes[name] for name in point.translate_inputs},)
    return (_exit_profile(manifest, file, one),)


def _exit_profile(manifest: Manifest, file: str, hidden: ShapeRange) -> Profile:
    """Of a classifier or an adapter."""
    for classifier in manifest.classifiers:
        if classifier.graph == file:
            vocabulary = (1, manifest.model.vocab_size)
            ranges = dict.fromkeys(classifier.inputs, ShapeRange((1,), (1,), (1,)))
            known = {
                "state": ShapeRange(*((1, classifier.state_size),) * 3),
                "logits": ShapeRange((1, _FEWEST_LOGITS), vocabulary, vocabulary),
            }
            return ranges | {name: known[name] for name in known.keys() & ranges}
    return {"hidden": hidden}


def _range(shape: Shape, smallest: int, usual: int, largest: int) -> ShapeRange:
    shapes = [(shape[0], rows, *shape[2:]) for rows in (smallest, usual, largest)]
    return ShapeRange(*shapes)


def _merge(smallest: StageRun, usual: StageRun, largest: StageRun) -> Profile:
    return {
        name: ShapeRange(*(run.inputs[name].shape for run in (smallest, usual, largest)))
        for name in smallest.inputs
    }
