"""The estimate for machines without a meter: a model of power, driven by the process's CPU time.

With a known TDP the power of a loaded processor follows Boavizta's four points, 12, 32, 75 and
102 % of TDP at 0, 10, 50 and 100 % load; its interval goes from CodeCarbon's cubic curve,
TDP x (0.1 + 0.9 load^3), to the whole TDP. For an unknown processor a busy core takes between 4 W
(CodeCarbon) and 12 W (Green Algorithms); the value is their middle, and an idle core takes nothing.
The load is this process's and its children's share of the processor, or that of all descendants of
a process that is named: other programs are not counted.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from greenprune.errors import MeasurementError
from greenprune.meters._pyjoules import Device, Domain
from greenprune.meters.device import NamedDomain

LOW_WATTS_PER_CORE = 4.0
HIGH_WATTS_PER_CORE = 12.0
_CURVE = ((0.0, 0.12), (0.1, 0.32), (0.5, 0.75), (1.0, 1.02))


@dataclass(frozen=True, kw_only=True)
class Power:
    """Watts: the model's value and the ends of its interval."""

    low: float
    value: float
    high: float


def power(busy_cores: float, cores: int, tdp_watts: float | None) -> Power:
    """Watts drawn while ``busy_cores`` of ``cores`` work.

    Args:
        busy_cores: CPU seconds for each second, 0 to ``cores``.
        cores: logical processors of the machine.
        tdp_watts: thermal design power of all of them together; None where it is not known.
    """
    if tdp_watts is None:
        low, high = LOW_WATTS_PER_CORE * busy_cores, HIGH_WATTS_PER_CORE * busy_cores
        return Power(low=low, value=(low + high) / 2, high=high)
    load = min(busy_cores / cores, 1.0)
    value = tdp_watts * _curve(load)
    low = tdp_watts * (0.1 + 0.9 * load**3)
    return Power(low=min(low, value), value=value, high=max(tdp_watts, value))


def _curve(load: float) -> float:
    for (left, start), (right, end) in pairwise(_CURVE):
        if load <= right:
            return start + (end - start) * (load - left) / (right - left)
    return _CURVE[-1][1]


def is_virtual(root: Path) -> bool | None:
    """Whether the processor's flags name a hypervisor below it; None where ``proc/cpuinfo`` cannot
    be read or has no flags: x86 alone tells."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    flags = [words.split() for key, _, words in pairs if key.strip() == "flags"]
    return any("hypervisor" in words for words in flags) if flags else None


class EstimateDevice(Device):  # type: ignore[misc]
    """pyJoules device whose domains are ``low``, ``value`` and ``high``, in microjoules.

    Args:
        tdp_watts: as in :func:`power`.
        launcher: the process whose descendants are counted, this one among them; None: this one
            and its own.

    Raises:
        MeasurementError: their CPU time cannot be read.
    """

    may_be_zero = True
    """Of an unknown processor an idle core takes nothing."""

    def __init__(self, tdp_watts: float | None, launcher: int | None = None) -> None:
        super().__init__()
        self.configure()
        self._tdp_watts = tdp_watts
        self._cores = os.cpu_count() or 1
        try:
            self._process = psutil.Process(launcher)
        except psutil.Error as error:
            raise MeasurementError(
                f"the CPU time of this process cannot be read ({error}); mount /proc"
            ) from error
        self._launched = launcher is not None
        self._lock = threading.Lock()
        self._joules = [0.0, 0.0, 0.0]
        self._children_seconds = 0.0
        self._cpu_seconds = self._read_cpu_seconds()
        self._clock = time.monotonic()

    @staticmethod
    def available_domains() -> list[Domain]:
        return [NamedDomain(name) for name in ("low", "value", "high")]

    def get_energy(self) -> list[float]:
        """Microjoules since the device was opened: low, value, high."""
        with self._lock:
            cpu_seconds, clock = self._read_cpu_seconds(), time.monotonic()
            seconds = clock - self._clock
            if seconds > 0:
                busy = (cpu_seconds - self._cpu_seconds) / seconds
                watts = power(busy, self._cores, self._tdp_watts)
                for index, part in enumerate((watts.low, watts.value, watts.high)):
                    self._joules[index] += part * seconds
                self._cpu_seconds, self._clock = cpu_seconds, clock
            return [joules * 1e6 for joules in self._joules]

    def prove(self, patience_seconds: float) -> None:
        """A model was read when it was opened, and may be zero."""

    def mark(self) -> None:
        """Windows need no memory: the model's interval is all its doubt."""

    def doubt_uj(self, start: None, end: None) -> float:
        """None beside the model's interval."""
        return 0.0

    def close(self) -> None:
        """Nothing is held open."""

    def _read_cpu_seconds(self) -> float:
        """CPU seconds of this process and of children, those alive and those that ended."""
        ended = self._process.cpu_times()
        children = ended.children_user + ended.children_system
        for child in self._process.children(recursive=True):
            try:
                children += sum(child.cpu_times()[:4])
            except psutil.Error:
                continue  # it ended between the two calls; its parent's sums have it next time
        # A child on its way from one sum to the other must not make the total go back.
        self._children_seconds = max(self._children_seconds, children)
        # a launcher's own are none: it waits, and this process is among its children
        own = 0.0 if self._launched else time.process_time()
        return own + self._children_seconds
