"""The code of docs/measuring.md does what the page says."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from greenprune.errors import MeasurementError
from greenprune.meters._pyjoules import Device
from greenprune.meters.device import NamedDomain
from greenprune.meters.opening import NAMES, open_with

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import meter_trees as trees

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/measuring.md").read_text(encoding="utf-8")
EXTERNAL, WALL = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_meter_is_on_the_page() -> None:
    assert [name for name in NAMES if f"| `{name}` |" not in PAGE] == []


def test_an_external_meter_in_twenty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len([line for line in EXTERNAL.splitlines() if line.strip()]) <= 20
    joules = tmp_path / "joules"
    joules.write_text("1\n")
    code = EXTERNAL.replace("/run/analyser/joules", str(joules))
    assert code != EXTERNAL
    (tmp_path / "analyser_of_the_docs.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    clock = trees.SimulatedClock()

    def write(now: float) -> None:
        trees.renew(joules, round(30.0 * trees.last_tick(now, 0.1, 0.0)))

    clock.watchers.append(write)
    with open_with(clock, "analyser_of_the_docs:open_analyser") as meter:
        assert meter.period_seconds == pytest.approx(0.1, rel=0.05)
        with meter.measure() as window:
            clock.advance(20.0)
        with pytest.raises(MeasurementError, match="FileNotFoundError"), meter.measure():
            joules.unlink()
    assert window.energy is not None
    assert window.energy.value == pytest.approx(600.0, rel=5e-3)
    assert window.energy.scope == "the whole device at the wall"


@pytest.mark.parametrize("place", ["no_such_module:open", "json:no_such_function", "os:getcwd"])
def test_a_place_that_holds_no_device_is_refused(place: str) -> None:
    with pytest.raises(MeasurementError, match=r"docs/measuring\.md"):
        open_with(trees.SimulatedClock(), place)


def external(monkeypatch: pytest.MonkeyPatch, clock: trees.SimulatedClock, **other: Any) -> str:
    """The name of a user's device with two domains of 10 W that tick each 0.1 s; ``other``
    replaces parts of it."""

    class Rails(Device):  # type: ignore[misc]
        @staticmethod
        def available_domains() -> list[Any]:
            return [NamedDomain("one"), NamedDomain("two")]

        def get_energy(self) -> list[float]:
            return [1e7 * trees.last_tick(clock.time, 0.1, 0.0)] * 2

    def open_rails() -> Any:
        device = type("Other", (Rails,), other)()
        device.configure()
        return device

    module: Any = ModuleType("rails_of_a_user")
    module.open_rails = open_rails
    monkeypatch.setitem(sys.modules, "rails_of_a_user", module)
    return "rails_of_a_user:open_rails"


def test_domains_of_a_users_device_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = trees.SimulatedClock()
    with open_with(clock, external(monkeypatch, clock)) as meter, meter.measure() as window:
        clock.advance(20.0)
    assert window.energy is not None
    assert window.energy.value == pytest.approx(400.0, rel=5e-3)


def test_domains_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = trees.SimulatedClock()
    domains = staticmethod(lambda: [NamedDomain("one"), NamedDomain("one")])
    place = external(monkeypatch, clock, available_domains=domains)
    with pytest.raises(MeasurementError, match=r"names of their own.*one, one"):
        open_with(clock, place)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("from_s", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("seconds", [0.001, 0.3, 1e9])
def test_a_reading_that_is_no_number_of_joules_is_an_error(
    monkeypatch: pytest.MonkeyPatch, bad: float, from_s: float, seconds: float
) -> None:
    clock = trees.SimulatedClock()
    begin = clock.time + 1.0

    def get_energy(self: Any) -> list[float]:
        fails = begin + from_s <= clock.time < begin + from_s + seconds
        energy_uj = 1e7 * trees.last_tick(clock.time, 0.1, 0.0)
        return [energy_uj, bad if fails else energy_uj]

    energies = []
    with open_with(clock, external(monkeypatch, clock, get_energy=get_energy)) as meter:
        clock.advance(1.0)
        with suppress(MeasurementError), meter.measure() as window:
            clock.advance(max(0.0, begin + 5.0 - clock.time))
        energies.append(window.energy)
    for energy in energies:  # none, or one that the bad reading did not touch
        if energy is not None:
            assert math.isfinite(energy.low + energy.value + energy.high)
            assert energy.low <= 20.0 * energy.seconds <= energy.high
            assert energy.value == pytest.approx(20.0 * energy.seconds, rel=0.05)
    if seconds > 1:
        assert energies == [None]


def test_no_number_at_the_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = trees.SimulatedClock()
    bad: list[float] = []

    def get_energy(self: Any) -> list[float]:
        energy_uj = 1e7 * trees.last_tick(clock.time, 0.1, 0.0)
        return [energy_uj, *(bad or [energy_uj])]

    def work() -> None:
        clock.advance(5.0)
        bad.append(math.nan)

    with (
        open_with(clock, external(monkeypatch, clock, get_energy=get_energy)) as meter,
        pytest.raises(MeasurementError, match="two: nan"),
        meter.measure(),
    ):
        work()


def test_a_users_device_that_fails_is_told_by_the_period_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = trees.SimulatedClock()
    begin = clock.time

    def get_energy(self: Any) -> list[float]:
        if clock.time > begin:
            raise ValueError("no answer")
        return [0.0, 0.0]

    place = external(monkeypatch, clock, get_energy=get_energy)
    with (
        open_with(clock, place) as meter,
        pytest.raises(MeasurementError, match="ValueError: no answer"),
    ):
        _ = meter.period_seconds
    with pytest.raises(MeasurementError, match="ValueError: no answer"):
        open_with(clock, place)


def measure_analyser(
    monkeypatch: pytest.MonkeyPatch, counted_uj: Callable[[float], float]
) -> float | None:
    """Joules of a minute, by a counter that says ``counted_uj`` of the seconds of the window; its
    ticks are 0.1 s."""
    clock = trees.SimulatedClock()
    begin = clock.time + 1.0

    def get_energy(self: Any) -> list[float]:
        return [counted_uj(trees.last_tick(clock.time - begin, 0.1, 0.0)), clock.time * 1e6]

    with open_with(clock, external(monkeypatch, clock, get_energy=get_energy)) as meter:
        clock.advance(begin - clock.time)
        with meter.measure() as window:
            clock.advance(60.0)
    assert clock.background_calls == 0
    return None if window.energy is None else window.energy.value


def test_a_users_counter_that_is_reset_within_a_window_makes_it_invalid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first and last readings alone would give 1400 J in place of 1800."""

    def restarted(seconds: float) -> float:
        return 1e6 * (100.0 + 30.0 * seconds if seconds < 10.0 else 30.0 * (seconds - 10.0))

    with pytest.raises(MeasurementError, match=r"one: went back from .* was reset"):
        measure_analyser(monkeypatch, restarted)


@pytest.mark.parametrize("until", [20.0, 1e9])
def test_a_users_counter_that_freezes_within_a_window_makes_it_invalid(
    monkeypatch: pytest.MonkeyPatch, until: float
) -> None:
    def frozen(seconds: float) -> float:
        lost = min(max(0.0, seconds - 10.0), until - 10.0)
        return 30e6 * (seconds - lost)

    with pytest.raises(MeasurementError, match="one: the counter stands still"):
        measure_analyser(monkeypatch, frozen)


def test_a_users_counter_may_tick_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(seconds: float) -> float:
        return 30e6 * trees.last_tick(seconds, 4.9, 0.0)

    assert measure_analyser(monkeypatch, slow) == pytest.approx(31.0 * 60, rel=0.1)


def test_a_users_counter_may_start_anew_between_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = trees.SimulatedClock()
    since = [0.0]

    def get_energy(self: Any) -> list[float]:
        return [1e7 * (trees.last_tick(clock.time, 0.1, 0.0) - since[0])] * 2

    with open_with(clock, external(monkeypatch, clock, get_energy=get_energy)) as meter:
        for _ in range(2):
            clock.advance(1e4)
            with meter.measure() as window:
                clock.advance(20.0)
            assert window.energy is not None
            assert window.energy.value == pytest.approx(400.0, rel=5e-3)
            since[0] = clock.time


def test_a_slow_device_beside_a_fast_counter_adds_nothing_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = trees.SimulatedClock()
    (path,) = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0"}).values()
    trees.drive_counter(clock, path, trees.SimulatedCounter(power=trees.constant(200.0)))

    def get_energy(self: Any) -> list[float]:
        return [1e6 * trees.last_tick(clock.time, 1.0, 0.0)] * 2

    place = external(monkeypatch, clock, get_energy=get_energy)
    for name in (f"rapl+{place}", f"{place}+rapl"):
        with open_with(clock, name, tmp_path) as meter, meter.measure() as window:
            clock.advance(10.5)
        assert window.energy is not None
        assert window.energy.value == pytest.approx(202.0 * 10.5, abs=1.3)


@pytest.fixture
def wall_joules() -> Any:
    space: dict[str, Any] = {}
    exec(WALL, space)  # the page's own code
    return space["wall_joules"]


def write_log(path: Path, times: list[float], watts: list[float]) -> None:
    rows = [f"{time},{power}" for time, power in zip(times, watts, strict=True)]
    path.write_text("\n".join(["time,watts", *rows]) + "\n")


def test_a_wall_meters_csv(tmp_path: Path, wall_joules: Any) -> None:
    path = tmp_path / "log.csv"
    times = [1.7e9 + second for second in range(100)]
    write_log(path, times, [10.0 + 0.1 * second for second in range(100)])
    start, end = 20.25, 80.5
    truth = 10 * (end - start) + 0.05 * (end**2 - start**2)
    assert wall_joules(path, 1.7e9 + start, 1.7e9 + end) == pytest.approx(truth, rel=1e-6)
    with pytest.raises(ValueError, match="does not hold"):
        wall_joules(path, 1.7e9 + 50, 1.7e9 + 200)
    write_log(path, times[:40] + times[60:], [10.0] * 80)
    with pytest.raises(ValueError, match="missing"):
        wall_joules(path, 1.7e9 + 1, 1.7e9 + 90)
    write_log(path, times, [10.0] * 50 + [np.nan] * 50)
    with pytest.raises(ValueError, match="missing"):
        wall_joules(path, 1.7e9 + 1, 1.7e9 + 90)
