"""The harness: statistics, summaries and verdicts, records on disk, the worker's manners."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune.errors import MeasurementError
from greenprune.harness import PRESETS, describe_environment, diagnose, protocol
from greenprune.harness.client import Client, WorkerError
from greenprune.harness.conditions import Conditions
from greenprune.harness.environment import print_diagnosis
from greenprune.harness.presets import find_preset
from greenprune.harness.results import SCHEMA_VERSION, MeasuredWindow, MeterRecord, Results
from greenprune.harness.statistics import (
    coefficient_of_variation,
    order_interval,
    paired_ratio,
    raised_confidence,
    summarise,
    supports_claim,
    unpaired_ratio,
)
from greenprune.harness.summary import (
    energy_ratio,
    inference_energy,
    settle,
    summarise_candidate,
)
from greenprune.harness.verdict import judge_all
from greenprune.meters import Energy

QUIET = Conditions(background_cores=0.0, stolen_cores=0.0, frequency_mhz=3000.0, temperature_c=40.0)


def window(
    block: int,
    milliseconds: float,
    joules: float | None,
    provenance: Any = "measured_counter",
    **changed: Any,
) -> MeasuredWindow:
    """A window of 1000 inferences that all took so long."""
    energy = None
    if joules is not None:
        energy = Energy(
            value=joules,
            low=joules,
            high=joules,
            provenance=provenance,
            scope="a test",
            meter="rapl",
            seconds=1.0,
        )
    made = MeasuredWindow(
        block=block,
        order=0,
        seconds=1.0,
        inferences=1000,
        latency=summarise(np.full(1000, int(milliseconds * 1e6), dtype=np.int64)),
        energy=energy,
        conditions=QUIET,
    )
    return dataclasses.replace(made, **changed)


LOADED: dict[str, Any] = {
    "images": 64,
    "accuracy": 0.9,
    "accept_rate": None,
    "routed": {},
    "steady": True,
    "warmup_inferences": 100,
    "warmup_seconds": 0.5,
}
ENVIRONMENT: Any = {
    "cpu": "a test",
    "cores": 2,
    "usable_cores": 2,
    "affinity": [0, 1],
    "governor": "performance",
    "energy_preference": None,
    "boost": True,
    "clocks_locked": None,
    "power_mode": None,
    "frequency_mhz": 3000.0,
    "temperature_c": 40.0,
    "temperatures_c": {"core 0": 40.0},
    "throttle_events": None,
    "gpus": [],
    "load_average": [0.0, 0.0, 0.0],
    "virtual_machine": False,
    "container": False,
    "on_battery": None,
    "system": "Linux",
    "versions": {"python": "3.11"},
}
METER = MeterRecord(
    name="rapl",
    provenance="measured_counter",
    scope="a test",
    note="",
    period_seconds=0.001,
    tdp_watts=None,
)


def results(preset: str = "standard", factor: float = 0.5) -> Results:
    """Dense and mild over ten blocks of a machine that drifts; mild takes ``factor`` of dense."""
    drift = [1 + 0.003 * block for block in range(10)]
    dense = [window(b, 2.0 * d, 4.0 * d) for b, d in enumerate(drift)]
    mild = [window(b, 2.0 * factor * d, 4.0 * factor * d) for b, d in enumerate(drift)]
    candidates = tuple(
        summarise_candidate(
            variant=name,
            runtime="onnxruntime",
            loaded=LOADED,
            idle_watts=(1.0, 1.0),
            windows=windows,
            dense_windows=dense,
        )
        for name, windows in (("dense", dense), ("mild", mild))
    )
    return Results(
        schema=SCHEMA_VERSION,
        bundle="tiny",
        networks_sha256="0" * 64,
        target="x86",
        created="2026-01-01T00:00:00+00:00",
        preset=preset,
        seed=0,
        threads=2,
        meter="rapl",
        meter_record=METER,
        seconds=1.0,
        environment_before=ENVIRONMENT,
        environment_after=ENVIRONMENT,
        candidates=candidates,
        verdict=judge_all(candidates, preset, ENVIRONMENT, ENVIRONMENT, []),
    )


def test_order_interval_of_ten_is_second_to_ninth() -> None:
    found = order_interval([float(value) for value in range(1, 11)])
    assert (found.low, found.value, found.high) == (2.0, 5.5, 9.0)
    assert found.confidence == pytest.approx(1 - 2 * 11 / 1024)


@pytest.mark.parametrize(("count", "confidence"), [(5, 0.9375), (6, 0.96875)])
def test_order_interval_of_few_is_all_of_them(count: int, confidence: float) -> None:
    found = order_interval([float(value) for value in range(count)])
    assert (found.low, found.high) == (0.0, count - 1.0)
    assert found.confidence == confidence


def test_order_interval_covers_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(size=(4000, 10))
    hits = sum((o := order_interval(list(draw))).low <= 1.0 <= o.high for draw in draws)
    said = order_interval(list(draws[0])).confidence
    assert hits / 4000 == pytest.approx(said, abs=4 * math.sqrt(said * (1 - said) / 4000))


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_order_interval_holds_its_value_and_ignores_order(values: list[float]) -> None:
    found = order_interval(values)
    assert min(values) <= found.low <= found.value <= found.high <= max(values)
    assert found == order_interval(values[::-1])


@pytest.mark.parametrize("blocks", [6, 10, 20, 40])
def test_paired_ratio_cancels_what_blocks_share(blocks: int) -> None:
    drift = np.random.default_rng(1).uniform(1, 10, size=blocks)
    found = paired_ratio(list(3 * drift), list(drift))
    assert (found.low, found.value, found.high) == pytest.approx((3, 3, 3))
    assert found.excludes(1.0)
    assert not paired_ratio(list(drift), list(drift[::-1])).excludes(1.0)


def test_paired_ratio_of_twenty_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(4).lognormal(0.0, 0.01, size=(2000, 20))
    found = [paired_ratio(list(draw), [1.0] * 20) for draw in draws]
    said = found[0].confidence
    assert said >= 0.95
    covers = sum(not each.excludes(1.0) for each in found) / len(found)
    assert covers == pytest.approx(said, abs=4 * math.sqrt(said * (1 - said) / len(found)))


@pytest.mark.parametrize("windows", [5, 6, 10, 20])
@pytest.mark.parametrize("paired", [True, False])
def test_of_sixteen_equal_ratios_none_is_claimed_in_95_of_100(windows: int, paired: bool) -> None:
    confidence = raised_confidence(16)
    assert confidence == pytest.approx(0.996875)
    draw, wrong, families = np.random.default_rng(5), 0, 200
    for _ in range(families):
        a, b = draw.lognormal(0.0, 0.05, size=(2, 16, windows)).tolist()
        pairs = zip(a, b, strict=True)
        found = [
            paired_ratio(*pair, confidence=confidence)
            if paired
            else unpaired_ratio(*pair, confidence)
            for pair in pairs
        ]
        wrong += any(supports_claim(each, confidence, threshold=0.0) for each in found)
    assert wrong <= 0.05 * families


def test_a_claim_takes_the_raised_confidence_and_more_than_the_threshold() -> None:
    confidence = raised_confidence(16)
    five = unpaired_ratio([2.0] * 5, [1.0] * 5, confidence)  # 99.2 % at most
    assert not supports_claim(five, confidence)
    assert supports_claim(five, raised_confidence(6))
    sure = paired_ratio([1.02] * 10, [1.0] * 10, confidence=confidence)
    assert sure.excludes(1.0)
    assert not supports_claim(sure, confidence)
    assert supports_claim(sure, confidence, threshold=0.01)


def test_latency_percentiles_and_p99_only_from_662_samples() -> None:
    latencies = np.arange(1, 1001, dtype=np.int64)
    found = summarise(latencies)
    assert (found.min_ns, found.p50_ns, found.mean_ns) == (1, 500.5, 500.5)
    assert found.p99_ns == pytest.approx(np.percentile(latencies, 99))
    assert len(found.quantiles_ns) == 101
    assert summarise(latencies[:662]).p99_ns is not None
    assert summarise(latencies[:661]).p99_ns is None


def test_p99_9_only_from_6636_samples() -> None:
    latencies = np.arange(1, 6637, dtype=np.int64)
    assert summarise(latencies).p99_9_ns == pytest.approx(np.percentile(latencies, 99.9))
    assert summarise(latencies[:6635]).p99_9_ns is None


def test_unpaired_ratio_is_exact_where_it_can_be_counted() -> None:
    # of 20 orders of three and three, one has U = 0: the widest interval covers 18 of 20
    found = unpaired_ratio([2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    assert (found.low, found.value, found.high) == (2.0, 4.0, 8.0)
    assert found.confidence == pytest.approx(0.9)
    assert not found.shows_difference
    assert unpaired_ratio([2.0], [1.0]).confidence == 0.0
    # tables of the Mann-Whitney test: of ten and ten, U <= 23 has 4.3 % on both sides
    ten = unpaired_ratio([1.0 + i / 100 for i in range(10)], [1.0] * 10)
    assert ten.confidence == pytest.approx(0.9567, abs=1e-4)


@pytest.mark.parametrize("count", [6, 10])
def test_unpaired_ratio_covers_as_often_as_it_says_and_finds_5_percent(count: int) -> None:
    draw = np.random.default_rng(2)
    covers = finds = 0
    for _ in range(400):
        over, under = draw.lognormal(0.0, 0.01, size=(2, count))
        covers += not unpaired_ratio(list(over), list(under)).excludes(1.0)
        finds += unpaired_ratio(list(1.05 * over), list(under)).low > 1
    said = unpaired_ratio([1.0] * count, [1.0] * count).confidence
    assert covers / 400 == pytest.approx(said, abs=4 * math.sqrt(said * (1 - said) / 400))
    assert finds >= 396


def test_energy_joins_windows_and_model_and_subtracts_idle_only_from_counters() -> None:
    windows = [window(block, 1.0, 4.0 + 0.1 * block) for block in range(6)]
    found = inference_energy(windows, (1.0, 2.0))
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((4.0, 4.25, 4.5))
    assert found.net_value == pytest.approx(4.25 - 1.5)
    estimated = [window(block, 1.0, 4.0, "estimated_model") for block in range(6)]
    guessed = inference_energy(estimated, (1.0, 2.0))
    assert guessed is not None
    assert guessed.net_value is None
    assert inference_energy([window(0, 1.0, None)], (None, None)) is None


def test_speed_up_is_paired_and_the_verdict_notes_drift() -> None:
    found = results()
    mild = found.candidate("mild", "onnxruntime")
    assert mild.speedup.value == pytest.approx(2.0)
    assert mild.energy_ratio is not None
    assert mild.energy_ratio.value == pytest.approx(0.5)
    assert mild.latency_ms["p50"] is not None
    assert found.verdict.valid
    with pytest.raises(MeasurementError, match="dense on onnxruntime, mild on onnxruntime"):
        found.candidate("pair", "onnxruntime")


def test_coefficient_of_variation_is_the_samples() -> None:
    values = [1.0, 1.02, 0.98, 1.05, 0.97]
    assert coefficient_of_variation(values) == pytest.approx(0.0320, abs=1e-4)  # by n: 0.0286
    assert coefficient_of_variation([7.0]) == 0.0


def test_verdict_fails_on_spread_and_unsteadiness() -> None:
    wild = [window(block, 1.0 + block, None) for block in range(6)]
    candidate = summarise_candidate(
        variant="dense",
        runtime="onnxruntime",
        loaded=LOADED | {"steady": False},
        idle_watts=(None, None),
        windows=wild,
        dense_windows=wild,
    )
    assert candidate.energy_mj is None
    assert candidate.energy_ratio is None
    assert len(candidate.verdict.failures) == 2
    before, after = ENVIRONMENT | {"throttle_events": 3}, ENVIRONMENT | {"throttle_events": 4}
    verdict = judge_all([candidate], "quick", before, after, ["no counter"])
    assert not verdict.valid
    assert any("throttled" in note for note in verdict.notes)
    assert any("quick" in note for note in verdict.notes)
    assert "no counter" in verdict.notes


def test_the_last_try_of_a_block_counts_and_the_first_is_kept() -> None:
    tries = [
        window(0, 1.0, 4.0),
        window(1, 9.0, None, invalid="did not move"),
        window(1, 1.0, 4.0),
        window(2, 9.0, None, invalid="did not move"),
        window(2, 9.0, None, invalid="processor throttled"),
    ]
    kept, discarded = settle(tries)
    assert kept == [tries[0], tries[2], tries[4]]
    assert discarded == [tries[1], tries[3]]
    candidate = summarise_candidate(
        variant="dense",
        runtime="onnxruntime",
        loaded=LOADED,
        idle_watts=(1.0, 1.06),
        windows=kept,
        dense_windows=kept,
        discarded=discarded,
    )
    assert any("block 2 was invalid twice: processor" in f for f in candidate.verdict.failures)
    assert "block 1 was measured again: did not move" in candidate.verdict.notes
    assert any("idle power drifted by 6%" in note for note in candidate.verdict.notes)
    # the gap is left out of the joules, which are of the two windows that have them
    assert candidate.energy_mj is not None
    assert (candidate.energy_mj.low, candidate.energy_mj.high) == (4.0, 4.0)


def test_joules_of_a_window_that_throttled_are_a_gap() -> None:
    windows = [window(0, 1.0, 4.0), window(1, 1.0, 40.0, invalid="processor throttled")]
    found = inference_energy(windows, (1.0, 1.0))
    assert found is not None
    assert (found.low, found.value, found.high) == (4.0, 4.0, 4.0)
    ratio = energy_ratio(windows, [window(block, 1.0, 4.0) for block in range(2)])
    assert ratio is not None
    assert (ratio.low, ratio.high) == (1.0, 1.0)
    assert inference_energy(windows[1:], (1.0, 1.0)) is None


def test_verdict_writes_down_what_the_machine_did() -> None:
    busy = dataclasses.replace(QUIET, background_cores=1.5, stolen_cores=0.2, frequency_mhz=2000.0)
    windows = [window(0, 1.0, None, conditions=busy)]
    windows += [window(block, 1.0, None) for block in range(1, 6)]
    gpu = {"name": "a GPU", "limited_by": ["power cap", "hardware thermal slowdown"]}
    changed = {"governor": "powersave", "temperature_c": 55.0, "gpus": [gpu], "on_battery": True}

    def told(windows: list[MeasuredWindow], after: dict[str, Any]) -> str:
        candidate = summarise_candidate(
            variant="dense",
            runtime="onnxruntime",
            loaded=LOADED,
            idle_watts=(None, None),
            windows=windows,
            dense_windows=windows,
        )
        end: Any = ENVIRONMENT | after
        verdict = judge_all([candidate], "standard", ENVIRONMENT, end, [])
        assert verdict.valid
        return "\n".join(verdict.notes)

    notes = told(windows, changed)
    for words in (
        "kept 0.2 cores busy during the windows (up to 1.5)",
        "0.03 cores' time to other guests",
        "clock changed: 2000 to 3000 MHz",
        "governor changed during the measurement: performance to powersave",
        "on battery changed",
        "ended 15 C warmer",
        "GPU: hardware thermal slowdown",
    ):
        assert words in notes, words
    assert "power cap" not in notes
    assert told(windows[1:] + windows[1:2], {}) == ""
    assert "fewer than 6 windows" in told(windows[1:], {})


def test_table_carries_preset_provenance_and_verdict() -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(results("quick", factor=1.0).table())
    text = capture.get()
    assert "preset quick" in text
    assert "measured" in text
    assert "no clear difference" in text
    assert "verdict: valid" in text


def test_presets_follow_the_protocol() -> None:
    assert find_preset("mlperf-tiny").windows == 5
    for preset in PRESETS.values():
        assert preset.window_inferences >= 10
        assert preset.name == "quick" or preset.window_seconds >= 10
        assert preset.name in ("quick", "mlperf-tiny") or preset.windows >= 10
    with pytest.raises(MeasurementError, match="expected one of quick"):
        find_preset("fast")


def test_environment_is_read_from_a_root(tmp_path: Path) -> None:
    cpu = tmp_path / "sys/devices/system/cpu"
    (cpu / "cpu0/cpufreq").mkdir(parents=True)
    (cpu / "cpu0/cpufreq/scaling_governor").write_text("powersave\n")
    (cpu / "cpu0/thermal_throttle").mkdir()
    (cpu / "cpu0/thermal_throttle/core_throttle_count").write_text("7\n")
    (cpu / "intel_pstate").mkdir()
    (cpu / "intel_pstate/no_turbo").write_text("1\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: Fast One\nflags\t: fpu hypervisor\n")
    found = describe_environment(tmp_path)
    assert found["cpu"] == "Fast One"
    assert found["governor"] == "powersave"
    assert found["throttle_events"] == 7
    assert found["boost"] is False
    assert found["virtual_machine"] is True
    assert describe_environment(tmp_path / "nowhere")["governor"] is None


def test_doctor_answers_plain_data_and_tells_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diagnose(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["meters"]["estimate"]["works"]
    assert not found["meters"]["rapl"]["works"]
    assert "onnxruntime" in found["targets"]["x86"]["runtimes"]
    assert found["packages"]["onnxruntime"]
    print_diagnosis(found)
    told = capsys.readouterr().out
    for name in (*found["targets"], *found["meters"], *found["packages"]):
        assert name in told
    assert "no RAPL" in told


def test_worker_refuses_and_its_death_is_told() -> None:
    client = Client("dense on nothing")
    try:
        with pytest.raises(WorkerError, match="'window' before 'open'") as caught:
            client.ask("window", 60)
        assert caught.value.kind == "MeasurementError"
        client.send("open")  # no arguments: the worker breaks
        with pytest.raises(MeasurementError, match=r"dense on nothing.*KeyError"):
            client.receive(60)
    finally:
        client.close()


def test_a_worker_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As somebody who measures a bundle from within its folder does."""
    marker = tmp_path / "ran"
    trap = f"open({str(marker)!r}, 'w').close()\nraise SystemExit"
    for name in ("numpy", "json", "greenprune", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(trap)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    client = Client("dense on nothing")
    try:
        with pytest.raises(WorkerError, match="before 'open'"):
            client.ask("window", 60)
    finally:
        client.close()
    assert not marker.exists()


def test_the_lock_is_one_for_the_machine_and_that_of_another_user_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if os.name == "posix":
        code = "from greenprune.harness.protocol import LOCK; print(LOCK)"
        environment = os.environ | {"TMPDIR": "/var/tmp", "PYTHONPATH": os.pathsep.join(sys.path)}
        found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        assert Path(found.strip()) == protocol.LOCK == Path("/tmp/greenprune-bench.lock")

    class Foreign:
        def __init__(self, path: Path, **options: Any) -> None:
            assert path == protocol.LOCK

        def acquire(self, timeout: float) -> None:
            raise PermissionError

    monkeypatch.setattr(filelock, "FileLock", Foreign)
    with (
        pytest.raises(MeasurementError, match="that user or an administrator must remove"),
        protocol.one_at_a_time(),
    ):
        pass


class Patient:
    """A client that writes down how long it would be waited for."""

    name = "dense on nothing"
    single_seconds = 0.0

    def __init__(self, single_seconds: float) -> None:
        self.limits: dict[str, float] = {}
        self.answered = single_seconds

    def ask(self, command: str, limit_seconds: float, **arguments: Any) -> dict[str, Any]:
        self.limits[command] = limit_seconds
        return {"images": 500, "single_seconds": self.answered}


def test_a_slow_network_is_given_the_time_that_it_needs() -> None:
    slow: Any = Patient(single_seconds=10.0)
    preset = find_preset("report")
    protocol.load_candidate(slow, preset, {})
    assert slow.limits["load"] > 500 * 10.0
    assert protocol._limit_seconds(slow, preset) > 662 * 10.0
    quick: Any = Patient(single_seconds=0.001)
    protocol.load_candidate(quick, preset, {})
    assert quick.limits["load"] < 1000


def test_a_machine_cools_to_where_it_was_before_anything_was_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, celsius = [0.0], [50.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        celsius[0] = max(celsius[0] - 0.5 * seconds, 40.0)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(protocol, "hottest_c", lambda: celsius[0])
    preset = find_preset("standard")
    assert protocol._cool_down(40.0, preset) == 0.0
    assert (clock[0], celsius[0]) == (14.0, 43.0)
    # it never gets there: the limit, and a note
    assert protocol._cool_down(30.0, preset) == 10.0
    assert clock[0] == 14.0 + protocol.COOL_DOWN_LIMIT_SECONDS
    monkeypatch.setattr(protocol, "_window", lambda *arguments: [])
    _, notes = protocol.measure({}, preset, 0, lambda *arguments: None, 30.0)
    assert notes == [
        "9 of 10 blocks began before the machine had cooled down: up to 10 C warmer than at the "
        "start, after 120 s of rest"
    ]
    assert protocol.measure({}, preset, 0, lambda *arguments: None, 40.0)[1] == []


def test_an_interrupt_while_a_worker_is_asked_leaves_nothing_that_holds_up_the_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Timer.start

    def interrupted(timer: threading.Timer) -> None:
        start(timer)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", interrupted)
    client = Client("dense on nothing")
    try:
        client.send("nonsense")
        with pytest.raises(KeyboardInterrupt):
            client.receive(600)
    finally:
        client.close()
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(thread.daemon or thread.finished.is_set() for thread in waiting)
