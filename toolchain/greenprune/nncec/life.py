"""How a network is used: a fleet of devices over years, and the carbon that making them took."""

from __future__ import annotations

import math
from dataclasses import dataclass

from greenprune.errors import MeasurementError

DAYS_A_YEAR = 365
MOST_DEVICES = 1e12
MOST_INFERENCES = 1e30
"""Above any fleet's; beyond it figures would leave a float's range."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """``devices`` devices, each making ``per_day`` inferences a day, for ``years`` years.

    Raises:
        MeasurementError: a number that no fleet has.
    """

    per_day: float = 1000.0
    years: float = 3.0
    devices: int = 1

    def __post_init__(self) -> None:
        _within("inferences a day", self.per_day, 1e12)
        _within("years", self.years, 100.0)
        if not 1 <= self.devices <= MOST_DEVICES:
            raise MeasurementError(
                f"devices = {self.devices}: expected 1 or more, and at most {MOST_DEVICES:,.0f}"
            )
        if self.inferences < 1:
            raise MeasurementError(
                f"{self.per_day:g} inferences a day over {self.years:g} years are none: expected "
                "at least one in the whole life"
            )

    @property
    def inferences(self) -> int:
        """Of all devices over the whole life; a year has 365 days."""
        return round(self.per_day * DAYS_A_YEAR * self.years * self.devices)


@dataclass(frozen=True, kw_only=True)
class Embodied:
    """What making one device emitted, and how long it lasts.

    SCI (ISO/IEC 21031:2024): M = TE x TS x RS, with TE = ``device_kgco2e``, TS = the years in use
    over ``lifetime_years``, RS = 1: the device does nothing else. Years beyond the lifetime are a
    share of the next device.

    Raises:
        MeasurementError: a number that no device has.
    """

    device_kgco2e: float
    lifetime_years: float = 5.0

    def __post_init__(self) -> None:
        _within("embodied carbon of a device in kgCO2e", self.device_kgco2e, 1e6)
        _within("lifetime of a device in years", self.lifetime_years, 100.0)

    def kgco2e(self, fleet: Fleet) -> float:
        """M of the whole fleet over its years of use."""
        return self.device_kgco2e * fleet.devices * fleet.years / self.lifetime_years


def _within(what: str, value: float, most: float) -> None:
    if not (math.isfinite(value) and 0 < value <= most):
        raise MeasurementError(f"{what} = {value:g}: expected above 0 and at most {most:,.0f}")
