"""Exit policies of an engine folder: which graphs a mode evaluates, with which thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .backends import Backend
from .certificate import ExitMode, LevelRequest, device_class, threshold_at_level
from .errors import ExitUnavailableError, RequestError
from .exit_policy import ClassifierExit, CombinedExit, ExitPolicy, NoExit, SomeChecks
from .long_text import LongText
from .manifest import CombinedExitSpec, ExitSpec, Manifest
from .values import require_number

__all__ = ["MODES", "Mode", "PolicyFactory", "Strictness", "known_modes"]

Mode = Literal["off", "adaptive", "context", "combined", "auto", "verified"]
MODES: tuple[Mode, ...] = ("off", "adaptive", "context", "combined", "auto", "verified")


@dataclass(frozen=True)
class Strictness:
    """How sure an exit must be; by default as sure as the calibration's target asks.

    Attributes:
        threshold: of the classifier's score, instead of the manifest's.
        level: a certified share of disagreement, such as 0.02, whose threshold is taken.
        device_class: of the engine; a certificate of another one does not count.
        text: what is asked for, where it is more than one token.
        longest_label: tokens of a choice's longest label, where a choice is asked for.

    Raises:
        RequestError: both are given, or one is no number.
    """

    threshold: float | None = None
    level: float | None = None
    device_class: str = field(default_factory=device_class)
    text: LongText | None = None
    longest_label: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.level is not None:
            raise RequestError("give a threshold or a certified level, not both")
        for name, value in (("threshold", self.threshold), ("level", self.level)):
            if value is None:
                continue
            require_number(name, value)
            if math.isnan(value):  # no score reaches it, and none is below it
                raise RequestError(f"{name} must be a number, found {value}")

    def of(
        self, spec: ExitSpec | CombinedExitSpec, mode: ExitMode, *, among_labels: bool = False
    ) -> tuple[float, float | None]:
        """The threshold for an exit graph, and the share of disagreement that it promises.

        Levels of texts hold for every length, so that they promise as much of the first token.

        Raises:
            ExitUnavailableError: the level is not certified for what is asked.
        """
        if self.level is not None:
            asked = LevelRequest(
                self.level, mode, self.device_class, self.text, self.longest_label, among_labels
            )
            return threshold_at_level(spec, asked)
        if self.threshold is not None:
            return self.threshold, None
        assert spec.threshold is not None  # the manifest's check: points come with a threshold
        return spec.threshold, round(1.0 - spec.target_agreement, 6)


def known_modes(manifest: Manifest) -> tuple[Mode, ...]:
    """The modes that a folder serves as it is, in the order of `MODES`."""
    needs = {
        "adaptive": manifest.exit,
        "context": manifest.context_exit,
        "combined": manifest.combined_exit,
        "auto": manifest.plan,
        "verified": manifest.exit or manifest.exit_points,  # without: only at a layer that is named
    }
    return tuple(mode for mode in MODES if mode == "off" or needs[mode])


@dataclass(frozen=True)
class PolicyFactory:
    """Makes policies over one back end's graphs."""

    backend: Backend
    manifest: Manifest

    def of_mode(
        self, mode: str, strictness: Strictness, classifier: str | None = None
    ) -> ExitPolicy:
        """The policy of a mode (`auto` is none of its own: see `planning`).

        Args:
            classifier: kind of the answer exits' graph, where the folder has several.

        Raises:
            ExitUnavailableError: the folder has no such exits, or the level is not certified.
            RequestError: no such mode.
        """
        if mode in ("off", "verified"):  # drafts are no exits: the full model confirms them
            return NoExit()
        if mode == "adaptive":
            return self._of_graph(self._answer_spec(classifier), strictness, "adaptive")
        if mode == "context":
            return self._of_graph(self._context_spec(), strictness, "context")
        if mode == "combined":
            return self._combined(strictness)
        raise RequestError(f"mode {mode!r} is unknown: {', '.join(MODES[:-1])} or {MODES[-1]}")

    def of_choice(
        self, mode: str, strictness: Strictness, classifier: str | None = None
    ) -> ExitPolicy:
        """The same for choices among labels: the exit graph that was calibrated for them.

        A folder whose calibration data had no labels has none; that of the mode is taken then, or
        the one that is named. It promises nothing of choices: another label may be likelier where
        the likeliest token of all is the same.
        """
        spec = self.manifest.choice_exit
        if mode != "adaptive" or spec is None or classifier is not None:
            policy = self.of_mode(mode, strictness, classifier)
            return SomeChecks(policy, policy.checks) if policy.checks else policy
        return self._of_graph(spec, strictness, "adaptive", over_candidates=True)

    def _of_graph(
        self,
        spec: ExitSpec,
        strictness: Strictness,
        mode: Literal["adaptive", "context"],
        *,
        over_candidates: bool = False,
    ) -> ExitPolicy:
        if spec.classifier is None:
            return NoExit()  # calibrated, and the answer was "do not exit"
        kind: Literal["answer", "context"] = "context" if mode == "context" else "answer"
        threshold, promised = strictness.of(spec, mode, among_labels=over_candidates)
        return self._classifier_exit(spec, threshold, promised, kind, over_candidates)

    def _classifier_exit(
        self,
        spec: ExitSpec,
        threshold: float,
        promised: float | None,
        kind: Literal["answer", "context"],
        over_candidates: bool = False,
    ) -> ClassifierExit:
        assert spec.classifier is not None  # callers look
        return ClassifierExit.of(
            self.backend,
            spec.points,
            spec.classifier,
            self.manifest.model.num_layers,
            threshold,
            kind=kind,
            over_candidates=over_candidates,
            promised=promised,
        )

    def _combined(self, strictness: Strictness) -> CombinedExit:
        spec = self.manifest.combined_exit
        if spec is None:
            raise ExitUnavailableError(
                "this engine has no combined exits: run `adainfer calibrate DIR --context-exit`"
            )
        if strictness.threshold is not None:
            raise RequestError(
                "combined exits have two thresholds: give a certified level instead of one"
            )
        place, promised = strictness.of(spec, "combined")
        answer, context = spec.thresholds_at(place)
        return CombinedExit(
            self._classifier_exit(self._answer_spec(spec.answer), answer, None, "answer"),
            self._classifier_exit(self._context_spec(), context, None, "context"),
            promised=promised,
        )

    def _context_spec(self) -> ExitSpec:
        spec = self.manifest.context_exit
        if spec is None:
            raise ExitUnavailableError(
                "this engine has no context exit: run `adainfer calibrate DIR --context-exit`"
            )
        return spec

    def _answer_spec(self, classifier: str | None) -> ExitSpec:
        spec = self.manifest.exit
        if spec is None:
            raise ExitUnavailableError(
                "this engine has no exit graph: run `adainfer calibrate DIR`, or use mode off"
            )
        if classifier is None:
            return spec
        graphs = self.manifest.exit_graphs
        if classifier not in graphs:
            raise ExitUnavailableError(
                f"this engine has no exit graph with classifier {classifier!r}: it has "
                f"{', '.join(graphs) or 'none'}; run `adainfer calibrate DIR --classifier "
                f"{classifier}`"
            )
        return graphs[classifier]
