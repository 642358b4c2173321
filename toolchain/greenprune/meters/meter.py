"""Opening a meter and measuring a stretch of work with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from greenprune.bundle import Provenance
from greenprune.errors import MeasurementError, NotAvailableError
from greenprune.meters.energy import Energy

NAMES = ("auto", "rapl", "estimate", "none")
LATER = ("nvml", "ina3221")


class Window:
    """A measured stretch; ``energy`` is set when it ends, and stays None without a meter."""

    energy: Energy | None = None


class Meter:
    """A source of joules. Use :func:`open_meter`; windows may lie inside each other.

    ``name`` is ``rapl``, ``estimate`` or ``none``.
    """

    def __init__(
        self,
        name: str,
        device: Any = None,
        *,
        provenance: Provenance = "measured_counter",
        scope: str = "",
        note: str = "",
    ) -> None:
        self.name = name
        self.provenance = provenance if device is not None else None
        self.scope = scope
        self.note = note
        self._device = device

    @contextmanager
    def measure(self) -> Iterator[Window]:
        """Measure what runs inside ``with``; the window's energy is there after it.

        Raises:
            MeasurementError: the counter could not be read, or did not move at all.
        """
        window = Window()
        if self._device is None:
            yield window
            return
        from greenprune.meters._pyjoules import EnergyMeter

        # A trace of one sample only: pyJoules walks longer ones recursively. Its own durations
        # come from a clock that can jump, so the seconds are ours.
        meter = EnergyMeter([self._device])
        meter.start()
        start = time.monotonic()
        try:
            yield window
        except BaseException:
            # what was spent is worth knowing; what went wrong is worth more than a failed reading
            with suppress(MeasurementError):
                window.energy = self._read(meter, start)
            raise
        window.energy = self._read(meter, start)

    def _read(self, meter: Any, start: float) -> Energy:
        seconds = time.monotonic() - start
        meter.stop()
        return self._energy(meter.get_trace()[0].energy, seconds)

    def close(self) -> None:
        """Stop the meter's background reading."""
        if self._device is not None:
            self._device.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _energy(self, microjoules: dict[str, float], seconds: float) -> Energy:
        if self.name == "estimate":
            low, value, high = (microjoules[key] / 1e6 for key in ("low", "value", "high"))
        else:
            still = [
                domain
                for domain, value in microjoules.items()
                if value <= 0 and domain.startswith("package")
            ]
            if still:
                raise MeasurementError(
                    f"meter '{self.name}': {', '.join(still)} did not move within {seconds:.3f} s; "
                    "measure for longer, or use --meter estimate"
                )
            low = value = high = sum(microjoules.values()) / 1e6
        assert self.provenance is not None
        return Energy(
            value=value,
            low=low,
            high=high,
            provenance=self.provenance,
            scope=self.scope,
            meter=self.name,
            seconds=seconds,
            note=self.note,
        )


def open_meter(name: str = "auto", root: Path = Path("/"), tdp_watts: float | None = None) -> Meter:
    """Open a meter.

    Args:
        name: ``rapl``, ``estimate``, ``none`` (no joules at all), or ``auto``: RAPL where a real
            read shows its counters moving, else the estimate.
        root: where ``sys/class/powercap`` is looked for.
        tdp_watts: thermal design power of this machine's processors, for the estimate.

    Raises:
        MeasurementError: an unknown name, or the meter asked for cannot be read.
        NotAvailableError: ``nvml`` and ``ina3221``.
    """
    if name in LATER:
        raise NotAvailableError(f"the meter '{name}'; use --meter auto")
    if name not in NAMES:
        raise MeasurementError(f"meter '{name}': unknown; expected one of {', '.join(NAMES)}")
    if name == "none":
        return Meter("none")
    if name == "rapl":
        return _open_rapl(root)
    if name == "estimate":
        return _open_estimate(tdp_watts, "")
    try:
        meter = _open_rapl(root)
    except MeasurementError as problem:
        return _open_estimate(tdp_watts, f"no counter: {problem}")
    if meter._device.proves():
        return meter
    meter.close()
    return _open_estimate(tdp_watts, "no counter: RAPL is there, but stands still")


def _open_rapl(root: Path) -> Meter:
    from greenprune.meters.rapl import RaplDevice

    device = RaplDevice(root)
    domains = ", ".join(str(domain) for domain in device.get_configured_domains())
    return Meter("rapl", device, scope=f"the whole machine's {domains}")


def _open_estimate(tdp_watts: float | None, why: str) -> Meter:
    from greenprune.meters.estimate import EstimateDevice

    model = "unknown CPU, 4 to 12 W a busy core"
    if tdp_watts is not None:
        if tdp_watts <= 0:
            raise MeasurementError(f"tdp_watts = {tdp_watts}: expected watts above zero")
        model = f"TDP {tdp_watts:g} W x load of this process"
    return Meter(
        "estimate",
        EstimateDevice(tdp_watts),
        provenance="estimated_model",
        scope="this process's and its children's share of the CPU",
        note="; ".join(part for part in (f"ESTIMATE, {model}", why) if part),
    )


def diagnose_meters(root: Path = Path("/")) -> dict[str, dict[str, Any]]:
    """Each meter: whether a real read works, why not, and the command that grants access."""
    from greenprune.meters.rapl import access_command, find_zones

    answer: dict[str, dict[str, Any]] = {}
    for name in ("rapl", "estimate", *LATER):
        entry: dict[str, Any] = {"works": True, "reason": "", "command": None}
        try:
            with open_meter(name, root) as meter:
                if name == "rapl" and not meter._device.proves():
                    entry.update(works=False, reason="the counters stand still")
        except (MeasurementError, NotAvailableError) as problem:
            entry.update(works=False, reason=str(problem))
            if isinstance(problem.__cause__, PermissionError):
                entry["command"] = access_command([zone.counter for zone in find_zones(root)])
        answer[name] = entry
    return answer
