"""A race of real artifacts, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from greenprune.bundle import open_bundle
from greenprune.errors import MeasurementError
from greenprune.harness import protocol
from greenprune.harness.race import race


def test_every_runtime_is_measured_and_ranked(tiny_bundle: Path) -> None:
    opened = open_bundle(tiny_bundle)
    runtimes = list(opened.manifest.variants["mild"].artifacts)
    artifacts = {
        name: {v: opened.artifact(v, name) for v in ("mild", "aggressive")} for name in runtimes
    }
    found = race("x86", artifacts, tiny_bundle / "samples/replay_inputs.npy", threads=1)
    assert set(found.order) == set(runtimes)
    assert found.racers[0].over_fastest.value == 1.0
    for racer in found.racers:
        assert set(racer.latency_ms) == {"mild", "aggressive"}
        together = sum(each.value for each in racer.latency_ms.values())
        assert racer.together_ms.value == pytest.approx(together, rel=0.5)
        assert racer.together_ms.low <= racer.together_ms.value <= racer.together_ms.high
        assert found.ratio(racer.runtime, found.order[0]) == racer.over_fastest
        assert found.ratio(racer.runtime, racer.runtime).value == 1.0


METER = """
import time

from pyJoules.device import Device, Domain


class Always(Domain):
    def __repr__(self):
        return "five watts"


class Clock(Device):
    @staticmethod
    def available_domains():
        return [Always()]

    def get_energy(self):
        return [5e6 * time.monotonic()]


def make():
    clock = Clock()
    clock.configure()
    return clock
"""


def test_joules_are_measured_where_they_are_asked_for(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five watts, whatever happens: millijoules are five times the milliseconds."""
    (tmp_path / "clock_meter.py").write_text(METER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(protocol, "real_meter", lambda name: ("clock_meter:make", 0.001))
    opened = open_bundle(tiny_bundle)
    artifacts = {"onnxruntime": {"mild": opened.artifact("mild", "onnxruntime")}}
    images = tiny_bundle / "samples/replay_inputs.npy"
    (racer,) = race("x86", artifacts, images, threads=1, joules=True).racers
    energy = racer.energy_mj["mild"]
    assert energy is not None
    assert 0.5 < energy.value / (5 * racer.latency_ms["mild"].value) < 2
    monkeypatch.setattr(protocol, "real_meter", lambda name: ("none", 0.0))
    with pytest.raises(MeasurementError, match="expected a meter that measures joules"):
        race("x86", artifacts, images, threads=1, joules=True)


def test_an_artifact_that_does_not_open_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is not a network")
    with pytest.raises(MeasurementError, match=r"mild on onnxruntime.*broken\.onnx"):
        race(
            "x86",
            {"onnxruntime": {"mild": broken}},
            tiny_bundle / "samples/replay_inputs.npy",
            threads=1,
        )
