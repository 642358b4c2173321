"""RAPL, the energy counters of Intel and AMD processors, through Linux's powercap files.

Zones are found by what they are (a ``name`` and an ``energy_uj`` file), not by how their folders
are numbered. Only packages and DRAM count: ``core`` and ``uncore`` lie inside the package, and
``psys`` around it, so adding them would count joules twice. The counter wraps at
``max_energy_range_uj``; a thread reads it each second, so that no wrap goes unseen.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from greenprune.errors import MeasurementError
from greenprune.meters._pyjoules import Device, Domain

POLL_SECONDS = 1.0
PROOF_SECONDS = 0.25


class Zone:
    """One counter, made cumulative: microjoules since it was opened."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.counter = folder / "energy_uj"
        self._range = folder / "max_energy_range_uj"
        self._last_uj: int | None = None
        self._total_uj = 0

    def read(self) -> int:
        """Microjoules since the first read; the range is added once per backward step.

        Raises:
            MeasurementError: the counter cannot be read, or has wrapped and its range is unknown.
        """
        now_uj = _read_number(self.counter)
        if self._last_uj is not None:
            step_uj = now_uj - self._last_uj
            if step_uj < 0:
                step_uj += _read_number(self._range)
            if step_uj < 0:
                raise MeasurementError(
                    f"{self.counter}: went back from {self._last_uj} to {now_uj} uJ, more than "
                    f"{self._range.name} explains; the window is invalid: measure again"
                )
            self._total_uj += step_uj
        self._last_uj = now_uj
        return self._total_uj


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise MeasurementError(
            f"{path}: no permission to read the energy counter; run: {access_command([path])}"
        ) from error
    except (OSError, ValueError) as error:
        raise MeasurementError(
            f"{path}: expected a number of microjoules: {error}; "
            "use --meter estimate where the counter does not work"
        ) from error


def access_command(counters: list[Path]) -> str:
    """The command that lets every user read these counters until the next boot."""
    return f"sudo chmod a+r {' '.join(str(path) for path in counters)}"


def find_zones(root: Path) -> list[Zone]:
    """The package and DRAM zones below ``root``; an empty list where there are none."""
    powercap = root / "sys/class/powercap"
    folders = {
        found.parent.resolve(): None
        for pattern in ("*", "*/*", "*/*/*")
        for found in sorted(powercap.glob(f"{pattern}/energy_uj"))
    }
    by_interface: dict[str, list[Zone]] = {}
    for folder in sorted(folders):
        name = (folder / "name").read_text().strip() if (folder / "name").is_file() else ""
        if name.startswith("package") or name == "dram":
            # intel-rapl and intel-rapl-mmio are two views of the same packages: take one.
            interface = folder.name.partition(":")[0]
            by_interface.setdefault(interface, []).append(Zone(folder, name))
    usable = [key for key, zones in by_interface.items() if any(z.name != "dram" for z in zones)]
    if not usable:
        return []
    return by_interface["intel-rapl" if "intel-rapl" in usable else min(usable)]


class RaplDomain(Domain):  # type: ignore[misc]
    """A package or its DRAM, in pyJoules' terms."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone

    def __repr__(self) -> str:
        return f"{self.zone.name} ({self.zone.counter.parent.name})"

    def get_device_type(self) -> str:
        return "greenprune_rapl"


class RaplDevice(Device):  # type: ignore[misc]
    """pyJoules device of all package and DRAM zones, cumulative microjoules.

    Raises:
        MeasurementError: there is no zone, or one cannot be read.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        zones = find_zones(root)
        if not zones:
            raise MeasurementError(
                f"{root / 'sys/class/powercap'}: no RAPL package counter here (virtual machines "
                "and containers rarely have one); --meter estimate needs none"
            )
        self._available_domains = [RaplDomain(zone) for zone in zones]
        self.configure()
        self._lock = threading.Lock()
        self._problem: MeasurementError | None = None
        self.get_energy()
        self._stop = threading.Event()
        threading.Thread(target=self._poll, name="rapl-poll", daemon=True).start()

    @staticmethod
    def available_domains() -> list[Domain]:
        """Empty: the domains depend on the root folder, which only an instance knows."""
        return []

    def get_energy(self) -> list[int]:
        """Microjoules of each zone since the device was opened."""
        with self._lock:
            if self._problem is not None:
                raise self._problem
            return [domain.zone.read() for domain in self.get_configured_domains()]

    def proves(self) -> bool:
        """Whether the counters move: some virtual machines show one that stands still."""
        first = self.get_energy()
        deadline = time.monotonic() + PROOF_SECONDS
        while time.monotonic() < deadline:
            if self.get_energy() != first:
                return True
            time.sleep(0.002)
        return False

    def close(self) -> None:
        self._stop.set()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self.get_energy()
            except MeasurementError as problem:
                self._problem = problem  # raised at the next reading of the window
                return
