"""RAPL, the energy counters of Intel and AMD processors, through Linux's powercap files.

Zones are found by what they are (a ``name`` and an ``energy_uj`` file), not by how their folders
are numbered. Only packages and DRAM count: ``core`` and ``uncore`` lie inside the package, and
``psys`` around it, so adding them would count joules twice.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock
from greenprune.meters.counters import Counter, CounterDevice
from greenprune.meters.files import access_command, read_number, read_text


def find_counters(root: Path) -> dict[Path, str]:
    """The energy files of packages and their DRAM below ``root``, and the zones' names."""
    powercap = root / "sys/class/powercap"
    folders = {
        found.parent.resolve(): None
        for pattern in ("*", "*/*", "*/*/*")
        for found in sorted(powercap.glob(f"{pattern}/energy_uj"))
    }
    by_interface: dict[str, dict[Path, str]] = {}
    for folder in sorted(folders):
        name = _name(folder)
        if name.startswith("package") or name == "dram":
            # intel-rapl and intel-rapl-mmio are two views of the same packages: take one.
            interface = folder.name.partition(":")[0]
            by_interface.setdefault(interface, {})[folder / "energy_uj"] = name
    usable = [key for key, zones in by_interface.items() if set(zones.values()) != {"dram"}]
    if not usable:
        return {}
    zones = by_interface["intel-rapl" if "intel-rapl" in usable else min(usable)]
    wholes = set(zones.values())
    # a kernel names packages or their dies; should both be there, the package holds its dies
    return {
        path: name
        for path, name in zones.items()
        if name.partition("-die-")[0] == name or name.partition("-die-")[0] not in wholes
    }


def protected_files(root: Path) -> list[Path]:
    """What must be readable: the counters, and their ranges, which some kernels guard as well."""
    counters = list(find_counters(root))
    ranges = [path.parent / "max_energy_range_uj" for path in counters]
    return counters + [path for path in ranges if path.exists()]


def _name(folder: Path) -> str:
    try:
        return read_text(folder / "name").strip()
    except OSError:
        return ""


def open_rapl(root: Path, clock: Clock) -> CounterDevice:
    """The device of all package and DRAM counters.

    Raises:
        MeasurementError: there is none, or one cannot be read; the message has the command that
            grants access to all of them.
    """
    found = find_counters(root)
    if not found:
        raise MeasurementError(
            f"{root / 'sys/class/powercap'}: no RAPL package counter here (virtual machines "
            "and containers rarely have one); --meter estimate needs none"
        )
    try:
        for path in found:
            read_text(path)
    except PermissionError as error:
        raise MeasurementError(
            f"{error.filename}: no permission to read RAPL; run: "
            f"{access_command(protected_files(root))}"
        ) from error
    except OSError:
        pass  # the device's first reading says it better
    return CounterDevice(
        [
            Counter(
                f"{name} ({path.parent.name})",
                partial(read_number, path),
                _range(path),
                required=name != "dram",
            )
            for path, name in found.items()
        ],
        clock,
    )


def _range(counter: Path) -> int | None:
    try:
        return read_number(counter.parent / "max_energy_range_uj")
    except MeasurementError:
        return None  # it matters only if the counter wraps
