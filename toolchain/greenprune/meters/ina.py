"""INA3221 and INA238, the power sensors on Jetson boards, through hwmon and the older iio files.

The rails' names tell which board it is, and ``COVERAGES`` what their sum holds: never a rail beside
the total that it is behind. Written from the public documents of the kernel and of NVIDIA; it has
not run on a board.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock
from greenprune.meters.files import NumberFile, read_number, read_text
from greenprune.meters.sampling import PowerDevice, Watts

DEFAULT_PERIOD_SECONDS = 0.0066
"""INA3221 as the mainline kernel sets it: one sample of 1.1 ms for volts and amps of 3 rails."""
FASTEST_SAMPLE_SECONDS = 0.010
_DRIVERS = "sys/bus/i2c/drivers"
_TOTAL = "VIN"


@dataclass(frozen=True, kw_only=True)
class Rail:
    """A rail's files, whose product times ``watts`` is its power."""

    name: str
    files: tuple[NumberFile, ...]
    watts: float
    period_seconds: float = DEFAULT_PERIOD_SECONDS

    def read(self) -> float:
        """Watts; never below zero, as an idle rail's current flickers around it."""
        return max(0.0, math.prod(file.read() for file in self.files) * self.watts)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Rails that add up, and what the sum holds."""

    rails: tuple[str, ...]
    doubtful: tuple[str, ...] = ()
    """Rails that may lie behind one of ``rails``: the upper end of the interval adds them."""
    scope: str


COVERAGES = (
    Coverage(rails=(_TOTAL,), scope="the board with its carrier, at its input (VIN)"),
    Coverage(rails=("VDD_IN",), scope="the module without its carrier board (VDD_IN)"),
    Coverage(
        rails=("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        doubtful=("VDDQ_VDD2_1V8AO",),
        scope="the module's rails VDD_GPU_SOC, VDD_CPU_CV and VIN_SYS_5V0; VDDQ_VDD2_1V8AO, which "
        "is probably behind the last, is in the upper bound alone",
    ),
    Coverage(
        rails=("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
        scope="the module's rails GPU, CPU, SOC, CV, VDDRQ and SYS5V",
    ),
    Coverage(
        rails=("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
        scope="the module's rails VDD_GPU, VDD_CPU_SOC_MSS and VIN_SYS_5V0; what hangs on no rail "
        "is not in it",
    ),
)
"""By the first whose rails are all there: Thor's input; Orin Nano, Orin NX and Xavier NX; AGX Orin;
AGX Xavier; Thor on a carrier without INA238."""


def find_rails(root: Path) -> list[Rail]:
    """Every rail that a sensor below ``root`` names."""
    drivers = root / _DRIVERS
    rails: list[Rail] = []
    for folder in sorted(drivers.glob("ina3221/*/hwmon/hwmon*")):
        rails += _hwmon_rails(folder)
    for folder in sorted(drivers.glob("ina3221x/*/iio:device*")):
        rails += _iio_rails(folder)
    for folder in sorted(drivers.glob("ina238/*/hwmon/hwmon*")):
        power = NumberFile(folder / "power1_input")  # microwatts
        period = _period(folder)
        rails.append(Rail(name=_TOTAL, files=(power,), watts=1e-6, period_seconds=period))
    return rails


def _hwmon_rails(folder: Path) -> Iterator[Rail]:
    """Channels 1 to 3, millivolts and milliamperes; channel 7 is a sum of shunt voltages."""
    for channel in (1, 2, 3):
        name = _label(folder / f"in{channel}_label")
        if name is not None:
            volts = NumberFile(folder / f"in{channel}_input")
            amperes = NumberFile(folder / f"curr{channel}_input")
            period = _period(folder)
            yield Rail(name=name, files=(volts, amperes), watts=1e-6, period_seconds=period)


def _iio_rails(folder: Path) -> Iterator[Rail]:
    """Channels 0 to 2, milliwatts."""
    for channel in (0, 1, 2):
        name = _label(folder / f"rail_name_{channel}")
        if name is not None:
            power = NumberFile(folder / f"in_power{channel}_input")
            yield Rail(name=name, files=(power,), watts=1e-3)


def _label(path: Path) -> str | None:
    """A rail's name; None where nothing is connected."""
    try:
        name = read_text(path).strip()
    except OSError:
        return None
    return None if name in ("", "NC") else name


def _period(folder: Path) -> float:
    """Between two updates: the driver's figure, in milliseconds, where it has one."""
    try:
        milliseconds = read_number(folder / "update_interval")
    except MeasurementError:
        return DEFAULT_PERIOD_SECONDS
    return milliseconds / 1000 if milliseconds > 0 else DEFAULT_PERIOD_SECONDS


def choose(rails: Sequence[Rail], root: Path) -> tuple[Coverage, list[Rail], list[Rail]]:
    """What to add up: the sure rails and the doubtful ones.

    Raises:
        MeasurementError: there is no sensor, a name occurs twice, or no known board has these.
    """
    if not rails:
        raise MeasurementError(
            f"{root / _DRIVERS}: no INA3221 or INA238 power sensor here; only Jetson boards have "
            "them; --meter auto takes what this machine has"
        )
    names = [rail.name for rail in rails]
    by_name = {rail.name: rail for rail in rails}
    for coverage in COVERAGES:
        wanted = (*coverage.rails, *coverage.doubtful)
        if all(names.count(name) == 1 for name in wanted):
            sure = [by_name[name] for name in coverage.rails]
            return coverage, sure, [by_name[name] for name in coverage.doubtful]
    known = "; ".join(" + ".join((*one.rails, *one.doubtful)) for one in COVERAGES)
    raise MeasurementError(
        f"{root / _DRIVERS}: expected the rails of a known board ({known}), found "
        f"{', '.join(names)}: what they add up to is not known, so they are not added; "
        "--meter estimate needs none"
    )


def open_ina(root: Path, clock: Clock) -> tuple[PowerDevice, str]:
    """The device of the board's rails, and its scope.

    Raises:
        MeasurementError: no sensor, an unknown board, or a rail that cannot be read.
    """
    coverage, sure, doubtful = choose(find_rails(root), root)

    def read_watts() -> Watts:
        low = sum(rail.read() for rail in sure)
        # the doubtful rail is likelier behind another than beside it: the value leaves it out
        return low, low, low + sum(rail.read() for rail in doubtful)

    period = max(rail.period_seconds for rail in (*sure, *doubtful))
    device = PowerDevice(
        "+".join(coverage.rails),
        read_watts,
        clock,
        sample_seconds=max(period, FASTEST_SAMPLE_SECONDS),
        period_seconds=period,
        lag_seconds=2 * period,  # a reading averages over one update and stays for another
    )
    return device, coverage.scope
