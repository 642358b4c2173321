"""Energy counters and power sensors of real boards, simulated on a clock that a test moves.

Trees of files are written below a folder of the test's; a simulated machine renews them as the
simulated time passes, so that counters advance, wrap, freeze, vanish and become unreadable while a
meter reads them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from greenprune.meters.clock import Clock

RAPL_TICK_SECONDS = 0.000976
NVML_TICK_SECONDS = 0.1
INA_TICK_SECONDS = 0.0066
INTEL_RANGE_UJ = 262_143_328_850
AMD_RANGE_UJ = 65_532_610_987
INTEL_UNIT_UJ = 61.03515625
"""2**-14 J, in which Intel's counters count."""

BOARDS: dict[str, dict[str, list[str]]] = {
    "orin-nano": {"1-0040": ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]},
    "orin-nx": {"1-0040": ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]},
    "agx-orin": {
        "1-0040": ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"],
        "1-0041": ["NC", "VDDQ_VDD2_1V8AO", "NC"],
    },
    "thor": {"1-0040": ["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"]},
    "xavier-nx": {"7-0040": ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]},
    "agx-xavier": {"1-0040": ["GPU", "CPU", "SOC"], "1-0041": ["CV", "VDDRQ", "SYS5V"]},
}
"""Rails by the sensor's address on the bus."""


class SimulatedClock(Clock):
    """Time passes when it is told to; background calls happen on their way.

    ``late`` moves a background call to another time: that is how samples are dropped.
    """

    def __init__(self) -> None:
        self.time = 1000.0
        self.watchers: list[Callable[[float], None]] = []
        self.late: Callable[[float], float] = lambda due: due
        self._calls: list[tuple[float, int, float, Callable[[], object], list[bool]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def every(self, seconds: float, call: Callable[[], object]) -> Callable[[], None]:
        alive = [True]
        self._plan(seconds, call, alive)
        return lambda: alive.__setitem__(0, False)

    @property
    def background_calls(self) -> int:
        """Of those asked for, how many have not been stopped."""
        return sum(alive[0] for *_, alive in self._calls)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        end = self.time + seconds
        while self._calls and self._calls[0][0] <= end:
            due, _, period, call, alive = heapq.heappop(self._calls)
            if alive[0]:
                self._set(max(due, self.time))
                call()
                self._plan(period, call, alive)
        self._set(max(end, self.time))

    def _plan(self, period: float, call: Callable[[], object], alive: list[bool]) -> None:
        due = max(self.late(self.time + period), self.time)
        heapq.heappush(self._calls, (due, next(self._order), period, call, alive))

    def _set(self, time: float) -> None:
        self.time = time
        for watcher in self.watchers:
            watcher(time)


@dataclass(kw_only=True)
class Power:
    """Watts over time, linear between corners; the energy is exact."""

    times: Sequence[float]
    watts: Sequence[float]
    _joules: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._joules = [0.0]
        for index in range(1, len(self.times)):
            seconds = self.times[index] - self.times[index - 1]
            mean = (self.watts[index] + self.watts[index - 1]) / 2
            self._joules.append(self._joules[-1] + mean * seconds)

    def joules(self, time: float) -> float:
        """Since the first corner; before it and after the last, power stays as it is there."""
        if time <= self.times[0]:
            return (time - self.times[0]) * self.watts[0]
        index = bisect_right(self.times, time) - 1
        past = time - self.times[index]
        if index == len(self.times) - 1:
            return self._joules[-1] + past * self.watts[-1]
        share = past / (self.times[index + 1] - self.times[index])
        rise = self.watts[index + 1] - self.watts[index]
        return self._joules[index] + past * (self.watts[index] + share * rise / 2)

    def between(self, start: float, end: float) -> float:
        """Joules from one moment to another."""
        return self.joules(end) - self.joules(start)


def constant(watts: float) -> Power:
    return Power(times=[0.0], watts=[watts])


def last_tick(time: float, period: float, phase: float) -> float:
    """When a counter with such ticks was last renewed."""
    return (math.floor((time - phase) / period + 1e-9)) * period + phase


@dataclass(kw_only=True)
class SimulatedCounter:
    """A cumulative counter in whole ``unit_uj``, renewed at ticks.

    ``frozen`` are stretches in which it stands still; afterwards it has caught up, or has lost
    what passed where ``loses`` is set.
    """

    power: Power
    tick_seconds: float = RAPL_TICK_SECONDS
    phase: float = 0.0
    unit_uj: float = INTEL_UNIT_UJ
    range_uj: int = INTEL_RANGE_UJ
    start_uj: float = 0.0
    frozen: tuple[tuple[float, float], ...] = ()
    loses: bool = False
    reset_at: float = math.inf

    def uj(self, time: float) -> int:
        lost = 0.0
        for start, end in self.frozen:
            if start <= time < end:
                time = start
            elif time >= end and self.loses:
                lost += self.power.between(start, end)
        joules = self.power.joules(last_tick(time, self.tick_seconds, self.phase)) - lost
        start_uj = self.start_uj
        if time >= self.reset_at:
            start_uj = -self.power.joules(self.reset_at) * 1e6
        units = math.floor((start_uj + joules * 1e6) / self.unit_uj)
        return int(units * self.unit_uj) % self.range_uj


def write_rapl(
    root: Path, zones: dict[str, str], range_uj: int | None = INTEL_RANGE_UJ
) -> dict[str, Path]:
    """Powercap zones, folder to name; answers their counters' files by folder."""
    counters = {}
    for folder, name in zones.items():
        place = root / "sys/class/powercap" / folder
        place.mkdir(parents=True)
        (place / "name").write_text(f"{name}\n")
        if range_uj is not None:
            (place / "max_energy_range_uj").write_text(f"{range_uj}\n")
        counters[folder] = place / "energy_uj"
        counters[folder].write_text("100\n")
    return counters


def renew(path: Path, number: int) -> None:
    """Overwrite a file's number in place, without the cost of truncating it; a file that a test
    took away stays away."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return
    os.write(descriptor, f"{number:<24}\n".encode())
    os.close(descriptor)


def drive_counter(clock: SimulatedClock, counter: Path, simulated: SimulatedCounter) -> None:
    """Renew a counter's file as time passes."""

    def write(time: float) -> None:
        renew(counter, simulated.uj(time))

    write(clock.time)
    clock.watchers.append(write)


def write_hwmon(
    root: Path, address: str, labels: Sequence[str], number: int = 3, driver: str = "ina3221"
) -> Path:
    """An INA3221 as JetPack 5 and later show it, with its sum of shunt voltages as channel 7."""
    folder = root / f"sys/bus/i2c/drivers/{driver}/{address}/hwmon/hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text("ina3221\n")
    (folder / "samples").write_text("1\n")
    (folder / "update_interval").write_text("7\n")
    for channel, label in enumerate(labels, 1):
        (folder / f"in{channel}_label").write_text(f"{label}\n")
        (folder / f"in{channel}_input").write_text("5000\n")
        (folder / f"curr{channel}_input").write_text("100\n")
        (folder / f"in{channel + 3}_input").write_text("7\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("999999\n")
    return folder


def write_ina238(root: Path, address: str = "2-0044", number: int = 5) -> Path:
    """Thor's sensor at the board's input; the answer is its power's file."""
    folder = root / f"sys/bus/i2c/drivers/ina238/{address}/hwmon/hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text("ina238\n")
    (folder / "in1_input").write_text("20000\n")
    (folder / "power1_input").write_text("30000000\n")
    return folder / "power1_input"


def write_iio(root: Path, address: str, labels: Sequence[str], device: int = 0) -> Path:
    """An INA3221 as JetPack 4 shows it."""
    folder = root / f"sys/bus/i2c/drivers/ina3221x/{address}/iio:device{device}"
    folder.mkdir(parents=True)
    for channel, label in enumerate(labels):
        (folder / f"rail_name_{channel}").write_text(f"{label}\n")
        (folder / f"in_power{channel}_input").write_text("2000\n")
        (folder / f"in_current{channel}_input").write_text("400\n")
    return folder


def write_board(root: Path, board: str) -> list[Path]:
    """The sensors of a board of the table; the INA3221 folders."""
    folders = [
        write_hwmon(root, address, labels, number=number)
        for number, (address, labels) in enumerate(BOARDS[board].items(), 3)
    ]
    if board == "thor":
        write_ina238(root)
    return folders


@dataclass(kw_only=True)
class SimulatedRail:
    """A rail at 5 V whose current is renewed at ticks, in whole milliamperes, and flickers.

    A reading is the mean over the tick before it. ``frozen`` as with a counter.
    """

    power: Power
    tick_seconds: float = INA_TICK_SECONDS
    phase: float = 0.0
    frozen: tuple[tuple[float, float], ...] = ()

    def milliamperes(self, time: float) -> int:
        for start, end in self.frozen:
            if start <= time < end:
                time = start
        tick = last_tick(time, self.tick_seconds, self.phase)
        watts = self.power.between(tick - self.tick_seconds, tick) / self.tick_seconds
        number = round(tick / self.tick_seconds)
        flicker = (-1, 0, 1, 0)[(number * 2654435761 >> 7) % 4]
        return max(0, round(watts / 5 * 1000) + flicker)


def drive_rail(clock: SimulatedClock, folder: Path, channel: int, rail: SimulatedRail) -> None:
    """Renew a rail's current as time passes."""
    path = folder / f"curr{channel}_input"

    def write(time: float) -> None:
        renew(path, rail.milliamperes(time))

    write(clock.time)
    clock.watchers.append(write)


class NVMLError(Exception):
    """What NVML raises."""


class NotSupportedError(NVMLError):
    """A query that this GPU does not answer."""


class GpuIsLostError(NVMLError):
    """The GPU has fallen off the bus."""


@dataclass(kw_only=True)
class FakeGpu:
    """A GPU as NVML shows it."""

    uuid: str
    counter: SimulatedCounter
    name: str = "NVIDIA RTX A2000"
    has_energy: bool = True
    has_power: bool = True
    lost_from: float = math.inf
    lost_until: float = math.inf


def fake_pynvml(clock: SimulatedClock, gpus: Sequence[FakeGpu], driver: bool = True) -> ModuleType:
    """A module that answers as nvidia-ml-py does, on a simulated clock; for ``sys.modules``."""
    module: Any = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVMLError_NotSupported = NotSupportedError

    def init() -> None:
        if not driver:
            raise NVMLError("NVML Shared Library Not Found")

    def alive(gpu: FakeGpu) -> None:
        if gpu.lost_from <= clock.time < gpu.lost_until:
            raise GpuIsLostError("GPU is lost")

    def energy(gpu: FakeGpu) -> int:
        alive(gpu)
        if not gpu.has_energy:
            raise NotSupportedError("Not Supported")
        return gpu.counter.uj(clock.time) // 1000

    def power(gpu: FakeGpu) -> int:
        alive(gpu)
        if not gpu.has_power:
            raise NotSupportedError("Not Supported")
        simulated = gpu.counter
        tick = last_tick(clock.time, simulated.tick_seconds, simulated.phase)
        watts = simulated.power.between(tick - 0.01, tick) / 0.01
        flicker = (-3, 0, 3, 0)[(round(tick / simulated.tick_seconds) * 2654435761 >> 7) % 4]
        return round(watts * 1000) + flicker

    module.nvmlInit = init
    module.nvmlDeviceGetCount = lambda: len(gpus)
    module.nvmlDeviceGetHandleByIndex = lambda index: gpus[index]
    module.nvmlDeviceGetUUID = lambda gpu: gpu.uuid
    module.nvmlDeviceGetName = lambda gpu: gpu.name
    module.nvmlDeviceGetTotalEnergyConsumption = energy
    module.nvmlDeviceGetPowerUsage = power
    found: ModuleType = module
    return found
