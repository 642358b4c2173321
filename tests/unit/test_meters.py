"""Meters: counters on a fake sysfs, the estimate's model, and refusals that tell what to do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune.errors import MeasurementError, NotAvailableError
from greenprune.meters import diagnose_meters, label, open_meter, weakest
from greenprune.meters.estimate import power
from greenprune.meters.rapl import Zone, find_zones

RANGE_UJ = 1_000_000


def add_zone(root: Path, folder: str, name: str, uj: int = 100) -> Path:
    """One powercap zone below ``root``; its counter's file."""
    place = root / "sys/class/powercap" / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    counter = place / "energy_uj"
    counter.write_text(f"{uj}\n")
    return counter


@contextmanager
def ticking(counter: Path) -> Iterator[None]:
    """The counter moves on, as a real one does."""
    stop = threading.Event()

    def tick() -> None:
        value = 0
        while not stop.wait(0.001):
            value += 50
            temporary = counter.with_suffix(".new")
            temporary.write_text(str(value))
            temporary.replace(counter)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_headline_is_packages_and_dram_under_any_numbering(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "psys")
    add_zone(tmp_path, "intel-rapl:1", "package-1-die-0")
    add_zone(tmp_path, "intel-rapl:1:0", "core")
    add_zone(tmp_path, "intel-rapl:3", "package-0")
    add_zone(tmp_path, "intel-rapl:3/intel-rapl:3:1", "dram")
    add_zone(tmp_path, "intel-rapl-mmio:0", "package-0")
    names = sorted(zone.name for zone in find_zones(tmp_path))
    assert names == ["dram", "package-0", "package-1-die-0"]


def test_links_to_the_same_zone_count_once(tmp_path: Path) -> None:
    counter = add_zone(tmp_path, "intel-rapl:0", "package-0")
    (counter.parent / "subsystem").symlink_to(tmp_path / "sys/class/powercap")
    add_zone(tmp_path, "intel-rapl:0/intel-rapl:0:0", "dram")
    link = tmp_path / "sys/class/powercap/intel-rapl:0:0"
    link.symlink_to(counter.parent / "intel-rapl:0:0")
    assert sorted(zone.name for zone in find_zones(tmp_path)) == ["dram", "package-0"]


@settings(deadline=None)
@given(steps=st.lists(st.integers(0, RANGE_UJ - 1), min_size=1, max_size=20))
def test_wraps_are_added_once(steps: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    counter = add_zone(tmp_path_factory.mktemp("rapl"), "intel-rapl:0", "package-0", uj=999_990)
    zone = Zone(counter.parent, "package-0")
    assert zone.read() == 0
    raw = 999_990
    for step in steps:
        raw = (raw + step) % RANGE_UJ
        counter.write_text(str(raw))
        zone.read()
    assert zone.read() == sum(steps)


def test_wrap_without_a_known_range_is_an_error(tmp_path: Path) -> None:
    counter = add_zone(tmp_path, "intel-rapl:0", "package-0", uj=500)
    (counter.parent / "max_energy_range_uj").unlink()
    zone = Zone(counter.parent, "package-0")
    zone.read()
    counter.write_text("100")
    with pytest.raises(MeasurementError, match="max_energy_range_uj"):
        zone.read()


def test_rapl_window_adds_package_and_dram_in_joules(tmp_path: Path) -> None:
    package = add_zone(tmp_path, "intel-rapl:0", "package-0", uj=999_000)
    dram = add_zone(tmp_path, "intel-rapl:0:0", "dram", uj=10)
    with open_meter("rapl", tmp_path) as meter, meter.measure() as window:
        package.write_text("500000")  # wrapped: 501,000 uJ
        dram.write_text("250010")
    energy = window.energy
    assert energy is not None
    assert energy.value == pytest.approx(0.751)
    assert (energy.low, energy.high) == (energy.value, energy.value)
    assert energy.provenance == "measured_counter"
    assert energy.meter == "rapl"
    assert "package-0" in energy.scope
    assert "dram" in energy.scope


def test_windows_may_lie_inside_each_other(tmp_path: Path) -> None:
    counter = add_zone(tmp_path, "intel-rapl:0", "package-0", uj=0)
    with open_meter("rapl", tmp_path) as meter, meter.measure() as outer:
        counter.write_text("1000")
        with meter.measure() as inner:
            counter.write_text("3000")
        counter.write_text("7000")
    assert outer.energy is not None
    assert inner.energy is not None
    assert inner.energy.value == pytest.approx(2e-3)
    assert outer.energy.value == pytest.approx(7e-3)


def test_a_counter_that_does_not_move_is_an_error_not_zero(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    with (
        open_meter("rapl", tmp_path) as meter,
        pytest.raises(MeasurementError, match="did not move"),
        meter.measure(),
    ):
        pass


def test_auto_takes_a_counter_that_moves(tmp_path: Path) -> None:
    counter = add_zone(tmp_path, "intel-rapl:0", "package-0")
    with ticking(counter), open_meter("auto", tmp_path) as meter:
        assert meter.name == "rapl"


@pytest.mark.parametrize("has_counter", [True, False])
def test_auto_falls_back_to_the_estimate_and_says_why(tmp_path: Path, has_counter: bool) -> None:
    if has_counter:
        add_zone(tmp_path, "intel-rapl:0", "package-0")
    with open_meter("auto", tmp_path) as meter, meter.measure() as window:
        sum(range(1000))
    assert meter.name == "estimate"
    assert window.energy is not None
    assert window.energy.provenance == "estimated_model"
    assert "ESTIMATE" in window.energy.note
    assert "unknown CPU" in window.energy.note
    assert ("stands still" if has_counter else "no RAPL") in window.energy.note


def test_unreadable_counter_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = add_zone(tmp_path, "intel-rapl:0", "package-0")
    original = Path.read_text

    def refuse(path: Path, *arguments: object, **named: object) -> str:
        if path.name == "energy_uj":  # the tests may run as root, whom no mode stops
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MeasurementError, match="sudo chmod a\\+r"):
        open_meter("rapl", tmp_path)
    found = diagnose_meters(tmp_path)["rapl"]
    assert not found["works"]
    assert found["command"] == f"sudo chmod a+r {counter}"
    with open_meter("auto", tmp_path) as meter:
        assert meter.name == "estimate"


def test_none_measures_nothing_and_reports_null() -> None:
    with open_meter("none") as meter, meter.measure() as window:
        pass
    assert window.energy is None


@pytest.mark.parametrize("name", ["nvml", "ina3221"])
def test_meters_of_later(name: str) -> None:
    with pytest.raises(NotAvailableError, match=name):
        open_meter(name)


def test_unknown_meter_lists_the_known() -> None:
    with pytest.raises(MeasurementError, match="auto, rapl, estimate, none"):
        open_meter("watts")


def test_tdp_must_be_positive() -> None:
    with pytest.raises(MeasurementError, match="above zero"):
        open_meter("estimate", tdp_watts=0.0)


@pytest.mark.parametrize(
    ("load", "share"), [(0.0, 0.12), (0.1, 0.32), (0.3, 0.535), (0.5, 0.75), (1.0, 1.02)]
)
def test_curve_passes_through_the_published_points(load: float, share: float) -> None:
    assert power(load * 8, 8, 100.0).value == pytest.approx(100 * share)


@settings(deadline=None)
@given(
    busy=st.floats(0, 64),
    more=st.floats(0, 64),
    tdp_watts=st.one_of(st.none(), st.floats(1, 500)),
)
def test_power_is_ordered_and_grows_with_load(
    busy: float, more: float, tdp_watts: float | None
) -> None:
    few, many = power(busy, 64, tdp_watts), power(min(busy + more, 64), 64, tdp_watts)
    assert 0 <= few.low <= few.value <= few.high
    assert few.value <= many.value * (1 + 1e-12)
    assert few.low <= many.low * (1 + 1e-12)


def test_unknown_cpu_takes_four_to_twelve_watts_a_busy_core() -> None:
    watts = power(1.5, 4, None)
    assert (watts.low, watts.value, watts.high) == (6.0, 12.0, 18.0)


def test_estimate_counts_the_cpu_time_of_this_process_and_of_children() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    with open_meter("estimate") as meter:
        with meter.measure() as window:
            subprocess.run([sys.executable, "-c", burn], check=True)
        energy = window.energy
    assert energy is not None
    assert energy.low >= 4.0 * 0.25  # 0.3 CPU seconds, read in ticks of 10 ms
    assert energy.high == pytest.approx(3 * energy.low)
    assert energy.low < energy.value < energy.high


def test_estimate_is_measured_also_when_the_work_fails() -> None:
    def fail() -> None:
        with open_meter("estimate") as meter, meter.measure() as window:
            windows.append(window)
            raise RuntimeError("the work")

    windows: list[object] = []
    with pytest.raises(RuntimeError, match="the work"):
        fail()
    assert getattr(windows[0], "energy", None) is not None


def test_root_logger_is_left_alone() -> None:
    code = (
        "import logging, sys; sys.modules['pynvml'] = None; "
        "import greenprune.meters._pyjoules; "
        "assert 'pyJoules' in sys.modules; print(len(logging.root.handlers))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "0"
    assert logging.root is logging.getLogger()


def test_a_total_takes_the_weakest_label() -> None:
    assert weakest(["measured_counter", "estimated_model"]) == "estimated_model"
    assert weakest(["measured_counter", "measured_rail_integrated"]) == "measured_rail_integrated"
    assert weakest([]) is None
    assert label("estimated_model") == "ESTIMATE"
    assert label(None) == "not measured"
