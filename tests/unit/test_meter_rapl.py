"""RAPL on trees of real machines: what counts, and what happens when counters misbehave."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune.errors import MeasurementError
from greenprune.meters import Energy, diagnose_meters, files, open_meter
from greenprune.meters import rapl as rapl_module
from greenprune.meters.clock import Clock
from greenprune.meters.counters import Counter
from greenprune.meters.ina import open_ina
from greenprune.meters.opening import open_with
from greenprune.meters.rapl import find_counters, open_rapl

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import meter_trees as trees

DESKTOP = {"intel-rapl:0": "package-0"}
WORKSTATION = {
    "intel-rapl:0": "psys",
    "intel-rapl:1": "package-1",
    "intel-rapl:1:0": "core",
    "intel-rapl:1:1": "uncore",
    "intel-rapl:1:2": "dram",
    "intel-rapl:4": "package-0",
    "intel-rapl:4/intel-rapl:4:1": "dram",
    "intel-rapl-mmio:0": "package-0",
}
DIES = {"intel-rapl:0": "package-0-die-1", "intel-rapl:1": "package-0-die-0"}


def drive(
    clock: trees.SimulatedClock, counters: dict[str, Path], **watts: float
) -> dict[str, trees.Power]:
    """Every zone at a constant power: 50 W, unless said otherwise; phases differ."""
    powers = {}
    for index, (folder, path) in enumerate(counters.items()):
        name = (path.parent / "name").read_text().strip()
        powers[folder] = trees.constant(watts.get(name.split("-")[0], 50.0))
        simulated = trees.SimulatedCounter(
            power=powers[folder], phase=index * 2e-4, start_uj=1e6 * index
        )
        trees.drive_counter(clock, path, simulated)
    return powers


def measure(
    clock: trees.SimulatedClock, root: Path, act: Callable[[], object], seconds: float = 10.0
) -> Energy:
    """A window of RAPL; ``act`` happens three seconds into it."""
    with open_with(clock, "rapl", root) as meter, meter.measure() as window:
        clock.advance(3.0)
        act()
        clock.advance(seconds - 3.0)
    assert window.energy is not None
    return window.energy


def nothing() -> None:
    """All goes well."""


def test_headline_is_packages_and_dram_under_any_numbering(tmp_path: Path) -> None:
    trees.write_rapl(tmp_path, WORKSTATION)
    found = sorted(find_counters(tmp_path).values())
    assert found == ["dram", "dram", "package-0", "package-1"]


def test_dies_add_up_to_their_package(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, DIES))
    assert measure(clock, tmp_path, nothing).value == pytest.approx(2 * 50 * 10, rel=1e-3)


def test_a_package_beside_its_dies_counts_once(tmp_path: Path) -> None:
    trees.write_rapl(tmp_path, {**DIES, "intel-rapl:2": "package-0", "intel-rapl:3": "package-1"})
    assert sorted(find_counters(tmp_path).values()) == ["package-0", "package-1"]


def test_links_to_the_same_zone_count_once(tmp_path: Path) -> None:
    counters = trees.write_rapl(
        tmp_path, {"intel-rapl:0": "package-0", "intel-rapl:0/intel-rapl:0:0": "dram"}
    )
    package = counters["intel-rapl:0"].parent
    (package / "subsystem").symlink_to(tmp_path / "sys/class/powercap")
    (tmp_path / "sys/class/powercap/intel-rapl:0:0").symlink_to(package / "intel-rapl:0:0")
    assert sorted(find_counters(tmp_path).values()) == ["dram", "package-0"]


def test_window_holds_every_socket_and_dram_and_nothing_twice(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, WORKSTATION), package=120.0, dram=8.0, psys=400.0)
    energy = measure(clock, tmp_path, nothing)
    truth = (2 * 120.0 + 2 * 8.0) * 10
    assert energy.low <= truth <= energy.high
    assert energy.value == pytest.approx(truth, rel=1e-3)
    assert (energy.provenance, energy.meter, energy.seconds) == ("measured_counter", "rapl", 10.0)
    assert "package-1" in energy.scope
    assert energy.note == ""


@pytest.mark.parametrize("range_uj", [trees.INTEL_RANGE_UJ, trees.AMD_RANGE_UJ])
def test_a_wrap_inside_the_window_is_added_once(tmp_path: Path, range_uj: int) -> None:
    clock = trees.SimulatedClock()
    (path,) = trees.write_rapl(tmp_path, DESKTOP, range_uj).values()
    power = trees.constant(200.0)
    at_wrap = power.joules(clock.time + 4.0) * 1e6
    simulated = trees.SimulatedCounter(power=power, range_uj=range_uj, start_uj=range_uj - at_wrap)
    trees.drive_counter(clock, path, simulated)
    assert measure(clock, tmp_path, nothing).value == pytest.approx(2000.0, rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(steps=st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_wraps_are_added_once_each(steps: list[int]) -> None:
    """Of a counter that moves; one that stands still for two seconds is another test's."""
    clock, raw = trees.SimulatedClock(), [trees.AMD_RANGE_UJ - 10]
    counter = Counter("package-0", lambda: raw[0], trees.AMD_RANGE_UJ)
    assert counter.read(clock) == 0
    for step in steps:
        raw[0] = (raw[0] + step) % trees.AMD_RANGE_UJ
        clock.advance(1.0)
        total = counter.read(clock)
    assert total == sum(steps)


def test_a_wrap_without_a_known_range_is_invalid(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    (path,) = trees.write_rapl(tmp_path, DESKTOP, range_uj=None).values()
    power = trees.constant(200.0)
    start_uj = trees.AMD_RANGE_UJ - power.joules(clock.time + 4.0) * 1e6
    simulated = trees.SimulatedCounter(power=power, range_uj=trees.AMD_RANGE_UJ, start_uj=start_uj)
    trees.drive_counter(clock, path, simulated)
    with pytest.raises(MeasurementError, match="max_energy_range_uj"):
        measure(clock, tmp_path, nothing)


def test_a_range_that_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, DESKTOP, range_uj=None))
    assert measure(clock, tmp_path, nothing).value == pytest.approx(500.0, rel=1e-3)


def test_a_counter_that_vanishes_makes_the_window_invalid_also_when_it_returns(
    tmp_path: Path,
) -> None:
    clock = trees.SimulatedClock()
    counters = trees.write_rapl(tmp_path, DESKTOP)
    drive(clock, counters)
    path = counters["intel-rapl:0"]
    away = path.with_suffix(".away")

    def vanish_and_return() -> None:
        clock.advance(3.0)
        path.rename(away)
        clock.advance(2.0)
        away.rename(path)
        clock.advance(5.0)

    with open_with(clock, "rapl", tmp_path) as meter:
        with pytest.raises(MeasurementError, match="energy_uj"), meter.measure():
            vanish_and_return()
        with meter.measure() as window:
            clock.advance(10.0)
    assert window.energy is not None  # the next window is sound again
    assert window.energy.value == pytest.approx(500.0, rel=1e-3)


def test_a_counter_that_freezes_makes_the_window_invalid(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    (path,) = trees.write_rapl(tmp_path, DESKTOP).values()
    begin = clock.time
    simulated = trees.SimulatedCounter(
        power=trees.constant(50.0), frozen=((begin + 3.0, begin + 6.5),), loses=True
    )
    trees.drive_counter(clock, path, simulated)
    with pytest.raises(MeasurementError, match="has not moved"):
        measure(clock, tmp_path, nothing)


def test_a_counter_that_is_reset_is_no_wrap(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    (path,) = trees.write_rapl(tmp_path, DESKTOP).values()
    simulated = trees.SimulatedCounter(
        power=trees.constant(50.0), start_uj=1e11, reset_at=clock.time + 5.0
    )
    trees.drive_counter(clock, path, simulated)
    with pytest.raises(MeasurementError, match="reset"):
        measure(clock, tmp_path, nothing)


def test_text_that_is_no_number_makes_the_window_invalid(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    counters = trees.write_rapl(tmp_path, DESKTOP)
    drive(clock, counters)

    def garble() -> None:
        clock.watchers.clear()
        counters["intel-rapl:0"].write_text("")

    with pytest.raises(MeasurementError, match="expected a number"):
        measure(clock, tmp_path, garble)


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may read counters any more; the tests may run as root, whom no mode stops."""
    original = files.read_text

    def read_text(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(files, "read_text", read_text)
    monkeypatch.setattr(rapl_module, "read_text", read_text)


def test_a_counter_that_turns_unreadable_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = trees.SimulatedClock()
    counters = trees.write_rapl(tmp_path, DESKTOP)
    drive(clock, counters)
    path = counters["intel-rapl:0"]
    with pytest.raises(MeasurementError, match=f"sudo chmod a\\+r {path}"):
        measure(clock, tmp_path, lambda: refuse(monkeypatch))


def test_unreadable_counters_name_one_command_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = list(
        trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0", "intel-rapl:0:0": "dram"}).values()
    )
    refuse(monkeypatch)
    ranges = [path.with_name("max_energy_range_uj") for path in counters]
    command = f"sudo chmod a+r {' '.join(str(path) for path in counters + ranges)}"
    with pytest.raises(MeasurementError) as caught:
        open_meter("rapl", tmp_path)
    assert command in str(caught.value)
    found = diagnose_meters(tmp_path)["rapl"]
    assert (found["works"], found["command"]) == (False, command)
    with open_meter("auto", tmp_path) as meter:
        assert meter.name == "estimate"
        assert command in meter.note


def test_a_counter_that_stands_still_is_an_error_not_zero_and_the_work_is_done(
    tmp_path: Path,
) -> None:
    clock, done = trees.SimulatedClock(), []
    trees.write_rapl(tmp_path, DESKTOP)
    with (
        open_with(clock, "rapl", tmp_path) as meter,
        pytest.raises(MeasurementError, match="stands still"),
        meter.measure(),
    ):
        done.append("the work")
    assert done


def test_a_window_without_a_tick_is_an_error_not_zero(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, DESKTOP))
    with (
        open_with(clock, "rapl", tmp_path) as meter,
        pytest.raises(MeasurementError, match="did not move within"),
        meter.measure(),
    ):
        clock.advance(3e-4)


def test_memory_without_a_working_counter_is_told_and_adds_nothing(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    counters = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0", "intel-rapl:0:0": "dram"})
    drive(clock, {"intel-rapl:0": counters["intel-rapl:0"]})
    energy = measure(clock, tmp_path, nothing)
    assert energy.value == pytest.approx(500.0, rel=1e-3)
    assert "dram (intel-rapl:0:0) did not move" in energy.note


def test_short_windows_say_how_wide_their_interval_is(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, DESKTOP))
    with open_with(clock, "rapl", tmp_path) as meter, meter.measure() as window:
        clock.advance(0.01)
    energy = window.energy
    assert energy is not None
    assert energy.low < 0.5 < energy.high
    assert 0.03 < (energy.high - energy.low) / energy.value < 0.3
    assert "a longer window" in energy.note


def test_windows_may_lie_inside_each_other(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, DESKTOP))
    with open_with(clock, "rapl", tmp_path) as meter, meter.measure() as outer:
        clock.advance(2.0)
        with meter.measure() as inner:
            clock.advance(3.0)
        clock.advance(1.0)
    assert outer.energy is not None
    assert inner.energy is not None
    assert inner.energy.value == pytest.approx(150.0, rel=2e-3)
    assert outer.energy.value == pytest.approx(300.0, rel=5e-3)


def test_counters_are_polled_while_a_window_is_open_and_a_thread_ends_with_the_last(
    tmp_path: Path,
) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, DESKTOP))
    with open_with(clock, "auto", tmp_path) as meter:  # auto proves the counter
        assert (meter.name, clock.background_calls) == ("rapl", 0)
        assert meter.period_seconds is not None
        assert clock.background_calls == 0
        with meter.measure():
            with meter.measure():
                assert clock.background_calls == 1
                clock.advance(1.0)
            assert clock.background_calls == 1
            clock.advance(1.0)
        assert clock.background_calls == 0
        with pytest.raises(RuntimeError, match="the work"), meter.measure():
            raise RuntimeError("the work")
        assert clock.background_calls == 0


def test_a_pause_between_windows_in_which_a_counter_wraps_unseen_does_no_harm(
    tmp_path: Path,
) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, DESKTOP))
    with open_with(clock, "rapl", tmp_path) as meter:
        for _ in range(2):
            clock.advance(20_000.0)  # 1 MJ: almost four times round
            with meter.measure() as window:
                clock.advance(10.0)
            assert window.energy is not None
            assert window.energy.value == pytest.approx(500.0, rel=1e-3)


def test_no_thread_is_left(tmp_path: Path) -> None:
    trees.write_rapl(tmp_path, DESKTOP)
    trees.write_board(tmp_path, "orin-nano")

    def ours() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name == "greenprune-meter"}

    before = ours()
    device = open_rapl(tmp_path, Clock())
    sensor, _ = open_ina(tmp_path, Clock())
    assert ours() == before
    with device.polled(), device.polled(), sensor.polled():
        started = ours() - before
        assert len(started) == 2
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()
    assert ours() == before


def test_the_period_is_measured(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    drive(clock, trees.write_rapl(tmp_path, WORKSTATION))
    with open_with(clock, "rapl", tmp_path) as meter:
        assert meter.period_seconds == pytest.approx(trees.RAPL_TICK_SECONDS, rel=0.1)


def test_an_error_in_the_work_comes_before_one_of_the_meter(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    counters = trees.write_rapl(tmp_path, DESKTOP)
    drive(clock, counters)

    def fail() -> None:
        counters["intel-rapl:0"].unlink()
        raise RuntimeError("the work")

    with pytest.raises(RuntimeError, match="the work"):
        measure(clock, tmp_path, fail)


def test_auto_takes_a_counter_that_moves_and_no_other(tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    counters = trees.write_rapl(tmp_path, DESKTOP)
    with open_with(clock, "auto", tmp_path) as meter:
        assert meter.name == "estimate"
        assert "stands still" in meter.note
    drive(clock, counters)
    with open_with(clock, "auto", tmp_path) as meter:
        assert meter.name == "rapl"
