"""What a window was measured under: other programs, other guests, clock, heat, throttling.

A reading before and one after, both outside what is timed. What the machine does not tell is None.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import psutil

from greenprune.errors import MeasurementError

GPU_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
GPU_LIMITS = {0x02: "application clocks", 0x04: "power cap", 0x10: "sync boost", **GPU_SLOWDOWNS}
"""NVML's clock event reasons; being idle is none. A power cap is how many GPUs always run."""
GPU_POLICIES = {"thermal limit": 1, "reliability limit": 5}
"""NVML's performance policies whose violation is a slowdown; a power cap is none."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Of one window; cores are CPU seconds for each second."""

    background_cores: float | None
    """Taken by other programs."""
    stolen_cores: float | None
    """Taken by other guests of a virtual machine's host."""
    frequency_mhz: float | None
    """Of the processor, mean of the cores, at the window's end."""
    temperature_c: float | None
    """Of the hottest sensor, at the window's end."""
    throttled: str = ""
    """What slowed the processor or the GPU down; empty where nothing did."""


class GpuState(TypedDict):
    """One NVIDIA GPU; None for what it does not tell."""

    name: str
    driver: str
    clock_mhz: int | None
    memory_clock_mhz: int | None
    power_limit_watts: float | None
    temperature_c: int | None
    limited_by: list[str]
    """Clock event reasons in words."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Counters at one moment."""

    clock: float
    busy: float | None
    """CPU seconds of all programs since the start of the system."""
    stolen: float | None
    own: float
    """CPU seconds of this process."""
    throttle_events: int | None
    gpu_slowed: dict[str, int]
    """By cause, how long the GPUs were held back for it so far; without those that none counts."""


def read_conditions(root: Path = Path("/"), *, gpu: bool = False) -> Reading:
    """The counters now; ``root`` is where ``sys`` is looked for, ``gpu`` whether GPUs are asked."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq")
    return Reading(
        clock=time.monotonic(),
        busy=sum(getattr(times, kind, 0.0) for kind in kinds),
        stolen=getattr(times, "steal", None),
        own=time.process_time(),
        throttle_events=throttle_events(root),
        gpu_slowed=gpu_slowed() if gpu else {},
    )


def conditions_since(before: Reading, *, gpu: bool = False) -> Conditions:
    """What happened between ``before`` and now; ``gpu``: whether a GPU's slowdowns matter.

    A GPU's clock event reasons are of this moment, when it is idle again; so what held it back in
    between is seen by its violation counters, where it has them.
    """
    after = read_conditions(gpu=gpu)
    seconds = after.clock - before.clock
    background = stolen = None
    if before.busy is not None and after.busy is not None:
        background = max(0.0, after.busy - before.busy - (after.own - before.own)) / seconds
    if before.stolen is not None and after.stolen is not None:
        stolen = max(0.0, after.stolen - before.stolen) / seconds
    causes = [
        f"GPU: {cause}"
        for cause, slowed in after.gpu_slowed.items()
        if slowed > before.gpu_slowed.get(cause, slowed)
    ]
    if gpu:
        causes += [name for state in gpus() for name in slowdowns(state)]
    if (before.throttle_events or 0) < (after.throttle_events or 0):
        causes.append("processor throttled")
    return Conditions(
        background_cores=background,
        stolen_cores=stolen,
        frequency_mhz=frequency_mhz(),
        temperature_c=hottest_c(),
        throttled=", ".join(dict.fromkeys(causes)),
    )


def throttle_events(root: Path = Path("/")) -> int | None:
    """Throttle events since the start of the system: x86 cores and packages, Jetson's SoC.

    Every core tells its package's count too: the sum is there to be compared with a later one.
    """
    patterns = (
        "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count",
        "sys/class/hwmon/hwmon*/oc*_event_cnt",
    )
    texts = [read_text(path) for pattern in patterns for path in root.glob(pattern)]
    numbers = [int(text) for text in texts if text and text.isdigit()]
    return sum(numbers) if numbers else None


def frequency_mhz() -> float | None:
    """The processor's clock, mean of the cores."""
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return None if frequency is None else float(frequency.current)


def temperatures_c() -> dict[str, float]:
    """Sensor to Celsius; empty where there is none."""
    if not hasattr(psutil, "sensors_temperatures"):  # Linux and FreeBSD have it
        return {}
    return {
        f"{chip} {entry.label or index}": float(entry.current)
        for chip, entries in psutil.sensors_temperatures().items()
        for index, entry in enumerate(entries)
    }


def hottest_c() -> float | None:
    """The highest temperature that a sensor reports, Celsius."""
    return max(temperatures_c().values(), default=None)


def gpus() -> list[GpuState]:
    """NVIDIA's GPUs that this process sees; an empty list where there is no driver."""
    nvml, handles = _visible()
    if not handles:
        return []
    driver = _asked(nvml, nvml.nvmlSystemGetDriverVersion)
    return [_gpu(nvml, handle, str(driver)) for handle in handles]


def gpu_slowed() -> dict[str, int]:
    """By cause, the time that it held the visible GPUs' clocks down since the driver started.

    The sum over GPUs, in NVML's unit (nanoseconds); a cause that no GPU counts is absent.
    """
    nvml, handles = _visible()
    slowed: dict[str, int] = {}
    for cause, policy in GPU_POLICIES.items():
        found = [_asked(nvml, nvml.nvmlDeviceGetViolationStatus, gpu, policy) for gpu in handles]
        times = [int(status.violationTime) for status in found if status is not None]
        if times:
            slowed[cause] = sum(times)
    return slowed


def _visible() -> tuple[Any, list[Any]]:
    """NVML, and the GPUs that this process sees."""
    from greenprune.meters.nvml import visible_gpus

    nvml = _nvml()
    try:
        return nvml, [] if nvml is None else list(visible_gpus(nvml).values())
    except MeasurementError:
        return nvml, []  # the meter tells why


def slowdowns(state: GpuState) -> list[str]:
    """Why a GPU runs slower than it was set to; empty where it does not."""
    return [f"GPU: {name}" for name in state["limited_by"] if name in GPU_SLOWDOWNS.values()]


@functools.cache
def _nvml() -> Any:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _gpu(nvml: Any, handle: Any, driver: str) -> GpuState:
    limit = _asked(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    reasons = _asked(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    return {
        "name": str(_asked(nvml, nvml.nvmlDeviceGetName, handle)),
        "driver": driver,
        "clock_mhz": _asked(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _asked(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        "power_limit_watts": None if limit is None else limit / 1e3,
        "temperature_c": _asked(
            nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
        ),
        "limited_by": [words for bit, words in GPU_LIMITS.items() if reasons & bit],
    }


def _asked(nvml: Any, question: Any, *arguments: Any) -> Any:
    """NVML's answer; None where this GPU does not support the question."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def read_text(path: Path) -> str | None:
    """A small file's text, stripped; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
