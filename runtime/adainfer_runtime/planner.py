"""What a request is expected to take in each mode, on this machine."""

from __future__ import annotations

import logging
from functools import cached_property

from .certificate import device_option
from .decode_costs import DecodeCosts, decode_costs
from .decode_plan import DecodeForecast, best_drafting, forecast_decode
from .errors import ExitUnavailableError, RequestError
from .manifest import Manifest
from .mode_policies import PolicyFactory, Strictness
from .planning import (
    Machine,
    ModeForecast,
    RecentExits,
    RequestShape,
    TimePredictor,
    forecast_modes,
    pick_mode,
)
from .planning.choose import exit_shares
from .session import ExitProbe

__all__ = ["Planner"]

_LOG = logging.getLogger(__name__)


class Planner:
    """Forecasts by the folder's plan, which names the machine that it was measured on.

    Attributes:
        recent: where requests of late left.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        device_class: str,
        max_rows: int,
        here: Machine | None,
    ) -> None:
        """`max_rows` positions go through the back end in one pass; `here` is this machine, None
        where nobody asked.
        """
        self.recent = RecentExits()
        self._manifest = manifest
        self._device_class = device_class
        self._max_rows = max_rows
        self._here = here
        self._warned = False
        self._costs: dict[ExitProbe, DecodeCosts] = {}

    def pick(
        self, policies: PolicyFactory, shape: RequestShape | None, strictness: Strictness
    ) -> ModeForecast:
        """What mode `auto` takes.

        Raises:
            ExitUnavailableError: see `forecasts`.
            RequestError: no shape is given.
        """
        if shape is None:
            raise RequestError("mode auto decides by the request's shape: give one")
        return pick_mode(self.forecasts(policies, shape, strictness))

    def forecasts(
        self, policies: PolicyFactory, shape: RequestShape, strictness: Strictness
    ) -> tuple[ModeForecast, ...]:
        """What each mode is expected to take for such a request, `off` first.

        Raises:
            ExitUnavailableError: the folder has no plan, or one of another class of device.
        """
        plan = self._manifest.plan
        if plan is None:
            raise ExitUnavailableError(
                "this engine has no plan, which mode auto decides by: run `adainfer bench DIR"
                f"{device_option(self._device_class)}`"
            )
        if plan.machine.device_class != self._device_class:
            raise ExitUnavailableError(
                f"the plan's times are of {plan.machine.device_class}, this is "
                f"{self._device_class}: run `adainfer bench DIR{device_option(self._device_class)}`"
            )
        self._warn_of_other_machine(plan.machine)
        predictor = TimePredictor(plan.times, self._manifest.model.num_layers, self._max_rows)
        return forecast_modes(policies, predictor, shape, strictness, self.recent, self._drafting)

    def decode_costs(self, probe: ExitProbe) -> DecodeCosts:
        """What drafts and looks at exit points cost here, with the probe they use."""
        known = self._costs.get(probe)
        if known is None:
            known = decode_costs(self._manifest, self._here, shortlist=probe == "shortlist")
            self._costs[probe] = known
        return known

    def decode_forecasts(
        self, policies: PolicyFactory, *, level: float | None
    ) -> tuple[DecodeForecast, ...]:
        """What exits and drafts are expected to gain in decode, see `Engine.decode_forecasts`."""
        spec, looks = self._manifest.exit, None
        if spec is not None and spec.exit_shares and level is None:
            strictness = Strictness(device_class=self._device_class)
            policy = policies.of_mode("adaptive", strictness)
            layers = tuple(check.layer for check in policy.checks)
            shares = exit_shares(spec, strictness, "adaptive")
            looks = (layers, shares) if layers else None
        return forecast_decode(self._manifest, self.decode_costs, looks)

    @cached_property
    def _drafting(self) -> float:
        """Expected time of a token in mode `verified`, as a share of the full model's."""
        return best_drafting(self._manifest, self.decode_costs("full"))

    def _warn_of_other_machine(self, planned: Machine) -> None:
        if self._here is not None and planned != self._here and not self._warned:
            self._warned = True
            _LOG.warning(
                "the plan that mode auto goes by was measured on %s with %d threads, this is %s "
                "with %d: run `adainfer bench DIR%s` here",
                planned.processor,
                planned.threads,
                self._here.processor,
                self._here.threads,
                device_option(self._device_class),
            )
