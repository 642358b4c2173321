"""The power sensors of Jetson boards: every board's rails, and sensors that misbehave."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from greenprune.errors import MeasurementError
from greenprune.meters import Energy, diagnose_meters, files, open_meter
from greenprune.meters.ina import find_rails
from greenprune.meters.opening import open_with

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import jetson_tree
import meter_trees as trees


def nothing() -> None:
    """All goes well."""


def drive_board(
    clock: trees.SimulatedClock, root: Path, board: str, watts: dict[str, float]
) -> None:
    """A board's rails at constant powers, 1 W where nothing is said."""
    for folder in trees.write_board(root, board):
        for channel in (1, 2, 3):
            label = (folder / f"in{channel}_label").read_text().strip()
            power = trees.constant(watts.get(label, 1.0))
            trees.drive_rail(clock, folder, channel, trees.SimulatedRail(power=power))


def measure(
    clock: trees.SimulatedClock,
    root: Path,
    act: Callable[[], object] = nothing,
    seconds: float = 3.0,
) -> Energy:
    """A window; ``act`` happens half a second into it."""
    with open_with(clock, "ina", root) as meter:
        clock.advance(0.2)
        with meter.measure() as window:
            clock.advance(0.5)
            act()
            clock.advance(seconds - 0.5)
    assert window.energy is not None
    return window.energy


BOUNDS = {
    "orin-nano": (7.0, 7.0),
    "orin-nx": (7.0, 7.0),
    "xavier-nx": (7.0, 7.0),
    "agx-orin": (20.0, 23.0),
    "agx-xavier": (18.0, 18.0),
}
WATTS = {
    "VDD_IN": 7.0,
    "VDD_GPU_SOC": 10.0,
    "VDD_CPU_CV": 6.0,
    "VIN_SYS_5V0": 4.0,
    "VDDQ_VDD2_1V8AO": 3.0,
    "GPU": 8.0,
    "CPU": 5.0,
    "SOC": 2.0,
}


@pytest.mark.parametrize("board", BOUNDS)
def test_each_board_has_its_total_or_its_bounds(tmp_path: Path, board: str) -> None:
    clock = trees.SimulatedClock()
    jetson_tree.write(tmp_path, board)
    drive_board(clock, tmp_path, board, WATTS)
    energy = measure(clock, tmp_path)
    low, high = BOUNDS[board]
    assert energy.low == pytest.approx(3 * low, rel=3e-3)
    assert energy.high == pytest.approx(3 * high, rel=3e-3)
    assert energy.low <= energy.value <= energy.high
    assert (energy.provenance, energy.meter) == ("measured_rail_integrated", "ina")


def test_thor_is_read_at_its_input(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive_board(clock, tmp_path, "thor", {})
    (power,) = tmp_path.glob("sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*/power1_input")
    clock.watchers.append(lambda now: trees.renew(power, 80_000_000 + round(now * 1e3) % 7))
    energy = measure(clock, tmp_path)
    assert energy.value == pytest.approx(240.0, rel=1e-3)
    assert "VIN" in energy.scope


def test_thor_without_a_sensor_at_its_input_has_its_rails(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive_board(clock, tmp_path, "thor", {"VDD_GPU": 30.0, "VDD_CPU_SOC_MSS": 20.0})
    (power,) = tmp_path.glob("sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*/power1_input")
    for path in sorted(power.parents[2].rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    energy = measure(clock, tmp_path)
    assert energy.value == pytest.approx(153.0, rel=1e-3)
    assert "VIN_SYS_5V0" in energy.scope


def test_the_older_tree_of_jetpack_4(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    one = trees.write_iio(tmp_path, "1-0040", ["GPU", "CPU", "SOC"])
    two = trees.write_iio(tmp_path, "1-0041", ["CV", "VDDRQ", "SYS5V"], device=1)

    def write(now: float) -> None:
        for folder in (one, two):
            for channel in (0, 1, 2):
                milliwatts = 2000 + round(now * 1000) % 3
                trees.renew(folder / f"in_power{channel}_input", milliwatts)

    clock.watchers.append(write)
    assert measure(clock, tmp_path).value == pytest.approx(36.0, rel=2e-3)


def test_unconnected_channels_and_sums_of_shunts_are_no_rails(tmp_path: Path) -> None:
    trees.write_board(tmp_path, "agx-orin")
    names = [rail.name for rail in find_rails(tmp_path)]
    assert sorted(names) == ["VDDQ_VDD2_1V8AO", "VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0"]


def test_rails_of_an_unknown_board_are_not_added(tmp_path: Path) -> None:
    trees.write_hwmon(tmp_path, "1-0040", ["VBAT", "VMOTOR", "VDD_5V"])
    with pytest.raises(MeasurementError, match="VBAT, VMOTOR, VDD_5V"):
        open_meter("ina", tmp_path)


def test_sensors_are_read_while_a_window_is_open_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, reads = trees.SimulatedClock(), []
    drive_board(clock, tmp_path, "agx-orin", WATTS)
    original = files.NumberFile.read

    def read(self: files.NumberFile) -> int:
        reads.append(self.path)
        return original(self)

    monkeypatch.setattr(files.NumberFile, "read", read)
    with open_with(clock, "ina", tmp_path) as meter:
        reads.clear()
        clock.advance(100.0)
        assert not reads
        for _ in range(2):
            with meter.measure() as window:
                assert reads  # the window begins with a sample
                clock.advance(3.0)
            assert len(reads) > 8 * 3 * 90  # four rails of two files, 100 times a second
            assert window.energy is not None
            assert window.energy.low == pytest.approx(60.0, rel=5e-3)
            reads.clear()
            clock.advance(100.0)
            assert not reads
    assert clock.background_calls == 0


def test_a_board_without_sensors_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="no INA3221"):
        open_meter("ina", tmp_path)
    assert not diagnose_meters(tmp_path)["ina"]["works"]


def test_the_period_is_the_drivers(tmp_path: Path) -> None:
    trees.write_board(tmp_path, "orin-nano")
    with open_with(trees.SimulatedClock(), "ina", tmp_path) as meter:
        assert meter.period_seconds == pytest.approx(0.007)


def test_auto_says_why_it_did_not_take_the_rails(tmp_path: Path) -> None:
    trees.write_hwmon(tmp_path, "1-0040", ["VBAT", "VMOTOR", "VDD_5V"])
    with open_with(trees.SimulatedClock(), "auto", tmp_path) as meter:
        assert meter.name == "estimate"
        assert "VBAT" in meter.note


def test_auto_takes_the_rails_of_a_board(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive_board(clock, tmp_path, "orin-nx", WATTS)
    with open_with(clock, "auto", tmp_path) as meter:
        assert (meter.name, meter.provenance) == ("ina", "measured_rail_integrated")


@pytest.mark.parametrize(("milliamperes", "told"), [(0, "0 W for 1.5 s"), (1400, "7 W for 1.5 s")])
def test_auto_goes_on_where_the_rails_are_at_zero_or_frozen(
    tmp_path: Path, milliamperes: int, told: str
) -> None:
    trees.write_board(tmp_path, "orin-nx")
    for path in tmp_path.rglob("curr1_input"):
        path.write_text(f"{milliamperes}\n")
    with open_with(trees.SimulatedClock(), "auto", tmp_path) as meter:
        assert meter.name == "estimate"
        assert "no power rails" in meter.note
        assert told in meter.note
    assert told in diagnose_meters(tmp_path)["ina"]["reason"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENODEV, "No such device"),
            r"curr1_input: expected a number.*No such device",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), r"sudo chmod a\+r .*curr1_input"),
    ],
)
@pytest.mark.parametrize("seconds", [0.3, 9.0])
def test_a_sensor_that_fails_makes_the_window_invalid_also_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, told: str, seconds: float
) -> None:
    clock = trees.SimulatedClock()
    drive_board(clock, tmp_path, "orin-nano", WATTS)
    original = files.NumberFile.read

    def fail() -> None:
        from_s = clock.time

        def read(self: files.NumberFile) -> int:
            if self.path.name == "curr1_input" and from_s <= clock.time < from_s + seconds:
                with files._explained(self.path):
                    raise error
            return original(self)

        monkeypatch.setattr(files.NumberFile, "read", read)

    with pytest.raises(MeasurementError, match=told):
        measure(clock, tmp_path, fail)


def test_a_file_that_is_emptied_makes_the_window_invalid(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    (folder,) = trees.write_board(tmp_path, "orin-nano")
    with pytest.raises(MeasurementError, match="curr1_input: expected a number"):
        measure(clock, tmp_path, lambda: (folder / "curr1_input").write_text(""))


def test_a_sensor_that_freezes_makes_the_window_invalid(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive_board(clock, tmp_path, "orin-nano", WATTS)
    with pytest.raises(MeasurementError, match="real sensors flicker"):
        measure(clock, tmp_path, clock.watchers.clear)


def test_a_sensor_at_zero_is_an_error_not_zero(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    trees.write_board(tmp_path, "orin-nano")
    for path in tmp_path.rglob("curr1_input"):
        path.write_text("0\n")
    with pytest.raises(MeasurementError, match="0 W throughout"):
        measure(clock, tmp_path, seconds=0.6)


def test_dropped_samples_widen_the_interval_and_a_long_gap_is_invalid(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    power = trees.Power(times=[clock.time, clock.time + 3.2], watts=[5.0, 15.0])
    (folder,) = trees.write_board(tmp_path, "orin-nano")
    trees.drive_rail(clock, folder, 1, trees.SimulatedRail(power=power))
    whole = measure(clock, tmp_path)
    begin = clock.time
    power.times = [begin, begin + 3.2]
    clock.late = lambda due: due + 0.5 if begin + 1.5 < due < begin + 1.511 else due
    gap = measure(clock, tmp_path)
    assert gap.high - gap.low > 5 * (whole.high - whole.low)
    assert gap.low <= power.between(begin + 0.2, begin + 3.2) <= gap.high
    clock.late = lambda due: due + 1.5
    with pytest.raises(MeasurementError, match="no sample for"):
        measure(clock, tmp_path)
