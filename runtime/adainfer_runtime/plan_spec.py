"""What the manifest keeps of a plan: stage times, and the machine they were measured on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["FillTimes", "Machine", "PlanSpec", "StageTimes"]


_Positive = Annotated[int, Field(gt=0, le=1 << 24)]
_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Record):
    """Times hold for it alone. `processor` is the name that the system gives it."""

    device_class: str
    processor: str
    threads: int


class FillTimes(_Record):
    """Medians of measured seconds that approximate K and V take, their way into the cache included.

    Attributes:
        rows: positions filled in one go, ascending; what follows is parallel to it.
        propagate: one skipped layer by its own weights (KV policy `propagate`); empty where the
            target has no stages for it.
        translated: by exit layer: all layers above it (KV policy `translated`).
    """

    rows: Annotated[tuple[_Positive, ...], Field(min_length=1)]
    propagate: tuple[_Seconds, ...] = ()
    translated: dict[int, tuple[_Seconds, ...]] = {}

    @model_validator(mode="after")
    def _parallel(self) -> FillTimes:
        known = (*self.translated.values(), *((self.propagate,) if self.propagate else ()))
        if any(len(seconds) != len(self.rows) for seconds in known):
            raise ValueError("rows and fills must be parallel")
        return self


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
        fills: of approximate K and V; None where the folder makes none, or the times are older.
    """

    rows: tuple[_Positive, ...]
    layer: tuple[_Seconds, ...]
    embed: tuple[_Seconds, ...]
    pair_one: _Seconds
    pair_many: _Seconds
    step: _Seconds
    step_past: Annotated[int, Field(ge=0, le=1 << 24)]
    probe: _Seconds
    candidates: _Seconds
    adapter: _Seconds
    classifier: _Seconds
    shortlist: _Seconds | None = None
    context_rows: tuple[_Positive, ...] = ()
    context: dict[int, tuple[_Seconds, ...]] = {}
    fills: FillTimes | None = None

    @model_validator(mode="after")
    def _parallel(self) -> StageTimes:
        if not len(self.rows) == len(self.layer) == len(self.embed) > 0:
            raise ValueError("rows, layer and embed must be parallel")
        if 0.0 in self.layer:
            raise ValueError("a layer that takes no time")  # other times are shares of it
        if any(len(times) != len(self.context_rows) for times in self.context.values()):
            raise ValueError("context_rows and context must be parallel")
        if self.context and not self.context_rows:
            raise ValueError("context without context_rows")
        return self


class PlanSpec(_Record):
    """What the runtime decides by in mode `auto`."""

    machine: Machine
    times: StageTimes
