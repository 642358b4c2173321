"""What a session answers when a network fails, is missing or too slow, and how it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenprune import bundle
from greenprune.errors import BundleError, DataError, GreenpruneError, TargetError
from greenprune.runtime import AdaptiveSession, Policy
from greenprune.runtime.faults import CircuitBreaker, MildLatency, percentile

HALF = Policy(threshold=0.5, allow_uncertified=True)
CERTIFIED = Policy(max_accuracy_loss=0.05)  # the fixture's row, at threshold 0.5


def ask(session: AdaptiveSession, inputs: Any, **options: Any) -> tuple[list[float], Any]:
    """The networks' tags (1 mild, 2 aggressive) and the info; every answer is its input's own."""
    (logits,), info = session.run_with_info(None, {"input": inputs}, **options)
    np.testing.assert_array_equal(logits[:, 0], inputs[:, 0, 0, 0])
    return logits[:, 1].tolist(), info


def test_a_score_that_is_not_a_number_goes_to_mild(
    tiny_bundle: Path, fakes: Any, batch: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=CERTIFIED, drift=None)
    tags, info = ask(session, batch([0.9, np.nan, 0.1]))
    assert tags == [2, 1, 1]
    assert info.faults == (None, "the score is not a number", None)
    assert info.certified == (True, True, True)  # mild is never less than it promises
    assert session.statistics.faults == 1


def test_a_failing_aggressive_network_sends_all_to_mild(
    tiny_bundle: Path, fakes: Any, batch: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF)
    fakes["aggressive"].fail("out of luck")
    tags, info = ask(session, batch([0.9, 0.1]))
    assert tags == [1, 1]
    assert info.routes == ("mild", "mild")
    assert np.isnan(info.scores).all()
    assert info.faults == ("the aggressive network failed: out of luck",) * 2
    assert not any(info.degraded)
    assert session.statistics.faults == 2


def test_scores_of_a_wrong_shape_are_a_fault(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF)
    whole = fakes["aggressive"].run
    fakes["aggressive"].run = lambda inputs: {
        name: value[:, None] for name, value in whole(inputs).items()
    }
    tags, info = ask(session, batch([0.9]))
    assert tags == [1]
    assert "shape [1, 1], not [1]" in str(info.faults[0])


def test_a_network_that_fails_at_random_loses_and_repeats_nothing(
    tiny_bundle: Path, fakes: Any, batch: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, drift=None)
    generator = np.random.default_rng(0)
    failures: list[bool] = []

    def sometimes() -> None:
        failures.append(bool(generator.random() < 0.01))
        if failures[-1]:
            raise RuntimeError("at random")

    fakes["aggressive"].before = sometimes
    scores = generator.random(2000)
    for index, score in enumerate(scores):
        tags, info = ask(session, batch([score], first=index))
        assert tags == [2 if score >= 0.5 and not failures[-1] else 1]
        assert (info.faults[0] is not None) == failures[-1]
    found = session.statistics
    assert len(failures) == found.calls == sum(found.routes.values()) == 2000
    assert found.faults == sum(failures) > 5
    assert found.failed == found.degraded == 0


def test_a_failing_mild_network_is_passed_on(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF)
    fakes["mild"].fail("mild is broken")
    assert ask(session, batch([0.9]))[0] == [2]
    with pytest.raises(RuntimeError, match="mild is broken"):
        ask(session, batch([0.9, 0.1]))
    assert (session.statistics.calls, session.statistics.failed) == (1, 1)


def test_a_failing_mild_network_degrades_on_demand(
    tiny_bundle: Path, fakes: Any, batch: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=CERTIFIED, on_fault="degrade", drift=None)
    fakes["mild"].fail("mild is broken")
    tags, info = ask(session, batch([0.9, 0.1, np.nan]))
    assert tags == [2, 2, 2]
    assert info.routes == ("aggressive",) * 3
    assert info.degraded == (False, True, True)
    assert info.certified == (True, False, False)
    assert info.faults == (
        None,
        "the mild network failed: mild is broken",
        "the score is not a number; the mild network failed: mild is broken",
    )
    found = session.statistics
    assert (found.degraded, found.faults, found.routes["aggressive"]) == (2, 2, 3)
    fakes["aggressive"].fail("aggressive is broken")  # nothing is left to answer
    with pytest.raises(RuntimeError, match="mild is broken"):
        ask(session, batch([0.9]))


def test_a_forced_route_has_no_stand_in(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(tiny_bundle, policy=Policy(route="mild"), on_fault="degrade")
    fakes["mild"].fail("mild is broken")
    with pytest.raises(RuntimeError, match="mild is broken"):
        ask(session, batch([0.9]))


def test_a_missing_mild_file(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    artifact = bundle.open_bundle(tiny_bundle).manifest.variants["mild"].artifacts["onnxruntime"]
    (tiny_bundle / artifact).unlink()
    with pytest.raises(BundleError, match=r"mild\.onnx: the file is missing"):
        AdaptiveSession(tiny_bundle)  # resident: at once
    session = AdaptiveSession(tiny_bundle, policy=HALF, mild="lazy")
    assert ask(session, batch([0.9]))[0] == [2]
    with pytest.raises(BundleError, match="the file is missing"):
        ask(session, batch([0.9, 0.1]))
    session = AdaptiveSession(tiny_bundle, policy=HALF, mild="lazy", on_fault="degrade")
    tags, info = ask(session, batch([0.9, 0.1]))
    assert tags == [2, 2]
    assert info.degraded == (False, True)
    assert "the file is missing" in str(info.faults[1])


def test_the_breaker_rests_the_aggressive_network_and_tries_it_again(
    tiny_bundle: Path, fakes: Any, batch: Any, clock: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, breaker_faults=3, breaker_seconds=30)
    asked: list[float] = []

    def fail() -> None:
        asked.append(clock())
        raise RuntimeError("broken")

    fakes["aggressive"].before = fail
    for turn in range(6):
        tags, info = ask(session, batch([0.9]))
        assert tags == [1]
        assert ("rests" in str(info.faults[0])) == (turn >= 3)
    assert session.statistics.breaker_open
    assert len(asked) == 3
    clock.advance(30)  # one call tries, and fails
    ask(session, batch([0.9]))
    ask(session, batch([0.9]))
    assert len(asked) == 4
    clock.advance(30)
    fakes["aggressive"].before = None
    assert ask(session, batch([0.9]))[0] == [2]
    assert not session.statistics.breaker_open
    assert session.statistics.faults == 8


def test_only_one_call_at_a_time_tries_a_network_again() -> None:
    breaker = CircuitBreaker(2, 10.0)
    breaker.record(fault=True, now=0.0)
    breaker.record(fault=False, now=0.0)
    breaker.record(fault=True, now=0.0)
    assert not breaker.is_open  # two, but not in a row
    breaker.record(fault=True, now=1.0)
    assert breaker.is_open
    assert [breaker.allows(now) for now in (2.0, 11.0, 11.0, 12.0)] == [False, True, False, False]
    assert breaker.allows(21.0)  # the trial never ended: another


def test_too_little_time_for_mild_is_answered_by_aggressive(
    tiny_bundle: Path, fakes: Any, batch: Any, clock: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=CERTIFIED, deadline_ms=30, drift=None)
    fakes["aggressive"].before = lambda: clock.advance(0.005)
    fakes["mild"].before = lambda: clock.advance(0.020)
    session.warmup()
    tags, info = ask(session, batch([0.1]))  # 5 + 20 of 30 ms
    assert (tags, info.degraded, info.late) == ([1], (False,), False)
    tags, info = ask(session, batch([0.1, 0.9]), deadline_ms=20)
    assert tags == [2, 2]
    assert info.degraded == (True, False)
    assert info.certified == (False, True)
    assert "too little time" in str(info.faults[0])
    assert not info.late
    found = session.statistics
    assert (found.degraded, found.late, found.faults) == (1, 0, 0)
    with pytest.raises(BundleError, match="deadline_ms = -1"):
        session.run(None, {"input": batch([0.1])}, deadline_ms=-1)


def test_ten_slow_runs_past_the_deadline(
    tiny_bundle: Path, fakes: Any, batch: Any, clock: Any
) -> None:
    session = AdaptiveSession(
        tiny_bundle, policy=CERTIFIED, deadline_ms=30, drift=None, breaker_seconds=60
    )
    fakes["mild"].before = lambda: clock.advance(0.010)
    session.warmup()
    fakes["mild"].before = lambda: clock.advance(0.100)  # something else took the machine
    found = [ask(session, batch([0.1], first=index)) for index in range(10)]
    first, *others = [(tags, info.degraded, info.late) for tags, info in found]
    assert first == ([1], (False,), True)  # begun in good faith, answered late
    assert others == [([2], (True,), False)] * 9
    fakes["mild"].before = lambda: clock.advance(0.010)
    clock.advance(60)  # one call tries mild again; it is quick, and what came before forgotten
    for _ in range(3):
        tags, info = ask(session, batch([0.1]))
        assert (tags, info.degraded, info.late) == ([1], (False,), False)
    statistics = session.statistics
    assert (statistics.calls, statistics.degraded, statistics.late) == (13, 9, 1)
    assert statistics.routes == {"aggressive": 9, "mild": 4, "dense": 0}


def test_mild_that_nobody_has_timed_is_tried(
    tiny_bundle: Path, fakes: Any, batch: Any, clock: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, deadline_ms=10)
    assert ask(session, batch([0.1]))[0] == [1]
    fakes["aggressive"].before = lambda: clock.advance(0.011)  # all time is used up already
    tags, info = ask(session, batch([0.1]))
    assert (tags, info.degraded, info.late) == ([2], (True,), True)
    fakes["aggressive"].fail("broken")  # and where it fails, mild is all there is
    fakes["mild"].before = lambda: clock.advance(1)
    ask(session, batch([0.1]))
    tags, info = ask(session, batch([0.1]))
    assert (tags, info.degraded, info.late) == ([1], (False,), True)


def test_an_aggressive_network_that_cannot_stand_in_leaves_it_to_mild(
    tiny_bundle: Path, fakes: Any, batch: Any, clock: Any
) -> None:
    """Nothing is accepted, there is no time for mild, and aggressive is broken."""
    record = bundle.open_bundle(tiny_bundle).manifest.selector
    accepts_nothing = dataclasses.replace(record, threshold=None, table=())
    bundle.update_manifest(tiny_bundle, {"selector": accepts_nothing})
    session = AdaptiveSession(tiny_bundle, deadline_ms=10, breaker_faults=2)
    assert fakes["aggressive"].opened  # it stands in when there is no time to open it
    fakes["mild"].before = lambda: clock.advance(0.020)
    session.warmup()
    tags, info = ask(session, batch([0.1]))
    assert (tags, info.degraded, info.late) == ([2], (True,), False)
    fakes["aggressive"].fail("aggressive is broken")
    for turn in range(3):
        tags, info = ask(session, batch([0.1, 0.9]))
        assert (tags, info.degraded, info.late) == ([1, 1], (False, False), True)
        assert all(("rests" if turn == 2 else "is broken") in str(why) for why in info.faults)
    found = session.statistics
    assert (found.calls, found.failed, found.faults, found.breaker_open) == (4, 0, 6, True)
    fakes["mild"].fail("mild is broken too")
    with pytest.raises(RuntimeError, match="mild is broken too"):
        ask(session, batch([0.1]))


def test_mild_s_error_is_passed_on_where_aggressive_cannot_stand_in(
    tiny_bundle: Path, fakes: Any, batch: Any
) -> None:
    record = bundle.open_bundle(tiny_bundle).manifest.selector
    accepts_nothing = dataclasses.replace(record, threshold=None, table=())
    bundle.update_manifest(tiny_bundle, {"selector": accepts_nothing})
    session = AdaptiveSession(tiny_bundle, on_fault="degrade")
    fakes["mild"].fail("mild is broken")
    tags, info = ask(session, batch([0.1]))
    assert (tags, info.degraded) == ([2], (True,))
    fakes["aggressive"].fail("aggressive is broken")
    with pytest.raises(RuntimeError, match="mild is broken"):
        ask(session, batch([0.1]))


def test_latency_is_known_by_size_of_batch() -> None:
    latency = MildLatency(30.0)
    latency.record(1, 5.0, None, 0.0)  # the first of its size: the runtime may have compiled for it
    assert latency.p99(4) is None
    for index in range(100):
        latency.record(1, 0.001 * (index + 1), None, 0.0)
    assert latency.p99(1) == pytest.approx(0.099)
    assert latency.p99(9) == pytest.approx(0.099 * 8)  # of 8 to 15, from those of 1
    latency.record(8, 5.0, None, 0.0)
    assert latency.p99(9) == pytest.approx(0.099 * 8)
    latency.record(15, 0.2, None, 0.0)
    assert latency.p99(9) == 0.2
    assert latency.p99(4) == 0.2  # of the nearest size; a larger one is not scaled down
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_runs_that_fit_do_not_put_a_trial_off() -> None:
    """Quick runs of single samples say nothing about large batches, which a slow spell shut out."""
    latency = MildLatency(30.0)
    for _ in range(2):
        latency.record(1, 0.010, 0.1, 0.0)
        latency.record(16, 0.200, 0.1, 0.0)  # late
    for now in range(1, 30):
        assert latency.fits(1, 0.1)
        assert not latency.fits(16, 0.1)
        assert not latency.tries(0.1, float(now))
        latency.record(1, 0.010, 0.1, float(now))
    assert latency.tries(0.1, 31.0)
    assert not latency.tries(0.1, 31.0)  # one call alone
    latency.record(16, 0.050, 0.1, 31.1)  # in time again
    assert latency.fits(16, 0.1)
    assert not latency.fits(1, 0.0)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (('"schema": 2', '"schema": 99'), BundleError, "expected schema version 2, found 99"),
        (('"target": "x86"', '"target": "jetson"'), GreenpruneError, "(?i)jetson"),
        (('"target": "x86"', '"target": "x68"'), TargetError, "unknown target 'x68'"),
    ],
)
def test_bundles_for_somebody_else_are_refused(
    tiny_bundle: Path, break_it: tuple[str, str], error: type[Exception], message: str
) -> None:
    manifest = tiny_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace(*break_it))
    with pytest.raises(error, match=message):
        AdaptiveSession(tiny_bundle)


def test_bad_input_is_no_fault_of_a_network(
    tiny_bundle: Path, fakes: Any, batch: Callable[..., Any]
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, breaker_faults=1, on_fault="degrade")
    with pytest.raises(DataError, match="finite"):
        session.run(None, {"input": np.full_like(batch([0.9]), np.inf)})
    assert not session.statistics.breaker_open
    assert ask(session, batch([0.9]))[0] == [2]
