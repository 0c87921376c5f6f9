"""Methods that can be compared: a name, and how it answers. Adding one is an entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..engine import Engine
from ..errors import RequestError
from ..exit_policy import ExitPolicy, FixedExit
from ..manifest import Manifest
from ..mode_policies import Mode
from ..planning import RequestShape
from .shortgpt import drop_layers

__all__ = ["BASELINE", "Method", "make_methods"]

BASELINE = "off"
_WHOLE_MODES: dict[str, Mode] = {"context": "context", "combined": "combined"}


@dataclass(frozen=True)
class Method:
    """An engine, and who decides when it stops, by the shape of the request."""

    name: str
    engine: Engine
    policy_of: Callable[[RequestShape], ExitPolicy]

    @classmethod
    def of(cls, name: str, engine: Engine, policy: ExitPolicy) -> Method:
        """One policy for all requests."""
        return cls(name, engine, lambda shape: policy)


def make_methods(
    names: Sequence[str],
    folder: Path,
    engine: Engine,
    *,
    labels_only: bool = False,
    threshold: float | None = None,
    level: float | None = None,
) -> tuple[Method, ...]:
    """The methods of these names; `off`, which all are compared with, comes first.

    Names are `off`, `adaptive` (the folder's default exit graph, or the one for choices), the kind
    of an exit graph's classifier (`svm`, `crf` …), `context` (the context exit), `combined` (answer
    and context exits), `auto` (what the plan expects to be fastest), `fixed:L` (stop after layer L,
    by the adapter if the folder has one there) and `shortgpt:N` (the N layers of least influence
    left out).

    Args:
        engine: of the folder; further engines on the same files are loaded where a method needs
            other stages.
        labels_only: whether choices among labels are going to be asked for.
        threshold, level: of the methods with a classifier, see `Engine.policy`. (Of a level the
            threshold is taken whatever labels the prompts have.)

    Raises:
        RequestError: no such method, or its number makes no sense here.
        ExitUnavailableError: the folder has no such exit graph.
    """
    manifest = engine.manifest
    policy_of = engine.choice_policy if labels_only else engine.policy

    @cache
    def load(variant: Callable[[Manifest], Manifest]) -> Engine:
        return Engine.of_manifest(folder, variant(manifest), device=engine.device)

    def make(name: str) -> Method:
        word, _, number = name.partition(":")
        if word == "fixed":
            layer = _number(name, number)
            stops = engine if layer in manifest.boundaries else load(_as_cut)
            _check_boundary(name, layer, stops.manifest)
            return Method.of(name, stops, FixedExit(layer))
        if word == "shortgpt":
            count = _number(name, number)
            fewer = drop_layers(manifest, count)
            shortened = Engine.of_manifest(folder, fewer, device=engine.device)
            return Method.of(name, shortened, shortened.policy("off"))
        if name == "auto":
            policy_of("auto", shape=RequestShape(1), level=level)  # a folder without a plan says so
            return Method(name, engine, lambda s: policy_of("auto", shape=s, level=level))
        if name == BASELINE:
            return Method.of(name, engine, engine.policy("off"))
        if name in _WHOLE_MODES:
            policy = policy_of(_WHOLE_MODES[name], threshold=threshold, level=level)
            return Method.of(name, engine, policy)
        if number or word not in ("adaptive", *manifest.exit_graphs):
            graphs = ", ".join(manifest.exit_graphs) or "none"
            raise RequestError(
                f"method {name!r} is unknown: off, adaptive, context, combined, auto, "
                f"fixed:L, shortgpt:N, or the kind of an exit graph (this engine's: {graphs}; see "
                "calibrate --classifier)"
            )
        kind = None if word == "adaptive" else word
        policy = policy_of("adaptive", classifier=kind, threshold=threshold, level=level)
        return Method.of(name, engine, policy)

    return tuple(make(name) for name in dict.fromkeys((BASELINE, *names)))


def _as_cut(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"joined": ()})


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise RequestError(f"method {name!r} needs a number of layers after its colon")
    return int(text)


def _check_boundary(name: str, layer: int, manifest: Manifest) -> None:
    if layer not in manifest.boundaries[:-1]:
        raise RequestError(
            f"method {name!r}: layer {layer} is no boundary between engines: "
            f"{', '.join(map(str, manifest.boundaries[:-1]))}"
        )
