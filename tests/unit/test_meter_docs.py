"""The code of docs/measuring.md does what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenprune.errors import MeasurementError
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
