"""What the harness reads of the machine around a window: programs, guests, clock, GPUs."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import psutil
import pytest

from greenprune.errors import MeasurementError
from greenprune.harness import conditions, describe_environment
from greenprune.harness.conditions import Reading, conditions_since, gpus, slowdowns
from greenprune.meters import nvml


def test_events_of_cores_packages_and_a_jetson_are_counted(tmp_path: Path) -> None:
    assert conditions.throttle_events(tmp_path) is None
    for name, text in (
        ("sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "3\n"),
        ("sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "4\n"),
        ("sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "5\n"),
        ("sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_total_time_ms", "70\n"),
        ("sys/class/hwmon/hwmon2/oc1_event_cnt", "2\n"),
        ("sys/class/hwmon/hwmon2/oc2_event_cnt", "not a number\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert conditions.throttle_events(tmp_path) == 14


def test_own_time_is_no_background_and_a_throttle_is_a_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def at(clock: float, busy: float, stolen: float, own: float, events: int) -> Reading:
        return Reading(
            clock=clock, busy=busy, stolen=stolen, own=own, throttle_events=events, gpu_slowed={}
        )

    def between(after: Reading) -> conditions.Conditions:
        monkeypatch.setattr(conditions, "read_conditions", lambda gpu: after)
        return conditions_since(at(10.0, 100.0, 5.0, 7.0, 3))

    found = between(at(12.0, 105.0, 6.0, 8.0, 3))
    assert (found.background_cores, found.stolen_cores, found.throttled) == (2.0, 0.5, "")
    assert between(at(12.0, 100.0, 5.0, 9.0, 3)).background_cores == 0.0
    assert between(at(12.0, 100.0, 5.0, 9.0, 4)).throttled == "processor throttled"


def test_systems_that_tell_no_steal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = types.SimpleNamespace(user=1.0, nice=0.0, system=2.0, idle=9.0)  # as on macOS
    monkeypatch.setattr(psutil, "cpu_times", lambda: times)
    reading = conditions.read_conditions()
    assert (reading.busy, reading.stolen) == (3.0, None)
    assert conditions_since(reading).stolen_cores is None


class NotSupportedError(Exception):
    """NVML's."""


def fake_nvml(reasons: int, violations: dict[int, int] | None = None) -> Any:
    """``violations``: nanoseconds by performance policy; those that it lacks are not supported."""

    def refuse(handle: Any) -> Any:
        raise NotSupportedError

    def violation(handle: Any, policy: int) -> Any:
        if policy not in (violations or {}):
            raise NotSupportedError
        return types.SimpleNamespace(referenceTime=1, violationTime=(violations or {})[policy])

    return types.SimpleNamespace(
        NVMLError=NotSupportedError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlSystemGetDriverVersion=lambda: "595.1",
        nvmlDeviceGetName=lambda handle: f"GPU {handle}",
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 250_000,
        nvmlDeviceGetTemperature=lambda handle, kind: refuse(handle),
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
        nvmlDeviceGetViolationStatus=violation,
    )


def test_gpus_tell_their_clocks_limits_and_slowdowns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_nvml", lambda: fake_nvml(0x1 | 0x4 | 0x40))
    monkeypatch.setattr(nvml, "visible_gpus", lambda module: {"GPU-1": 7})
    (found,) = gpus()
    assert (found["name"], found["driver"], found["power_limit_watts"]) == ("GPU 7", "595.1", 250.0)
    assert (found["clock_mhz"], found["memory_clock_mhz"]) == (1000, 2000)
    assert found["temperature_c"] is None
    assert found["limited_by"] == ["power cap", "hardware thermal slowdown"]
    assert slowdowns(found) == ["GPU: hardware thermal slowdown"]
    assert describe_environment()["gpus"] == [found]
    reading = conditions.read_conditions()
    assert conditions_since(reading, gpu=True).throttled == "GPU: hardware thermal slowdown"
    assert conditions_since(reading).throttled == ""

    def hidden(module: Any) -> Any:
        raise MeasurementError("a MIG slice")

    monkeypatch.setattr(nvml, "visible_gpus", hidden)
    assert gpus() == []


def test_a_gpu_that_throttled_within_a_window_and_is_idle_again_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    power, thermal, reliability = 0, 1, 5
    violations = {power: 10, thermal: 10}
    nvml_module = fake_nvml(0x1, violations)  # idle, before and after
    monkeypatch.setattr(conditions, "_nvml", lambda: nvml_module)
    monkeypatch.setattr(nvml, "visible_gpus", lambda module: {"GPU-1": 7, "GPU-2": 8})
    reading = conditions.read_conditions(gpu=True)
    assert reading.gpu_slowed == {"thermal limit": 20}  # what no GPU counts is absent, not 0
    violations[power] = 99  # the cap at which many GPUs always run
    assert conditions_since(reading, gpu=True).throttled == ""
    violations[thermal] = 11
    assert conditions_since(reading, gpu=True).throttled == "GPU: thermal limit"
    assert conditions_since(reading).throttled == ""
    violations[reliability] = 5  # it answers only now: what it counted before is not known
    assert conditions_since(reading, gpu=True).throttled == "GPU: thermal limit"


def test_a_container_is_known_by_its_cgroup(tmp_path: Path) -> None:
    assert not describe_environment(tmp_path)["container"]
    (tmp_path / "proc/1").mkdir(parents=True)
    (tmp_path / "proc/1/cgroup").write_text("0::/kubepods/burstable/pod1\n")
    assert describe_environment(tmp_path)["container"]


def test_locked_clocks_and_energy_preference(tmp_path: Path) -> None:
    cpufreq = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    cpufreq.mkdir(parents=True)
    (cpufreq / "energy_performance_preference").write_text("balance_power\n")
    (cpufreq / "scaling_min_freq").write_text("1510400\n")
    (cpufreq / "scaling_max_freq").write_text("1510400\n")
    found = describe_environment(tmp_path)
    assert found["energy_preference"] == "balance_power"
    assert found["clocks_locked"] is True
    (cpufreq / "scaling_min_freq").write_text("115200\n")
    assert describe_environment(tmp_path)["clocks_locked"] is False
    assert describe_environment(tmp_path / "none")["clocks_locked"] is None
