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
from typing import Any, TypedDict

import psutil

from greenprune._version import __version__
from greenprune.cores import usable_cores
from greenprune.harness.conditions import (
    GpuState,
    frequency_mhz,
    gpus,
    read_text,
    temperatures_c,
    throttle_events,
)
from greenprune.meters.estimate import is_virtual

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


class Environment(TypedDict):
    """The state of the machine; None for what cannot be read."""

    cpu: str | None
    cores: int | None
    usable_cores: int
    affinity: list[int] | None
    """Processors that this process may use."""
    governor: str | None
    energy_preference: str | None
    """EPP, the hint to processors that set their own clock."""
    boost: bool | None
    clocks_locked: bool | None
    """Whether least and largest clock are one, as jetson_clocks makes them."""
    power_mode: str | None
    """Jetson's nvpmodel, or a laptop's platform profile."""
    frequency_mhz: float | None
    temperature_c: float | None
    temperatures_c: dict[str, float]
    throttle_events: int | None
    """Since the start of the system."""
    gpus: list[GpuState]
    load_average: list[float]
    virtual_machine: bool | None
    container: bool
    on_battery: bool | None
    system: str
    versions: dict[str, str]


def describe_environment(root: Path = Path("/")) -> Environment:
    """The state of the machine as plain data.

    Args:
        root: where ``proc`` and ``sys`` are looked for.
    """
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    temperatures = temperatures_c()
    return {
        "cpu": cpu_model(root),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": read_text(cpufreq / "scaling_governor"),
        "energy_preference": read_text(cpufreq / "energy_performance_preference"),
        "boost": _boost(root),
        "clocks_locked": _clocks_locked(cpufreq),
        "power_mode": _power_mode(root),
        "frequency_mhz": frequency_mhz(),
        "temperature_c": max(temperatures.values(), default=None),
        "temperatures_c": temperatures,
        "throttle_events": throttle_events(root),
        "gpus": gpus(),
        "load_average": list(os.getloadavg()),
        "virtual_machine": is_virtual(root),
        "container": _in_container(root),
        "on_battery": _on_battery(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
    }


def cpu_model(root: Path = Path("/")) -> str | None:
    """The processor's name."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or None


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
        "power_mode": state["power_mode"],
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
    width = 2 + max(map(len, found["targets"]))
    for name, target in found["targets"].items():
        print(f"  {name:<{width}}{target['status']}")
        for runtime, command in target["lacks"].items():
            print(f"  {'':<{width}}{runtime} is not installed: {command}")
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
            answer[name] = {"status": str(problem), "runtimes": [], "lacks": {}}
            continue
        here = list(target.runtimes_here())
        answer[name] = {
            "status": target.capabilities.status,
            "runtimes": here,
            "lacks": {
                each: target.how_to_install(each)
                for each in target.capabilities.runtimes
                if each not in here
            },
        }
    return answer


def _boost(root: Path) -> bool | None:
    cpu = root / "sys/devices/system/cpu"
    no_turbo, boost = read_text(cpu / "intel_pstate/no_turbo"), read_text(cpu / "cpufreq/boost")
    if no_turbo is not None:
        return no_turbo == "0"
    return None if boost is None else boost == "1"


def _clocks_locked(cpufreq: Path) -> bool | None:
    least, most = (read_text(cpufreq / f"scaling_{end}_freq") for end in ("min", "max"))
    return None if least is None or most is None else least == most


def _in_container(root: Path) -> bool:
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        return True
    groups = read_text(root / "proc/1/cgroup") or ""
    return any(word in groups for word in ("docker", "kubepods", "containerd", "lxc"))


def _on_battery() -> bool | None:
    try:
        battery = getattr(psutil, "sensors_battery", lambda: None)()
    except OSError:  # no folder of power supplies, as in an emulated machine
        return None
    return None if battery is None else not battery.power_plugged


def _power_mode(root: Path) -> str | None:
    return read_text(root / "var/lib/nvpmodel/status") or read_text(
        root / "sys/firmware/acpi/platform_profile"
    )
