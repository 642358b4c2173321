"""A user's own pyJoules device, watched within windows as built-in counters are."""

from __future__ import annotations

import math
from typing import Any

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock
from greenprune.meters.counters import POLL_SECONDS
from greenprune.meters.device import MeterDevice
from greenprune.meters.meter import failing
from greenprune.meters.readers import PATIENCE_SECONDS


class ExternalDevice(MeterDevice):
    """Passes a user's counters on; one that falls, stands still or is no number is a failure.

    How fast they tick is not known, so that one is frozen only where no counter is as slow.

    Args:
        name: of the meter, for messages.
        device: a configured pyJoules device that answers cumulative microjoules.
        clock: tells the time.
    """

    def __init__(self, name: str, device: Any, clock: Clock) -> None:
        self._name = name
        self._device = device
        self._last_uj: list[float] | None = None
        self._read_at = 0.0
        self._moved_at: list[float] = []
        super().__init__(device.get_configured_domains(), clock, POLL_SECONDS)

    def read(self) -> list[float]:
        last_uj, self._last_uj = self._last_uj, None
        with failing(self._name):
            energies_uj = [float(energy_uj) for energy_uj in self._device.get_energy()]
            named = list(zip(self.get_configured_domains(), energies_uj, strict=True))
        now = self.clock.now()
        for domain, energy_uj in named:
            if not math.isfinite(energy_uj):
                raise MeasurementError(
                    f"{domain}: {energy_uj} uJ; expected a finite number of microjoules; the "
                    "window is invalid: measure again, or mend the device"
                )
        if last_uj is None:
            self._moved_at = [now] * len(energies_uj)
        else:
            if now - self._read_at > PATIENCE_SECONDS:
                raise MeasurementError(
                    f"meter '{self._name}': no reading for {now - self._read_at:.1f} s, in which "
                    "a reset would go unseen; the window is invalid: measure again on a machine "
                    "that is less loaded"
                )
            for index, before_uj in enumerate(last_uj):
                self._check_step(index, before_uj, energies_uj[index], now)
        self._last_uj, self._read_at = energies_uj, now
        return energies_uj

    def _check_step(self, index: int, before_uj: float, after_uj: float, now: float) -> None:
        domain = self.get_configured_domains()[index]
        if after_uj < before_uj:
            raise MeasurementError(
                f"{domain}: went back from {before_uj:g} to {after_uj:g} uJ, so the counter was "
                "reset; expected microjoules that only grow; the window is invalid: measure again"
            )
        if after_uj > before_uj:
            self._moved_at[index] = now
        elif now - self._moved_at[index] > PATIENCE_SECONDS:
            raise MeasurementError(
                f"{domain}: the counter stands still, it has not moved for "
                f"{now - self._moved_at[index]:.1f} s; the window is invalid: measure again"
            )

    def forget(self) -> None:
        self._last_uj = None

    def close(self) -> None:
        super().close()
        close = getattr(self._device, "close", None)
        if close is not None:
            close()
