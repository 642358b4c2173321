"""A whole measurement of a real bundle, each candidate in its own process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from greenprune import bundle as bundles
from greenprune.errors import BundleError, MeasurementError, TargetError
from greenprune.harness import PRESETS, Results, bench, protocol, read_results, write_results
from greenprune.harness.client import WorkerError
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
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


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
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    waiting, inside = threading.Event(), threading.Event()
    monkeypatch.setattr(protocol, "say", lambda text: waiting.set())

    def second() -> None:
        with protocol.one_at_a_time():
            inside.set()

    with filelock.FileLock(tmp_path / "greenprune-bench.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert not inside.is_set()
    thread.join(30)
    assert inside.is_set()


class Flaky:
    """A client whose first answers are refusals."""

    name = "dense on onnxruntime"

    def __init__(self, refusals: list[str]) -> None:
        self.refusals = refusals

    def ask(self, command: str, limit_seconds: float) -> dict[str, Any]:
        if self.refusals:
            raise WorkerError("did not move", self.refusals.pop())
        latencies = np.arange(1, 11, dtype=np.int64)
        latency = dataclasses.asdict(summarise(latencies))
        return {"seconds": 1.0, "inferences": 10, "latency": latency, "energy": None}


def test_invalid_window_is_run_once_more_and_says_so() -> None:
    preset = PRESETS["quick"]
    client: Any = Flaky(["MeasurementError"])
    assert protocol._window(client, preset, 0, 0).rerun == "did not move"
    for refusals in (["MeasurementError", "MeasurementError"], ["TargetError"]):
        client = Flaky(refusals)
        with pytest.raises(WorkerError, match="did not move"):
            protocol._window(client, preset, 0, 0)


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
