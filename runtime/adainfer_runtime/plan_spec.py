"""What the manifest keeps of a plan: stage times, and the machine they were measured on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Machine", "PlanSpec", "StageTimes"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Record):
    """Times hold for it alone. `processor` is the name that the system gives it."""

    device_class: str
    processor: str
    threads: int


class StageTimes(_Record):
    """Medians of measured seconds.

    Attributes:
        rows: positions in one pass, ascending; `layer` and `embed` are parallel to it.
        layer: one layer over so many positions, nothing before them.
        pair_one, pair_many: one layer, per position and position before the pass that it attends
            to: of a pass of one position, and of many.
        step: a generated token, all of it, after `step_past` positions.
        probe, adapter, classifier: one position.
        candidates: a probe over a handful of rows; `shortlist` the low-rank one, if there is any.
        context_rows: positions of a prompt, ascending; `context` is parallel to it.
        context: by exit layer: translation, and the last positions through the layers above.
    """

    rows: tuple[int, ...]
    layer: tuple[float, ...]
    embed: tuple[float, ...]
    pair_one: float
    pair_many: float
    step: float
    step_past: int
    probe: float
    candidates: float
    adapter: float
    classifier: float
    shortlist: float | None = None
    context_rows: tuple[int, ...] = ()
    context: dict[int, tuple[float, ...]] = {}

    @model_validator(mode="after")
    def _parallel(self) -> StageTimes:
        if not len(self.rows) == len(self.layer) == len(self.embed) > 0:
            raise ValueError("rows, layer and embed must be parallel")
        if any(len(times) != len(self.context_rows) for times in self.context.values()):
            raise ValueError("context_rows and context must be parallel")
        return self


class PlanSpec(_Record):
    """What the runtime decides by in mode `auto`."""

    machine: Machine
    times: StageTimes
