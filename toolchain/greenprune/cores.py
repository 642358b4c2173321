"""How many threads an inference may take on this machine (device side)."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use: its affinity mask (``taskset``, a container's
    cpuset), a core's hardware threads counted once, and no more than its control group's CPU
    quota (``docker run --cpus``, systemd's ``CPUQuota``; control groups version 2).

    Two hardware threads of a core share its arithmetic units, and more threads than the quota only
    stop each other until the period is over.

    Args:
        root: where ``proc`` and ``sys`` are looked for.
    """
    cores = {_siblings(root, processor) for processor in usable_processors()}
    return max(1, int(min(len(cores), _quota(root))))


def usable_processors() -> frozenset[int]:
    """Logical processors in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def session_threads(asked: int) -> int:
    """Threads of a session on the CPU: ``asked``, at most one for each usable logical processor;
    0 means :func:`usable_cores`."""
    return min(asked, len(usable_processors())) if asked else usable_cores()


def _siblings(root: Path, processor: int) -> str:
    """Names the core of a logical processor: the processors that share it, as in ``0,8``."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    try:
        return (topology / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(processor)


def _quota(root: Path) -> float:
    """Cores that the CPU quotas of this process's control group and those above it are worth;
    infinite without a quota."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    own = next((line[len("0::/") :] for line in groups if line.startswith("0::/")), "")
    quotas = [math.inf]
    for group in (PurePosixPath(own), *PurePosixPath(own).parents):
        try:
            quota, period = (root / "sys/fs/cgroup" / group / "cpu.max").read_text().split()
        except OSError:
            continue
        if quota != "max":
            quotas.append(math.ceil(int(quota) / int(period)))
    return min(quotas)
