"""Joules from sampled watts: the trapezoid rule, and an honest doubt about what it did not see.

Inside a window power is read in the background at the sensor's own period, and at both ends. The
value is the trapezoid sum. Its doubt is in what lies between the samples and around them:

- Between two readings that differ the power may have changed at any moment since the reading last
  changed: an error of at most half the difference times that stretch, of either sign. Such errors
  are independent, so twice their root sum of squares is taken (all of it for a single step).
- A gap of more than six periods (samples were dropped) may hide any power between the lowest and
  the highest that was ever read: it adds the gap times that range. Gaps are not made invalid at
  once, as the operating system delays a thread now and then; a gap over a second is.
- A sensor shows the past: what it last converted, for as long as its reading has not changed. At
  each end of the window that much time, times the range, is in doubt.

A load that repeats itself exactly in step with the samples escapes this; so does a pulse that comes
and goes between two samples, and a burst that falls into a gap and is higher than anything read. A
reading that has not changed at all for a second (and five periods) is taken for a frozen sensor:
real ones flicker.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock
from greenprune.meters.device import MeterDevice, NamedDomain

GAP_PERIODS = 6.5
LONGEST_GAP_SECONDS = 1.0
FROZEN_SECONDS = 1.0
FROZEN_PERIODS = 5.0

Watts = tuple[float, float, float]
"""Low, value and high."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What was in doubt so far, at an end of a window; joules squared, and seconds."""

    squares: float
    gap_seconds: float
    stale_seconds: float


class PowerDevice(MeterDevice):
    """pyJoules device that integrates watts; its domains are ``low``, ``value`` and ``high``.

    Args:
        name: of the sensor, for messages.
        read_watts: reads low, value and high; raises MeasurementError.
        sample_seconds: between two readings.
        period_seconds: between two updates of the sensor.
        lag_seconds: how far back a fresh reading may look.
    """

    may_be_zero = False

    def __init__(
        self,
        name: str,
        read_watts: Callable[[], Watts],
        clock: Clock,
        *,
        sample_seconds: float,
        period_seconds: float,
        lag_seconds: float,
    ) -> None:
        self.name = name
        self.period_seconds = period_seconds
        self._read_watts = read_watts
        self._sample_seconds = sample_seconds
        self._lag_seconds = lag_seconds
        self._last: Watts | None = None
        self._read_at = self._changed_at = clock.now()
        self._joules = [0.0, 0.0, 0.0]
        self._squares = self._gap_seconds = 0.0
        self._least, self._most = math.inf, 0.0
        domains = [NamedDomain(part) for part in ("low", "value", "high")]
        super().__init__(domains, clock, sample_seconds)

    def read(self) -> list[float]:
        """One sample; microjoules since the device was opened: low, value, high."""
        last, self._last = self._last, None
        watts, now = self._read_watts(), self.clock.now()
        if not 0 <= watts[0] <= watts[2] < math.inf:
            raise MeasurementError(
                f"{self.name}: {watts[1]:g} W is no power that a board takes; the window is "
                "invalid: measure again"
            )
        self._least, self._most = min(self._least, watts[0]), max(self._most, watts[2])
        if last is None:
            self._changed_at = now
        else:
            self._add(last, watts, now)
        self._last, self._read_at = watts, now
        return [joules * 1e6 for joules in self._joules]

    def forget(self) -> None:
        self._last = None

    def prove(self, patience_seconds: float) -> None:
        """Read until the power changes, above zero. Raises MeasurementError: it does not."""
        first = watts = self._read_watts()
        deadline = self.clock.now() + patience_seconds
        while watts == first or watts[1] <= 0:
            if self.clock.now() > deadline:
                raise MeasurementError(
                    f"{self.name}: {watts[1]:g} W for {patience_seconds:g} s; expected a power "
                    "above 0 W that flickers, as of real sensors; use --meter estimate where this "
                    "one does not work"
                )
            self.clock.sleep(self._sample_seconds)
            watts = self._read_watts()

    def _add(self, last: Watts, watts: Watts, now: float) -> None:
        gap = now - self._read_at
        if gap > LONGEST_GAP_SECONDS:
            raise MeasurementError(
                f"{self.name}: no sample for {gap:.1f} s; the window is invalid: measure again on "
                "a machine that is less loaded"
            )
        if watts != last:
            change = max(abs(watts[0] - last[0]), abs(watts[2] - last[2]))
            self._squares += (change * (now - self._changed_at) / 2) ** 2
            self._changed_at = now
        elif now - self._changed_at > max(FROZEN_SECONDS, FROZEN_PERIODS * self.period_seconds):
            raise MeasurementError(
                f"{self.name}: the reading has not changed for {now - self._changed_at:.1f} s, and "
                "real sensors flicker; the window is invalid: measure again"
            )
        if gap > GAP_PERIODS * self._sample_seconds:
            self._gap_seconds += gap
        for index in range(3):
            self._joules[index] += (last[index] + watts[index]) / 2 * gap

    def mark(self) -> Mark:
        """An end of a window, right after a reading."""
        with self._lock:
            return Mark(
                squares=self._squares,
                gap_seconds=self._gap_seconds,
                stale_seconds=self._read_at - self._changed_at,
            )

    def doubt_uj(self, start: Mark, end: Mark) -> float:
        """Half the width of the interval around what was integrated between two marks.

        Waits for the sensor to show the window's last moments: their power counts for the range.
        """
        self.clock.sleep(self._lag_seconds)
        self.poll()
        with self._lock:
            past = self._lag_seconds + start.stale_seconds + end.stale_seconds
            unseen = end.gap_seconds - start.gap_seconds + past
            steps = 2 * math.sqrt(max(0.0, end.squares - start.squares))
            return 1e6 * (steps + unseen * (self._most - self._least))
