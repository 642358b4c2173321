"""Meters: the estimate's model, labels, and refusals that tell what to do."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune.errors import MeasurementError
from greenprune.meters import diagnose_meters, label, open_meter, weakest
from greenprune.meters.clock import Clock
from greenprune.meters.estimate import is_virtual, power


def test_auto_falls_back_to_the_estimate_and_says_why(tmp_path: Path) -> None:
    with open_meter("auto", tmp_path) as meter, meter.measure() as window:
        sum(range(1000))
    assert meter.name == "estimate"
    assert meter.period_seconds is None
    assert window.energy is not None
    assert window.energy.provenance == "estimated_model"
    assert "ESTIMATE" in window.energy.note
    assert "unknown CPU" in window.energy.note
    assert "no RAPL" in window.energy.note


@pytest.mark.parametrize("name", ["auto", "estimate", "none"])
@pytest.mark.parametrize("watts", [0.0, -5.0, math.nan, math.inf])
def test_a_tdp_that_cannot_be_is_refused_by_every_meter(name: str, watts: float) -> None:
    with pytest.raises(MeasurementError, match="expected a finite number of watts above zero"):
        open_meter(name, tdp_watts=watts)


def test_auto_is_none_where_nothing_can_be_read_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_proc(_: int | None) -> None:
        raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(psutil, "Process", no_proc)
    with open_meter("auto", tmp_path) as meter, meter.measure() as window:
        pass
    assert (meter.name, meter.provenance, window.energy) == ("none", None, None)
    assert "no RAPL" in meter.note
    assert "no estimate: the CPU time of this process cannot be read" in meter.note
    told = diagnose_meters(tmp_path)["estimate"]
    assert not told["works"]
    assert "mount /proc" in told["reason"]


def test_background_calls_happen_until_they_are_stopped() -> None:
    called = threading.Event()
    stop = Clock().every(1e-4, called.set)
    assert called.wait(30)
    stop()


def test_none_measures_nothing_and_reports_null() -> None:
    with open_meter("none") as meter, meter.measure() as window:
        pass
    assert window.energy is None


def test_unknown_meter_lists_the_known() -> None:
    with pytest.raises(MeasurementError, match="auto, ina, rapl, nvml, estimate, none"):
        open_meter("watts")


@pytest.mark.parametrize("tdp_watts", [0.0, -5.0, float("nan"), float("inf")])
def test_tdp_must_be_positive(tdp_watts: float) -> None:
    with pytest.raises(MeasurementError, match="above zero"):
        open_meter("estimate", tdp_watts=tdp_watts)


def test_a_virtual_machine_is_told_to_take_its_share_of_the_tdp(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags\t\t: fpu vme hypervisor lahf_lm\n")
    with open_meter("estimate", tmp_path, tdp_watts=65.0) as meter:
        assert "share of the host's TDP" in meter.note
    with open_meter("estimate", tmp_path / "elsewhere", tdp_watts=65.0) as meter:
        assert "share" not in meter.note


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu hypervisor lm\n", True),
        ("flags\t\t: fpu lm\n", False),
        ("model name\t: a hypervisor CPU\nflags\t\t: fpu lm\n", False),
        ("vmx flags\t: hypervisor\nflags\t\t: fpu lm\n", False),
        ("Features\t: fp asimd\n", None),
        (None, None),
    ],
)
def test_the_flags_alone_tell_a_virtual_machine(
    tmp_path: Path, cpuinfo: str | None, expected: bool | None
) -> None:
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert is_virtual(tmp_path) is expected


@pytest.mark.parametrize(
    ("load", "share"), [(0.0, 0.12), (0.1, 0.32), (0.3, 0.535), (0.5, 0.75), (1.0, 1.02)]
)
def test_curve_passes_through_the_published_points(load: float, share: float) -> None:
    assert power(load * 8, 8, 100.0).value == pytest.approx(100 * share)


@pytest.mark.parametrize("name", ["rapl+rapl", "nvml+nvml", "a:b+estimate+a:b"])
def test_a_meter_named_twice_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MeasurementError, match="counted twice"):
        open_meter(name, tmp_path)


@pytest.mark.parametrize("name", ["rapl+estimate", "estimate+rapl", "ina+estimate"])
def test_an_estimate_beside_a_counter_of_the_same_processor_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(MeasurementError, match="counted twice"):
        open_meter(name, tmp_path)


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


def test_estimate_counts_the_siblings_that_a_launcher_started() -> None:
    """This process waits; its sibling works."""
    measure = (
        "import os, sys; from greenprune.meters import open_meter\n"
        "launcher = os.getppid() if sys.argv[1] == 'all' else None\n"
        "with open_meter('estimate', launcher=launcher) as meter, meter.measure() as window:\n"
        "    print('begun', flush=True); input()\n"
        "print(window.energy.low)"
    )
    launch = (
        "import subprocess, sys\n"
        "burn = 'import time\\nwhile time.process_time() < 1: pass'\n"
        "first = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], text=True,\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "first.stdout.readline()\n"
        "subprocess.run([sys.executable, '-c', burn], check=True)\n"
        "print(first.communicate('\\n')[0])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    low = {
        who: float(
            subprocess.run(
                [sys.executable, "-c", launch, measure, who],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for who in ("all", "itself")
    }
    assert low["all"] >= 4.0 * 0.9
    assert low["itself"] < 4.0 * 0.5


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
