"""Random power traces of known energy, measured by the real meters on a simulated clock.

A measurement is called valid where it raised nothing and its interval reaches at most 0.5% from its
value. It may never be valid and wrong, and its interval must always hold the truth. What is
recoverable, and must mostly be valid, is decided here from the trace alone: nothing is lost, and
the window is long enough for the counter's ticks or the sensor's samples.

Left out is what no meter of this kind can see, as docs/measuring.md says: pulses between two of a
sensor's samples, and resets of a counter that is about to wrap.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from meter_trees import (
    AMD_RANGE_UJ,
    INA_TICK_SECONDS,
    INTEL_RANGE_UJ,
    NVML_TICK_SECONDS,
    RAPL_TICK_SECONDS,
    Power,
    SimulatedClock,
    SimulatedCounter,
    SimulatedRail,
)

from greenprune.errors import MeasurementError
from greenprune.meters import Energy, Meter
from greenprune.meters.counters import MOST_WATTS, Counter, CounterDevice
from greenprune.meters.meter import WIDE, Source
from greenprune.meters.readers import CounterReader, IntervalReader, Reader
from greenprune.meters.sampling import PowerDevice

SAMPLE_SECONDS = 0.01
KINDS = ("rapl", "nvml", "ina", "rapl+nvml")
SHAPES = ("constant", "ramp", "steps")
COUNTER_FAULTS = (
    "none",
    "short freeze",
    "freeze",
    "freeze to the end",
    "unreadable for a while",
    "vanished",
    "reset",
    "no polls",
)
FAULTS = {
    "rapl": (*COUNTER_FAULTS, "wrap", "wrap of unknown range"),
    "nvml": COUNTER_FAULTS,
    "ina": (
        "none",
        "dropped samples",
        "gap",
        "long gap",
        "freeze",
        "freeze to the end",
        "unreadable for a while",
        "vanished",
    ),
}
FAULTS["rapl+nvml"] = FAULTS["rapl"]
"""RAPL's."""
HARMLESS = ("none", "wrap", "short freeze", "dropped samples")
"""Nothing is lost."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One window: what the machine took, how it was metered, what went wrong."""

    kind: str
    shape: str
    fault: str
    seconds: float
    seed: int

    @property
    def recoverable(self) -> bool:
        """Whether a good meter can tell the joules to 0.5%."""
        ticks = {"rapl": RAPL_TICK_SECONDS, "nvml": NVML_TICK_SECONDS, "ina": 0.05}
        slowest = max(ticks[kind] for kind in self.kind.split("+"))
        return self.fault in HARMLESS and self.seconds >= 200 * slowest


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a meter made of a trace; joules."""

    truth: float
    energy: Energy | None
    error: str
    unit: float = 4e-4
    """Joules that the rounding of the files may take or add."""

    @property
    def valid(self) -> bool:
        energy = self.energy
        if energy is None:
            return False
        return max(energy.high - energy.value, energy.value - energy.low) <= WIDE * energy.value

    @property
    def sound(self) -> bool:
        """Not zero, and the interval holds the truth."""
        energy, slack = self.energy, 1e-4 * self.truth + self.unit
        if energy is None:
            return bool(self.error)
        within = energy.low - slack <= self.truth <= energy.high + slack
        return energy.value > 0 and within

    @property
    def wrong(self) -> bool:
        """Called valid, and more than 0.5% off."""
        energy = self.energy
        if not self.valid or energy is None:
            return False
        return abs(energy.value - self.truth) > WIDE * self.truth + self.unit


def draw_trace(seed: int) -> Trace:
    """A random trace; the same for the same seed."""
    draw = random.Random(seed)
    kind = draw.choice(KINDS)
    fault = draw.choice(FAULTS[kind])
    if draw.random() < 0.5 and fault not in HARMLESS:
        fault = draw.choice([one for one in HARMLESS if one in FAULTS[kind]])
    least, most = {"rapl": (0.02, 20.0), "ina": (0.5, 30.0)}.get(kind, (0.5, 60.0))
    if fault == "no polls":
        most = 300.0  # a counter can go round more than once
    elif fault not in ("none", "wrap", "dropped samples"):
        least = 8.0  # room for what goes wrong
    seconds = math.exp(draw.uniform(math.log(least), math.log(most)))
    return Trace(kind=kind, shape=draw.choice(SHAPES), fault=fault, seconds=seconds, seed=seed)


def measure_trace(trace: Trace) -> Outcome:
    """Measure a trace with the meter of its kind, or two that add up."""
    draw = random.Random(trace.seed + 1)
    clock = SimulatedClock()
    # The window starts after a wait for ticks, so the power's corners lie around a later moment.
    begin = clock.time + draw.uniform(1.0, 2.0)
    bad = (begin + draw.uniform(0.05, 0.5) * trace.seconds, _length(trace, draw))
    powers, sources = [], []
    for index, kind in enumerate(trace.kind.split("+")):
        part = replace(trace, kind=kind, fault="none" if index else trace.fault)
        power = _power(part, begin, draw)
        powers.append(power)
        if kind == "ina":
            sources.append(_sensor(part, power, clock, bad, draw))
        else:
            sources.append(_counters(part, power, clock, bad, begin, draw))
    meter = Meter(trace.kind, sources)
    with meter:
        clock.advance(max(0.0, begin - 0.9 - clock.time))
        truth = 0.0
        try:
            with meter.measure() as window:
                start = clock.time
                clock.advance(trace.seconds)
                truth = sum(power.between(start, clock.time) for power in powers)
        except MeasurementError as error:
            return Outcome(truth=truth, energy=None, error=str(error))
        unit = trace.seconds * 5e-3 if trace.kind == "ina" else 4e-3
        return Outcome(truth=truth, energy=window.energy, error="", unit=unit)


def _length(trace: Trace, draw: random.Random) -> float:
    """Seconds that a fault lasts."""
    if trace.fault == "short freeze":
        return draw.uniform(0.05, 0.8)
    if trace.fault == "gap":
        return draw.uniform(0.07, 0.9)
    if trace.fault in ("freeze", "unreadable for a while", "long gap"):
        return draw.uniform(3.1, 3.8)
    return math.inf


def _power(trace: Trace, begin: float, draw: random.Random) -> Power:
    """Watts of a machine of this kind, idle before the window."""
    low, high = {"rapl": (5.0, 350.0), "nvml": (10.0, 700.0), "ina": (3.0, 60.0)}[trace.kind]
    level = math.exp(draw.uniform(math.log(low), math.log(high)))
    other = level * draw.uniform(0.5, 2.0)
    end = begin + trace.seconds
    if trace.shape == "constant":
        return Power(times=[0.0], watts=[level])
    if trace.shape == "ramp":
        return Power(times=[begin, end], watts=[level, other])
    times, watts = [begin], [level]
    shortest = 2 * SAMPLE_SECONDS if trace.kind == "ina" else 0.0
    for moment in sorted(draw.uniform(begin, end) for _ in range(draw.randint(1, 30))):
        if moment - times[-1] < shortest:
            continue
        times += [moment, moment + 1e-6]
        watts += [watts[-1], other if watts[-1] == level else level]
    return Power(times=times, watts=watts)


def _counters(
    trace: Trace,
    power: Power,
    clock: SimulatedClock,
    bad: tuple[float, float],
    begin: float,
    draw: random.Random,
) -> Source:
    """One to three counters that share the power; what goes wrong, goes wrong with the first."""
    tick = RAPL_TICK_SECONDS if trace.kind == "rapl" else NVML_TICK_SECONDS
    range_uj = draw.choice([INTEL_RANGE_UJ, AMD_RANGE_UJ]) if trace.kind == "rapl" else 2**63
    shares = [1.0] if draw.random() < 0.5 else [0.6, 0.3, 0.1]
    from_s, to_s = bad[0], bad[0] + bad[1]
    counters = []
    for index, share in enumerate(shares):
        first = index == 0
        part = Power(times=power.times, watts=[watts * share for watts in power.watts])
        before_uj, start_uj = part.joules(begin) * 1e6, draw.uniform(0, range_uj / 2)
        wraps = trace.fault in ("wrap", "wrap of unknown range") and first
        if wraps:
            window_uj = part.between(begin, begin + trace.seconds) * 1e6
            start_uj = range_uj - draw.uniform(0.1, 0.9) * window_uj
        elif trace.fault == "reset":
            # nearer to its range than this a reset looks like a wrap
            most_uj = range_uj - 2 * MOST_WATTS * 1e6
            most_uj -= part.between(begin, begin + trace.seconds) * 1e6
            start_uj = draw.uniform(0.01 * range_uj, most_uj)
        simulated = SimulatedCounter(
            power=part,
            tick_seconds=tick,
            phase=draw.uniform(0, tick),
            unit_uj=61.03515625 if trace.kind == "rapl" else 1000.0,
            range_uj=range_uj,
            start_uj=start_uj - before_uj,
            frozen=((from_s, to_s),) if "freeze" in trace.fault and first else (),
            loses=trace.fault == "freeze",
            reset_at=from_s if trace.fault == "reset" and first else math.inf,
        )
        fails = trace.fault in ("unreadable for a while", "vanished") and first

        def read_uj(simulated: SimulatedCounter = simulated, fails: bool = fails) -> int:
            if fails and from_s <= clock.time < to_s:
                raise MeasurementError("energy_uj: no permission")
            return simulated.uj(clock.time)

        known = trace.kind == "rapl" and not (wraps and trace.fault != "wrap")
        counters.append(Counter(f"package-{index}", read_uj, range_uj if known else None))
    device = CounterDevice(counters, clock)
    if trace.fault == "no polls":
        # the background thread starves from somewhere in the window to beyond any wrap
        clock.late = lambda due: due if due < from_s else due + 1e4
        clock.advance(0.0)
    return _source(CounterReader(device, clock), device)


def _sensor(
    trace: Trace, power: Power, clock: SimulatedClock, bad: tuple[float, float], draw: random.Random
) -> Source:
    from_s, to_s = bad[0], bad[0] + bad[1]
    rail = SimulatedRail(
        power=power,
        phase=draw.uniform(0, INA_TICK_SECONDS),
        frozen=((from_s, to_s),) if "freeze" in trace.fault else (),
    )

    def read_watts() -> tuple[float, float, float]:
        fails = trace.fault in ("unreadable for a while", "vanished")
        if fails and from_s <= clock.time < to_s:
            raise MeasurementError("curr1_input: no such file")
        watts = rail.milliamperes(clock.time) * 5e-3
        return watts, watts, watts

    def late(due: float) -> float:
        if trace.fault == "dropped samples":
            return due + (draw.randint(1, 5) * 0.01 if draw.random() < 0.01 else 0.0)
        return to_s if "gap" in trace.fault and from_s <= due < to_s else due

    clock.late = late
    device = PowerDevice(
        "VDD_IN",
        read_watts,
        clock,
        sample_seconds=SAMPLE_SECONDS,
        period_seconds=INA_TICK_SECONDS,
        lag_seconds=2 * INA_TICK_SECONDS,
    )
    return _source(IntervalReader(device, clock), device)


def _source(reader: Reader, device: CounterDevice | PowerDevice) -> Source:
    return Source(reader=reader, device=device, provenance="measured_counter", scope="simulated")
