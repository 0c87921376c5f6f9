"""What a request will cost on this machine, and which mode is worth it.

`bench` measures stages, `predict` adds them up for a request, `choose` compares modes by what
`recent` saw.
"""

from ..plan_spec import FillTimes, Machine, PlanSpec, StageTimes
from .bench import machine, measure_times
from .choose import ModeForecast, forecast_modes, pick_mode
from .predict import RequestShape, TimePredictor
from .recent import RecentExits

__all__ = [
    "FillTimes",
    "Machine",
    "ModeForecast",
    "PlanSpec",
    "RecentExits",
    "RequestShape",
    "StageTimes",
    "TimePredictor",
    "forecast_modes",
    "machine",
    "measure_times",
    "pick_mode",
]
