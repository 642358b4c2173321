"""Counters of joules that the hardware keeps, made cumulative: wraps, resets, freezes, gaps.

Inside a window a counter is read once a second in the background. A backward step is one wrap, and
the range is added once; a step that no hardware could take is no wrap but a reset, and makes the
window invalid, as does a gap in the readings so long that the counter could have gone round unseen.
A counter that has moved before and then stands still for two polls is frozen. What cannot be seen
is a counter that stands still between two polls, a second, and goes on without what it missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock
from greenprune.meters.device import MeterDevice, NamedDomain

POLL_SECONDS = 1.0
FROZEN_SECONDS = 1.9
"""Less than two polls, more than one."""
MOST_WATTS = 1500.0
"""No package, memory or GPU takes as much."""
SLACK_SECONDS = 0.2
"""Counters move in steps; a step may arrive right after a reading."""
SMALLEST_RANGE_UJ = 65_532_610_987
"""Of the ranges known: 32 bits of 15.3 uJ. It judges gaps where the range cannot be read."""


class Counter(NamedDomain):
    """One counter, also a domain of pyJoules.

    Args:
        name: unique among the device's counters.
        read_uj: reads it, in microjoules; raises MeasurementError.
        range_uj: where it wraps; None where that is not known, so that no wrap can be resolved.
        required: it must move in every window. Memory may have a counter that never does.
    """

    def __init__(
        self,
        name: str,
        read_uj: Callable[[], int],
        range_uj: int | None = None,
        *,
        required: bool = True,
    ) -> None:
        super().__init__(name)
        self.required = required
        self._read_uj = read_uj
        self._range_uj = range_uj
        self._last_uj: int | None = None
        self._read_at = 0.0
        self._moved_at: float | None = None
        self._total_uj = 0

    def read(self, clock: Clock) -> int:
        """Microjoules since the first reading.

        Raises:
            MeasurementError: it cannot be read, or what it says cannot be true. The next reading
                starts anew.
        """
        last_uj, self._last_uj = self._last_uj, None
        raw_uj, now = self._read_uj(), clock.now()
        if last_uj is not None:
            step_uj = self._step(last_uj, raw_uj, now - self._read_at)
            if step_uj:
                self._moved_at = now
            elif self._moved_at is not None and now - self._moved_at > FROZEN_SECONDS:
                still, self._moved_at = now - self._moved_at, None
                raise MeasurementError(
                    f"{self.name}: the counter has not moved for {still:.1f} s; the window is "
                    "invalid: measure again"
                )
            self._total_uj += step_uj
        self._last_uj, self._read_at = raw_uj, now
        return self._total_uj

    def forget(self) -> None:
        """The next reading starts anew; the total stays."""
        self._last_uj = self._moved_at = None

    def _step(self, last_uj: int, raw_uj: int, seconds: float) -> int:
        step_uj = raw_uj - last_uj
        where = f"{self.name}: from {last_uj} to {raw_uj} uJ within {seconds:.3f} s"
        if step_uj < 0:
            if self._range_uj is None:
                raise MeasurementError(
                    f"{where}, and its range (max_energy_range_uj) is not known, so the wrap "
                    "cannot be resolved; the window is invalid: measure again"
                )
            step_uj += self._range_uj
        most_uj = MOST_WATTS * 1e6 * seconds
        if most_uj >= (self._range_uj or SMALLEST_RANGE_UJ):
            raise MeasurementError(
                f"{self.name}: no reading for {seconds:.1f} s, in which it may have wrapped more "
                "than once; the window is invalid: measure again on a machine that is less loaded"
            )
        if not 0 <= step_uj <= most_uj + MOST_WATTS * 1e6 * SLACK_SECONDS:
            raise MeasurementError(
                f"{where}: neither a wrap nor a power below {MOST_WATTS:g} W explains that, so the "
                "counter was reset or is broken; the window is invalid: measure again"
            )
        return step_uj


class CounterDevice(MeterDevice):
    """pyJoules device of counters.

    Raises:
        MeasurementError: one of them cannot be read.
    """

    def __init__(self, counters: Sequence[Counter], clock: Clock) -> None:
        self._counters = list(counters)
        super().__init__(self._counters, clock, POLL_SECONDS)

    def read(self) -> list[float]:
        problems: list[MeasurementError] = []
        totals: list[float] = []
        for counter in self._counters:  # all of them, so that each starts anew after a failure
            try:
                totals.append(counter.read(self.clock))
            except MeasurementError as problem:
                problems.append(problem)
        if problems:
            raise problems[0]
        return totals

    def forget(self) -> None:
        for counter in self._counters:
            counter.forget()
