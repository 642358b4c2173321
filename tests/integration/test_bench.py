"""A whole measurement of a real bundle, each candidate in its own process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from greenprune import bundle as bundles
from greenprune import cli
from greenprune.errors import BundleError, MeasurementError, TargetError
from greenprune.harness import (
    PRESETS,
    Results,
    bench,
    protocol,
    race_bundles,
    read_results,
    write_results,
)
from greenprune.harness.conditions import Conditions
from greenprune.harness.statistics import summarise

VARIANTS = ("dense", "mild", "aggressive", "pair")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``quick``, much shorter; and a lock that no other measurement on the machine holds."""
    quick = dataclasses.replace(
        PRESETS["quick"],
        windows=3,
        window_seconds=0.02,
        warmup_seconds=0.02,
        warmup_slice_seconds=0.01,
        warmup_cap_seconds=0.1,
        idle_seconds=0.02,
    )
    monkeypatch.setitem(PRESETS, "quick", quick)
    monkeypatch.setattr(protocol, "LOCK", tmp_path / "lock")


def measure(bundle: Path, **arguments: Any) -> Results:
    return bench(bundle, runtimes=["onnxruntime"], threads=1, **arguments)


@pytest.mark.usefixtures("short")
def test_bench_measures_every_variant(tiny_bundle: Path, tmp_path: Path) -> None:
    found = measure(tiny_bundle, meter="estimate", seed=3)
    assert [candidate.variant for candidate in found.candidates] == list(VARIANTS)
    assert (found.preset, found.meter, found.threads, found.seed) == ("quick", "estimate", 1, 3)
    assert any("quick" in note for note in found.verdict.notes)
    for candidate in found.candidates:
        assert candidate.images == 64
        assert [window.block for window in candidate.windows] == [0, 1, 2]
        assert candidate.energy_mj is not None
        assert 0 < candidate.energy_mj.low <= candidate.energy_mj.value <= candidate.energy_mj.high
        assert candidate.energy_mj.provenance == "estimated_model"
        for window in candidate.windows:
            assert window.inferences >= 10
            assert window.seconds >= 0.02
            # what is timed is inside the window
            latency = window.latency
            assert latency.mean_ns * window.inferences <= 1e9 * window.seconds
            assert latency.min_ns <= latency.p50_ns <= latency.p90_ns <= latency.p95_ns
    for block in range(3):
        orders = [candidate.windows[block].order for candidate in found.candidates]
        assert sorted(orders) == [0, 1, 2, 3]
    write_results(tmp_path / "results.json", found)
    assert read_results(tmp_path / "results.json") == found


@pytest.mark.usefixtures("short")
def test_accuracy_and_routes_are_those_of_the_networks(tiny_bundle: Path) -> None:
    import onnxruntime

    found = measure(tiny_bundle, meter="none")
    opened = bundles.open_bundle(tiny_bundle)
    inputs = opened.read_array("samples/replay_inputs.npy")
    targets = opened.read_array("samples/replay_targets.npy")

    def outputs(variant: str) -> list[Any]:
        graph = str(opened.file(f"graphs/{variant}.onnx"))
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        return list(session.run(None, {"input": inputs}))

    mild, (aggressive, score) = outputs("mild")[0], outputs("aggressive")
    accepted = score >= opened.manifest.selector.threshold
    pair = np.where(accepted[:, None], aggressive, mild)
    expected = {"dense": outputs("dense")[0], "mild": mild, "aggressive": aggressive, "pair": pair}
    for candidate in found.candidates:
        right = expected[candidate.variant].argmax(axis=1) == targets
        assert candidate.accuracy == pytest.approx(right.mean())
        assert candidate.energy_mj is None
        assert candidate.energy_ratio is None
        assert candidate.windows[0].energy is None
    routed = found.candidate("pair", "onnxruntime")
    assert 0 < accepted.sum() < 64  # else this test shows nothing
    assert routed.accept_rate == pytest.approx(accepted.mean())
    assert routed.routed == {"aggressive": accepted.sum(), "mild": (~accepted).sum()}
    assert found.candidate("dense", "onnxruntime").accept_rate is None


@pytest.fixture
def small(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks on one runtime."""
    monkeypatch.setattr(protocol, "VARIANTS", ("dense", "mild"))
    monkeypatch.setattr(protocol, "choose_runtimes", lambda manifest, asked: ["onnxruntime"])


def command(*arguments: Any) -> int:
    """Exit status of ``greenprune-bench``; what it measures has one thread."""
    threads = () if "--compare" in arguments else ("--threads", "1")
    with pytest.raises(SystemExit) as caught:
        cli.bench_main([str(argument) for argument in (*arguments, *threads)])
    return int(caught.value.code or 0)


@pytest.mark.usefixtures("small")
def test_two_bundles_race_in_the_same_blocks(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "race.json"
    options = ("--preset", "quick", "--meter", "estimate", "--tdp", "15", "--json", "-o", output)
    assert command(tiny_bundle, tiny_bundle, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == found
    sides = (found["first"], found["second"])
    assert sides[0]["environment_before"] == sides[1]["environment_before"]
    assert [pair["variant"] for pair in found["pairs"]] == ["dense", "mild"]
    for pair in found["pairs"]:
        assert pair["words"].startswith("latency: ")
        assert "energy (ESTIMATE): " in pair["words"]
        assert pair["energy_ratio"]["low"] > 0
    for side in sides:
        assert side["preset"] == "quick"
        assert side["meter_record"]["tdp_watts"] == 15.0
        assert "TDP 15 W" in side["meter_record"]["note"]
    for block in range(3):
        windows = [c["windows"][block] for side in sides for c in side["candidates"]]
        assert sorted(window["order"] for window in windows) == [0, 1, 2, 3]
    assert len((tmp_path / "race.csv").read_text().splitlines()) == 1 + 2 * 2 * 3


@pytest.mark.usefixtures("small")
def test_results_of_one_command_are_compared_by_the_next(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path in paths:
        measured = command(tiny_bundle, "--preset", "quick", "--meter", "none", "-o", path)
        assert measured in (0, 1)  # a busy machine's windows vary
        assert "preset quick" in capsys.readouterr().out
        results = read_results(path)
        assert measured == (not results.verdict.valid)
        assert results.meter_record.provenance is None
        assert all(candidate.energy_mj is None for candidate in results.candidates)
        assert any("without a meter" in note for note in results.verdict.notes)
        valid = dataclasses.replace(results.verdict, valid=True, failures=())
        write_results(path, dataclasses.replace(results, verdict=valid))
    # three windows support nothing
    assert command("--compare", *paths, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [change["quantity"] for change in found["changes"]] == ["latency", "latency"]
    assert found["preset"] == ["quick", "quick"]


@pytest.mark.usefixtures("small")
def test_windows_are_as_long_as_the_counter_needs(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = protocol.settle_settings

    def slow(*arguments: Any) -> protocol.Settings:
        found = settle(*arguments)
        return dataclasses.replace(
            found, meter=dataclasses.replace(found.meter, period_seconds=0.01)
        )

    monkeypatch.setattr(protocol, "settle_settings", slow)
    found = bench(tiny_bundle, meter="none", threads=1)
    assert PRESETS["quick"].window_seconds < 10 * 0.01  # else this test shows nothing
    for candidate in found.candidates:
        assert all(window.seconds >= 10 * 0.01 for window in candidate.windows)


LAMP = """
import sys, time
from greenprune.errors import MeasurementError
from greenprune.meters._pyjoules import Device, Domain

class Bulb(Domain):
    def __repr__(self):
        return "bulb"
    def get_device_type(self):
        return "lamp"

class Lamp(Device):
    broken = False
    def __init__(self):
        super().__init__()
        self.readings = 0
        self._available_domains = [Bulb()]
        self.configure()
    @staticmethod
    def available_domains():
        return []
    def get_energy(self):
        self.readings += 1  # the first proves it
        if self.broken and self.readings > 1 and "greenprune.harness.worker" in sys.modules:
            raise MeasurementError("the lamp went out")
        return [20e6 * time.monotonic()]

def twenty_watts():
    return Lamp()

def goes_out():
    Lamp.broken = True
    return Lamp()
"""


@pytest.fixture
def lamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of two meters: a counter of 20 W, and one that fails once it is measured with."""
    (tmp_path / "a_lamp.py").write_text(LAMP)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("small", "lamp")
def test_joules_of_a_counter_come_gross_and_net(tiny_bundle: Path) -> None:
    found = bench(tiny_bundle, meter="a_lamp:twenty_watts", threads=1)
    assert found.meter_record.period_seconds is not None
    assert found.meter_record.provenance == "measured_counter"
    for candidate in found.candidates:
        idle, energy = candidate.idle_watts_before, candidate.energy_mj
        assert idle is not None
        assert candidate.idle_watts_after is not None
        idle = (idle + candidate.idle_watts_after) / 2
        assert idle > 0
        assert energy is not None
        assert energy.provenance == "measured_counter"
        gross, net = [], []
        for window in candidate.windows:
            joules = window.energy
            assert joules is not None
            gross.append(1e3 * joules.value / window.inferences)
            net.append(1e3 * (joules.value - idle * joules.seconds) / window.inferences)
        assert energy.value == pytest.approx(np.median(gross))
        assert energy.net_value == pytest.approx(np.median(net))


@pytest.mark.usefixtures("small", "lamp")
def test_a_meter_that_fails_leaves_a_marked_gap_and_the_latencies(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    found = bench(tiny_bundle, meter="a_lamp:goes_out", threads=1)
    assert not found.verdict.valid
    assert "dense on onnxruntime: block 0 was invalid twice: the lamp went out" in (
        found.verdict.failures
    )
    assert any("no net joules: the lamp went out" in note for note in found.verdict.notes)
    for candidate in found.candidates:
        assert candidate.energy_mj is None
        assert candidate.energy_ratio is None
        assert candidate.latency_ms["p50"] is not None
        assert [window.block for window in candidate.discarded] == [0, 1, 2]
        for window in (*candidate.windows, *candidate.discarded):
            assert window.invalid == "the lamp went out"
            assert window.energy is None
            assert window.latency.samples >= 10
    write_results(tmp_path / "results.json", found)
    assert read_results(tmp_path / "results.json") == found


def test_bundles_that_share_no_runtime_cannot_race(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = iter((["onnxruntime"], ["openvino"]))
    monkeypatch.setattr(protocol, "choose_runtimes", lambda manifest, asked: next(built))
    with pytest.raises(TargetError, match="A has onnxruntime and B has openvino"):
        race_bundles(tiny_bundle, tiny_bundle)


@pytest.mark.parametrize("watts", ["0", "-15", "nan", "inf"])
def test_absurd_tdp_is_refused(
    tiny_bundle: Path, watts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tiny_bundle, "--tdp", watts) == 2
    assert "expected watts above zero" in capsys.readouterr().err


def test_tdp_that_no_estimate_uses_is_told(tiny_bundle: Path) -> None:
    manifest = bundles.open_bundle(tiny_bundle).manifest
    settings = protocol.settle_settings(PRESETS["quick"], "none", 1, 0, 15.0)
    notes = list(protocol._notes(manifest, settings.meter))
    assert "the TDP is not used: the meter is none, which estimates nothing" in notes


@pytest.mark.usefixtures("short")
def test_damaged_bundle_is_refused_before_anything_runs(tiny_bundle: Path) -> None:
    graph = next((tiny_bundle / "artifacts/onnxruntime").iterdir())
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=graph.name):
        measure(tiny_bundle)


def test_runtime_that_the_bundle_lacks(tiny_bundle: Path) -> None:
    with pytest.raises(TargetError, match="tensorrt"):
        bench(tiny_bundle, runtimes=["tensorrt"])


def test_unreadable_meter_stops_the_measurement(tiny_bundle: Path) -> None:
    with pytest.raises(MeasurementError, match="watts"):
        bench(tiny_bundle, meter="watts")


def test_two_measurements_never_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "LOCK", tmp_path / "lock")
    waiting, inside = threading.Event(), threading.Event()
    monkeypatch.setattr(protocol, "say", lambda text: waiting.set())

    def second() -> None:
        with protocol.one_at_a_time():
            inside.set()

    with filelock.FileLock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert not inside.is_set()
    thread.join(30)
    assert inside.is_set()


@pytest.mark.usefixtures("small")
def test_a_bundle_brings_no_code_to_who_measures_it_from_within(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    (tiny_bundle / "numpy.py").write_text(f"open({str(marker)!r}, 'w').close()")
    monkeypatch.chdir(tiny_bundle)
    found = bench(Path(), meter="none", threads=1)
    assert [candidate.variant for candidate in found.candidates] == ["dense", "mild"]
    assert not marker.exists()


class Flaky:
    """A client whose first windows are invalid for a cause."""

    name = "dense on onnxruntime"
    single_seconds = 0.0

    def __init__(self, causes: list[str]) -> None:
        self.causes = causes

    def ask(self, command: str, limit_seconds: float) -> dict[str, Any]:
        latencies = np.arange(1, 11, dtype=np.int64)
        quiet = Conditions(
            background_cores=None, stolen_cores=None, frequency_mhz=None, temperature_c=None
        )
        return {
            "seconds": 1.0,
            "inferences": 10,
            "latency": dataclasses.asdict(summarise(latencies)),
            "energy": None,
            "conditions": dataclasses.asdict(quiet),
            "invalid": self.causes.pop() if self.causes else "",
        }


def test_invalid_window_is_run_once_more_and_both_are_kept() -> None:
    preset = PRESETS["quick"]
    for causes, kept in (
        ([], [""]),
        (["did not move"], ["did not move", ""]),
        (["second", "first"], ["first", "second"]),
        (["third", "second", "first"], ["first", "second"]),
    ):
        client: Any = Flaky(causes)
        tries = protocol._window(client, preset, 4, 1, None)
        assert [window.invalid for window in tries] == kept
        assert {(window.block, window.order) for window in tries} == {(4, 1)}


def test_measuring_loads_no_torch() -> None:
    code = (
        "import sys, greenprune.harness.worker, greenprune.nncec.account, greenprune.runtime; "
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_network_that_answers_otherwise_here_is_not_measured(tiny_bundle: Path) -> None:
    """As an engine that was built wrongly on the device would."""
    other = np.load(tiny_bundle / "samples/dense_logits.npy")[:, ::-1].copy()
    path = tiny_bundle / "samples/mild_logits.npy"
    np.save(path, other)
    content = path.read_bytes()
    manifest = tiny_bundle / "manifest.json"
    plain = json.loads(manifest.read_text())
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    plain["files"]["samples/mild_logits.npy"] = entry
    manifest.write_text(json.dumps(plain))
    with pytest.raises(MeasurementError, match=r"mild on onnxruntime: its answers to 8 samples"):
        bench(tiny_bundle, runtimes=["onnxruntime"], threads=1, meter="none")
