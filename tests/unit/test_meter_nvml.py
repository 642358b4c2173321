"""NVIDIA GPUs by a fake NVML on a simulated clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from greenprune.errors import MeasurementError
from greenprune.meters import opening
from greenprune.meters.counters import CounterDevice
from greenprune.meters.nvml import visible_gpus
from greenprune.meters.opening import open_with

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import meter_trees as trees

Install = Callable[..., trees.SimulatedClock]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a fake pynvml with these GPUs into place."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def put(
        clock: trees.SimulatedClock, gpus: Sequence[trees.FakeGpu], driver: bool = True
    ) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", trees.fake_pynvml(clock, gpus, driver))

    return put  # type: ignore[return-value]


def gpu(uuid: str = "GPU-aaaa", watts: float = 100.0, **other: object) -> trees.FakeGpu:
    counter = trees.SimulatedCounter(
        power=trees.constant(watts),
        tick_seconds=trees.NVML_TICK_SECONDS,
        unit_uj=1000.0,
        range_uj=2**63,
    )
    return trees.FakeGpu(uuid=uuid, counter=counter, **other)  # type: ignore[arg-type]


def test_the_energy_counter_in_joules(install: Install) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu()])
    with open_with(clock, "nvml") as meter:
        assert meter.period_seconds == pytest.approx(0.1, rel=0.05)
        with meter.measure() as window:
            clock.advance(20.0)
    energy = window.energy
    assert energy is not None
    assert energy.value == pytest.approx(2000.0, rel=5e-3)
    assert energy.low <= 2000.0 <= energy.high
    assert energy.provenance == "measured_counter"
    assert "GPU-aaaa" in energy.scope


def test_a_window_shorter_than_a_tick_is_an_error_not_zero(install: Install) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu()])
    with (
        open_with(clock, "nvml") as meter,
        pytest.raises(MeasurementError, match="did not move within"),
        meter.measure(),
    ):
        clock.advance(0.05)


def test_two_gpus_add_up(install: Install) -> None:
    clock = trees.SimulatedClock()
    one, two = gpu(), gpu("GPU-bbbb", watts=30.0)
    two.counter.phase = 0.04
    install(clock, [one, two])
    with open_with(clock, "nvml") as meter, meter.measure() as window:
        clock.advance(20.0)
    assert window.energy is not None
    assert window.energy.low <= 2600.0 <= window.energy.high
    assert window.energy.value == pytest.approx(2600.0, rel=6e-3)


def test_without_an_energy_counter_power_is_integrated(install: Install) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu(has_energy=False)])
    with open_with(clock, "nvml") as meter:
        assert meter.period_seconds == pytest.approx(0.1)
        clock.advance(1.0)
        with meter.measure() as window:
            clock.advance(10.0)
    assert window.energy is not None
    assert window.energy.value == pytest.approx(1000.0, rel=1e-3)
    assert window.energy.provenance == "measured_rail_integrated"
    assert "power was sampled" in window.energy.note


def test_a_gpu_that_tells_nothing_points_to_the_rails(install: Install) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu(has_energy=False, has_power=False)])
    with pytest.raises(MeasurementError, match=r"Not Supported.*--meter ina"):
        open_with(clock, "nvml")


def test_no_driver_is_said(install: Install) -> None:
    clock = trees.SimulatedClock()
    install(clock, [], driver=False)
    with pytest.raises(MeasurementError, match="no NVIDIA driver"):
        open_with(clock, "nvml")


@pytest.mark.parametrize("until", [6.5, 1e9])
def test_a_gpu_that_is_lost_makes_the_window_invalid(install: Install, until: float) -> None:
    clock = trees.SimulatedClock()
    found = gpu()
    install(clock, [found])
    with open_with(clock, "nvml") as meter:
        found.lost_from, found.lost_until = clock.time + 4.0, clock.time + until
        with pytest.raises(MeasurementError, match="GPU is lost"), meter.measure():
            clock.advance(10.0)


def test_a_counter_that_starts_anew_makes_the_window_invalid(install: Install) -> None:
    clock = trees.SimulatedClock()
    found = gpu()
    install(clock, [found])
    with open_with(clock, "nvml") as meter:
        found.counter.reset_at = clock.time + 5.0
        with pytest.raises(MeasurementError, match="the window is invalid"), meter.measure():
            clock.advance(10.0)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", ["GPU-aaaa"]),
        ("1,0", ["GPU-bbbb", "GPU-aaaa"]),
        ("GPU-b", ["GPU-bbbb"]),
        ("1,-1,0", ["GPU-bbbb"]),
        ("0,7", ["GPU-aaaa"]),
        ("GPU-", []),
        ("-1", []),
        ("", []),
    ],
)
def test_cuda_visible_devices(
    install: Install, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu(), gpu("GPU-bbbb")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(visible_gpus(sys.modules["pynvml"])) == expected
    if not expected:
        with pytest.raises(MeasurementError, match="CUDA_VISIBLE_DEVICES"):
            open_with(clock, "nvml")


def test_mig_slices_are_refused(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu()])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(MeasurementError, match="MIG slice"):
        open_with(clock, "nvml")


def test_numbers_among_unlike_gpus_need_an_order(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu(), gpu("GPU-bbbb", name="NVIDIA H100")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(MeasurementError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        open_with(clock, "nvml")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with open_with(clock, "nvml") as meter:
        assert "GPU-aaaa" in meter.scope


def test_processor_and_gpu_add_up(install: Install, tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu()])
    (path,) = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0"}).values()
    trees.drive_counter(clock, path, trees.SimulatedCounter(power=trees.constant(50.0)))
    with open_with(clock, "rapl+nvml", tmp_path) as meter:
        assert meter.name == "rapl+nvml"
        assert meter.period_seconds == pytest.approx(0.1, rel=0.05)
        with meter.measure() as window:
            clock.advance(20.0)
    energy = window.energy
    assert energy is not None
    assert energy.low <= 3000.0 <= energy.high
    assert energy.value == pytest.approx(3000.0, abs=5.1)  # half a tick of the GPU's
    assert "package-0" in energy.scope
    assert "GPU-aaaa" in energy.scope


@pytest.mark.parametrize("name", ["rapl+nvml", "nvml+rapl"])
@pytest.mark.parametrize("has_energy", [True, False])
@pytest.mark.parametrize("seconds", [10.0, 1.0])
def test_waiting_for_a_slow_gpu_adds_nothing_of_a_hot_processor(
    install: Install, tmp_path: Path, seconds: float, has_energy: bool, name: str
) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu(watts=5.0, has_energy=has_energy)])
    (path,) = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0"}).values()
    trees.drive_counter(clock, path, trees.SimulatedCounter(power=trees.constant(200.0)))
    truth = 205.0 * seconds
    with open_with(clock, name, tmp_path) as meter:
        for wait in (0.0, 0.013, 0.087):
            clock.advance(wait)
            with meter.measure() as window:
                clock.advance(seconds)
            energy = window.energy
            assert energy is not None
            assert energy.low <= truth <= energy.high
            # half a tick of 0.5 J of the GPU, half one of 0.2 J of the processor, and rounding
            assert energy.value == pytest.approx(truth, abs=0.36)
            assert energy.high - energy.low < 1.5
            assert energy.seconds == pytest.approx(seconds, abs=1e-6)


def test_a_gpu_that_waits_for_the_processor_gives_the_window_no_more(
    install: Install, tmp_path: Path
) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu(watts=700.0)])
    (path,) = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0"}).values()
    slow = trees.SimulatedCounter(power=trees.constant(1.0), tick_seconds=0.09)
    trees.drive_counter(clock, path, slow)
    with open_with(clock, "rapl+nvml", tmp_path) as meter:
        for seconds in (1.0, 1.03, 1.07):
            with meter.measure() as window:
                clock.advance(seconds)
            assert window.energy is not None
            assert window.energy.low <= 701.0 * seconds <= window.energy.high
            assert window.energy.high - window.energy.low < 3 * 71.0


def test_a_gpu_that_cannot_be_counted_is_told_by_auto(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu()])
    (path,) = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0"}).values()
    trees.drive_counter(clock, path, trees.SimulatedCounter(power=trees.constant(50.0)))
    monkeypatch.setattr(opening, "_HERE", tmp_path)

    def fail() -> int:
        raise trees.NVMLError("Unknown Error")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetCount", fail)
    with open_with(clock, "auto", tmp_path) as meter:
        assert meter.name == "rapl"
        assert "the GPU is not in it" in meter.note
        assert "Unknown Error" in meter.note
    assert clock.background_calls == 0


def test_auto_closes_what_is_open_when_it_fails(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, closed = trees.SimulatedClock(), []
    install(clock, [gpu()])
    (path,) = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0"}).values()
    trees.drive_counter(clock, path, trees.SimulatedCounter(power=trees.constant(50.0)))
    monkeypatch.setattr(opening, "_HERE", tmp_path)
    monkeypatch.setattr(CounterDevice, "close", lambda self: closed.append(str(self)))

    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetCount", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_with(clock, "auto", tmp_path)
    assert len(closed) == 1


@pytest.mark.parametrize("has_energy", [True, False])
def test_a_gpu_is_read_within_windows_alone(install: Install, has_energy: bool) -> None:
    clock = trees.SimulatedClock()
    found = gpu(has_energy=has_energy)
    install(clock, [found])
    with open_with(clock, "nvml") as meter:
        assert meter.period_seconds == pytest.approx(0.1, rel=0.05)
        assert clock.background_calls == 0
        found.lost_from, found.lost_until = clock.time + 10.0, clock.time + 20.0
        clock.advance(1000.0)  # nobody looks, so nobody sees that it was lost
        with meter.measure() as window:
            assert clock.background_calls == 1
            clock.advance(20.0)
        assert clock.background_calls == 0
    assert window.energy is not None
    assert window.energy.value == pytest.approx(2000.0, rel=5e-3)


def test_auto_adds_the_gpu_to_the_processor_and_can_be_told_not_to(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu()])
    (path,) = trees.write_rapl(tmp_path, {"intel-rapl:0": "package-0"}).values()
    trees.drive_counter(clock, path, trees.SimulatedCounter(power=trees.constant(50.0)))
    monkeypatch.setattr(opening, "_HERE", tmp_path)  # NVML belongs to this machine alone
    with open_with(clock, "auto", tmp_path) as meter:
        assert (meter.name, meter.provenance) == ("rapl+nvml", "measured_counter")
    path.unlink()
    with open_with(clock, "auto", tmp_path) as meter:
        assert (meter.name, meter.provenance) == ("estimate+nvml", "estimated_model")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with open_with(clock, "auto", tmp_path) as meter:
        assert meter.name == "estimate"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    with open_with(clock, "auto", tmp_path) as meter:
        assert meter.name == "estimate"
        assert "the GPU is not in it" in meter.note


def test_auto_leaves_the_gpu_out_of_another_root(install: Install, tmp_path: Path) -> None:
    clock = trees.SimulatedClock()
    install(clock, [gpu()])
    with open_with(clock, "auto", tmp_path) as meter:
        assert meter.name == "estimate"
