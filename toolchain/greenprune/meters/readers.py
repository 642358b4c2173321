"""How a stretch of work is read off a device through pyJoules: with a doubt at both ends.

A counter moves in ticks (RAPL about 1 ms, NVML about 100 ms), and between them it says what it said
at the last one. So a window starts right after a tick. At its end the counter is read at once, and
again after the next tick: the truth lies between the two, the value is their middle, so it is wrong
by half a tick at most: 0.5% in a window of 100 ticks of equal energy. Shorter windows have a wider
interval, which says so; a window without a tick is an error.
"""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock

PATIENCE_SECONDS = 5.0
"""No counter known is slower."""
_FASTEST_POLL_SECONDS = 50e-6
_SLOWEST_POLL_SECONDS = 1e-3
_POLLS = 50
"""In a period, so that a tick is seen within 2% of it."""
_PERIODS = 5


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Microjoules of a window, and its length."""

    low_uj: float
    value_uj: float
    high_uj: float
    seconds: float
    note: str = ""


@dataclass(kw_only=True)
class Begun:
    """A window that is under way."""

    meter: Any
    start: float
    end: float = 0.0
    breaks: int
    marks: tuple[Any, ...] = ()
    """What its reader remembers of both ends."""


class Reader(Protocol):
    """Reads windows off a device; any number at a time."""

    ticks: bool
    """Whether it waits for ticks at both ends; if not, what it reads at once is enough."""

    @property
    def period_seconds(self) -> float | None:
        """Between two updates; None of a model."""
        ...

    def prove(self, patience_seconds: float) -> None:
        """A real read. Raises MeasurementError: nothing moves for so long, or cannot be read."""
        ...

    def begin(self) -> Begun:
        """Start a window."""
        ...

    def stop(self, begun: Begun) -> None:
        """The work has ended: read at once."""
        ...

    def finish(self, begun: Begun) -> Reading:
        """What the window took. Raises MeasurementError: it is invalid, with the cause."""
        ...


def _energy_meter(device: Any) -> Any:
    from greenprune.meters._pyjoules import EnergyMeter

    # Traces stay at two samples: pyJoules walks longer ones recursively. Its own durations come
    # from a clock that can jump, so the seconds are ours.
    return EnergyMeter([device])


def polled(device: Any) -> AbstractContextManager[None]:
    """Reading in the background while it is needed; a model has none."""
    polling: AbstractContextManager[None] = getattr(device, "polled", nullcontext)()
    return polling


def _check_breaks(device: Any, begun: Begun) -> None:
    if getattr(device, "breaks", 0) != begun.breaks:
        raise device.problem


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A move of a counter: its size, and a moment before which it did not happen."""

    step_uj: float
    after: float


class CounterReader:
    """Reads a pyJoules device whose domains are counters in microjoules, and add up."""

    ticks = True

    def __init__(self, device: Any, clock: Clock) -> None:
        self.device = device
        self._clock = clock
        self._period_seconds: float | None = None

    @property
    def period_seconds(self) -> float:
        """Of the slowest counter: the median of five ticks, measured when first asked for."""
        if self._period_seconds is None:
            periods = []
            with polled(self.device):
                self.await_ticks()
                for _ in range(_PERIODS):
                    start = self._clock.now()
                    self.await_ticks()
                    periods.append(self._clock.now() - start)
            self._period_seconds = statistics.median(periods)
        return self._period_seconds

    def prove(self, patience_seconds: float) -> None:
        self.await_ticks(patience_seconds)

    def begin(self) -> Begun:
        """Wait for a tick of every counter, then read."""
        breaks = getattr(self.device, "breaks", 0)
        ticks = self.await_ticks()
        meter = _energy_meter(self.device)
        meter.start()
        return Begun(meter=meter, start=self._clock.now(), breaks=breaks, marks=(ticks,))

    def stop(self, begun: Begun) -> None:
        begun.end = self._clock.now()
        begun.meter.record()
        begun.marks += (self.device.get_energy(),)

    def finish(self, begun: Begun) -> Reading:
        """Wait for the next tick of every counter; the truth lies before it."""
        _check_breaks(self.device, begun)
        ticks, ended_uj = begun.marks
        self.await_ticks(since_uj=ended_uj)
        begun.meter.stop()
        _check_breaks(self.device, begun)
        seconds = begun.end - begun.start
        within, after = (sample.energy for sample in begun.meter.get_trace())
        still = [str(domain) for domain in self._required() if within[str(domain)] <= 0]
        if still:
            raise MeasurementError(
                f"{', '.join(still)} did not move within {seconds:.3f} s; measure for longer, or "
                "use --meter estimate"
            )
        # The window began after the ticks: other counters ticked later, other meters began later.
        doubt_uj = sum(
            tick.step_uj * (begun.start - tick.after) / self.period_seconds for tick in ticks
        )
        low_uj = max(0.0, sum(within.values()) - doubt_uj)
        high_uj = float(sum(within.values()) + sum(after.values()))
        dead = [name for name, energy in within.items() if energy <= 0]
        return Reading(
            low_uj=low_uj,
            value_uj=(low_uj + high_uj) / 2,
            high_uj=high_uj,
            seconds=seconds,
            note=f"{', '.join(dead)} did not move and adds nothing" if dead else "",
        )

    def await_ticks(
        self, patience_seconds: float = PATIENCE_SECONDS, since_uj: list[float] | None = None
    ) -> list[Tick]:
        """The latest move of each counter that moved, once every required one has.

        Args:
            patience_seconds: how long a counter may stand still.
            since_uj: an earlier reading, after which a tick counts; None: a new one.

        Raises:
            MeasurementError: one stands still, went back or cannot be read.
        """
        with polled(self.device):
            return self._await_ticks(patience_seconds, since_uj)

    def _await_ticks(self, patience_seconds: float, since_uj: list[float] | None) -> list[Tick]:
        domains = self.device.get_configured_domains()
        missing = {domains.index(domain) for domain in self._required()}
        ticks: dict[int, Tick] = {}
        last, read_at = since_uj or self.device.get_energy(), self._clock.now()
        start, deadline = read_at, read_at + patience_seconds
        while missing - ticks.keys():
            if read_at > deadline:
                still = ", ".join(str(domains[index]) for index in missing - ticks.keys())
                raise MeasurementError(
                    f"{still}: the counter stands still, it did not move for {patience_seconds:g} "
                    "s; use --meter estimate where it never does"
                )
            pause = (self._period_seconds or read_at - start) / _POLLS
            self._clock.sleep(min(max(pause, _FASTEST_POLL_SECONDS), _SLOWEST_POLL_SECONDS))
            now_uj, now = self.device.get_energy(), self._clock.now()
            for index, step_uj in enumerate(b - a for a, b in zip(last, now_uj, strict=True)):
                if step_uj < 0:
                    raise MeasurementError(
                        f"{domains[index]}: went back by {-step_uj:g} uJ; expected microjoules "
                        "that only grow"
                    )
                if step_uj > 0:
                    ticks[index] = Tick(step_uj=step_uj, after=read_at)
            last, read_at = now_uj, now
        return list(ticks.values())

    def _required(self) -> list[Any]:
        """The domains that must move; of a device that does not tell, all."""
        domains = self.device.get_configured_domains()
        return [domain for domain in domains if getattr(domain, "required", True)]


class IntervalReader:
    """Reads a pyJoules device whose domains are ``low``, ``value`` and ``high`` of one quantity."""

    ticks = False

    def __init__(self, device: Any, clock: Clock) -> None:
        self.device = device
        self.period_seconds: float | None = getattr(device, "period_seconds", None)
        self._clock = clock

    def prove(self, patience_seconds: float) -> None:
        self.device.prove(patience_seconds)

    def begin(self) -> Begun:
        breaks, meter = getattr(self.device, "breaks", 0), _energy_meter(self.device)
        meter.start()
        marks = (self.device.mark(),)
        return Begun(meter=meter, start=self._clock.now(), breaks=breaks, marks=marks)

    def stop(self, begun: Begun) -> None:
        begun.end = self._clock.now()
        begun.meter.stop()
        begun.marks += (self.device.mark(),)

    def finish(self, begun: Begun) -> Reading:
        _check_breaks(self.device, begun)
        doubt_uj = self.device.doubt_uj(*begun.marks)
        energy = begun.meter.get_trace()[0].energy
        if energy["high"] <= 0 and not self.device.may_be_zero:
            raise MeasurementError(
                "the sensor read 0 W throughout; use --meter estimate where it does not work"
            )
        return Reading(
            low_uj=max(0.0, energy["low"] - doubt_uj),
            value_uj=energy["value"],
            high_uj=energy["high"] + doubt_uj,
            seconds=begun.end - begun.start,
        )
