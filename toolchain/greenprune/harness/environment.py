"""What a measurement depends on and cannot change: the machine as it is, before and after.

Nothing is changed here. What cannot be read is None.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil

from greenprune._version import __version__

PACKAGES = (
    "numpy",
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "nn-dataflow",
    "pyJoules",
)


def describe_environment(root: Path = Path("/")) -> dict[str, Any]:
    """The state of the machine as plain data.

    Args:
        root: where ``proc`` and ``sys`` are looked for.
    """
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    return {
        "cpu": cpu_model(root),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "governor": _read(cpufreq / "scaling_governor"),
        "energy_preference": _read(cpufreq / "energy_performance_preference"),
        "frequency_mhz": _frequency_mhz(),
        "boost": _boost(root),
        "throttle_events": _throttle_events(root),
        "temperature_c": hottest_c(),
        "load_average": list(os.getloadavg()),
        "virtual_machine": _is_virtual(root),
        "container": (root / ".dockerenv").exists() or (root / "run/.containerenv").exists(),
        "on_battery": _on_battery(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
    }


def usable_cores() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model(root: Path = Path("/")) -> str | None:
    """The processor's name."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or None


def hottest_c() -> float | None:
    """The highest temperature that a sensor reports, Celsius."""
    if not hasattr(psutil, "sensors_temperatures"):  # Linux and FreeBSD have it
        return None
    sensors = psutil.sensors_temperatures()
    readings = [entry.current for entries in sensors.values() for entry in entries]
    return max(readings, default=None)


def versions() -> dict[str, str]:
    """Versions of Python, greenprune and the packages that a result depends on."""
    found = {"python": platform.python_version(), "greenprune": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def diagnose(root: Path = Path("/")) -> dict[str, Any]:
    """What this machine can do and what it lacks, for ``greenprune doctor``."""
    from greenprune.meters import diagnose_meters

    state = describe_environment(root)
    temporary = Path(tempfile.gettempdir())
    return {
        "python": state["versions"].pop("python"),
        "greenprune": state["versions"].pop("greenprune"),
        "packages": state["versions"],
        "targets": _diagnose_targets(),
        "meters": diagnose_meters(root),
        "cpu": state["cpu"],
        "threads": state["usable_cores"],
        "governor": state["governor"],
        "power_mode": _power_mode(root),
        "virtual_machine": state["virtual_machine"],
        "disk_free_gb": {
            str(place): round(shutil.disk_usage(place).free / 1e9, 1)
            for place in dict.fromkeys((Path.cwd(), temporary))
        },
    }


def print_diagnosis(found: dict[str, Any]) -> None:
    """What :func:`diagnose` found, as lines for a person on stdout."""
    state = ("cpu", "threads", "governor", "power_mode", "virtual_machine")
    print(f"greenprune {found['greenprune']} on Python {found['python']}")
    print("packages: " + ", ".join(f"{name} {v}" for name, v in found["packages"].items()))
    for key in state:
        value = found[key]
        print(f"{key.replace('_', ' ')}: {'not known' if value is None else value}")
    for place, free in found["disk_free_gb"].items():
        print(f"disk free: {free} GB at {place}")
    print("targets:")
    for name, target in found["targets"].items():
        lacks = f"; not installed: {', '.join(target['lacks'])}" if target["lacks"] else ""
        print(f"  {name:<9}{target['status']}{lacks}")
    print("meters:")
    for name, meter in found["meters"].items():
        print(f"  {name:<9}{'works' if meter['works'] else meter['reason']}")
        if meter["command"]:
            print(f"  {'':<9}to grant access: {meter['command']}")


def _diagnose_targets() -> dict[str, dict[str, Any]]:
    from greenprune.errors import GreenpruneError
    from greenprune.registry import available_targets, load_target

    answer: dict[str, dict[str, Any]] = {}
    for name in available_targets():
        try:
            target = load_target(name)
        except GreenpruneError as problem:
            answer[name] = {"status": str(problem), "runtimes": [], "lacks": []}
            continue
        here = list(target.runtimes_here())
        answer[name] = {
            "status": target.capabilities.status,
            "runtimes": here,
            "lacks": [each for each in target.capabilities.runtimes if each not in here],
        }
    return answer


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _frequency_mhz() -> float | None:
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return None if frequency is None else float(frequency.current)


def _boost(root: Path) -> bool | None:
    cpu = root / "sys/devices/system/cpu"
    no_turbo, boost = _read(cpu / "intel_pstate/no_turbo"), _read(cpu / "cpufreq/boost")
    if no_turbo is not None:
        return no_turbo == "0"
    return None if boost is None else boost == "1"


def _throttle_events(root: Path) -> int | None:
    cpu = root / "sys/devices/system/cpu"
    counts = [_read(path) for path in cpu.glob("cpu*/thermal_throttle/core_throttle_count")]
    numbers = [int(count) for count in counts if count and count.isdigit()]
    return sum(numbers) if numbers else None


def _is_virtual(root: Path) -> bool | None:
    text = _read(root / "proc/cpuinfo")
    return None if text is None else "hypervisor" in text.split()


def _on_battery() -> bool | None:
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    return None if battery is None else not battery.power_plugged


def _power_mode(root: Path) -> str | None:
    """Jetson's power mode, or the laptop's platform profile."""
    return _read(root / "var/lib/nvpmodel/status") or _read(
        root / "sys/firmware/acpi/platform_profile"
    )
