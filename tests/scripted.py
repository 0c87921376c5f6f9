"""Exits at will."""

from __future__ import annotations

from adainfer_runtime.exit_policy import ExitCheck


class ScriptedExit:
    """Exits at given layers, one per position; 0 runs all layers."""

    state_size = 0
    over_candidates = False
    promised = None

    def __init__(self, layers, boundaries):
        self._script = iter(layers)
        self.checks = tuple(ExitCheck(layer) for layer in boundaries)
        self._wanted = 0

    def next(self):
        self._wanted = next(self._script)

    def decide(self, check, evidence, state):
        return check.layer == self._wanted, state
