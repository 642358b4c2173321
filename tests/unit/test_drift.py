"""The drift guard: bounds, rate of false alarms, the alarm, and that audits change nothing."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenprune import bundle
from greenprune.errors import BundleError
from greenprune.runtime import AdaptiveSession, DriftGuard, Policy
from greenprune.runtime import drift as drifts
from greenprune.runtime.drift import ODDS, Bound, DriftMonitor, Reference
from greenprune.runtime.outcome import Outcome
from greenprune.runtime.policy import Point

CERTIFIED = Policy(max_accuracy_loss=0.05)
QUICK = DriftGuard(audit_share=1.0, false_alarm_rate=1e-4)
DEAF = DriftGuard(audit_share=1.0, false_alarm_rate=1e-300)
AGREE, DISAGREE = 0.0, 1.5
"""First pixels for which the networks answer the same class, and for which they do not."""


def reference(coverage: float = 0.5, n: int = 5000, disagreement: float | None = 0.02) -> Reference:
    return Reference(
        coverage=coverage,
        accepts=Bound.above(coverage, n),
        rejects=Bound.above(1 - coverage, n),
        disagreement=disagreement,
        disagrees=None if disagreement is None else Bound.above(disagreement, round(coverage * n)),
    )


def outcome(
    seen: Reference, accepted: int, rejected: int, audited: int = 0, disagreed: int = 0
) -> Any:
    return Outcome(
        {},
        point=Point(threshold=0.5, certified=True, reference=seen),
        scores=np.zeros(accepted + rejected, dtype=np.float32),
        sure=accepted,
        audited=audited,
        disagreed=disagreed,
    )


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_bound_is_above_the_share_and_covers_the_exact_one(hits: int, more: int) -> None:
    n = hits + more
    bound = drifts.upper_bound(hits / n, n, 0.01)
    assert hits / n < bound <= 1
    # at the bound, so few hits have a probability of at most 1%: the exact binomial agrees
    if bound < 1:
        log_terms = [
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(bound)
            + (n - k) * math.log1p(-bound)
            for k in range(hits + 1)
        ]
        assert sum(map(math.exp, log_terms)) <= 0.01


def test_the_three_bounds_of_one_threshold_in_a_hundred_hold_together_at_a_thousandth() -> None:
    for samples in (10, 1000, 100_000):
        bound = Bound.above(0.0, samples)
        if bound is not None:
            assert 100 * 3 * (1 - bound.rate) ** samples <= 0.001  # the chance of no hit at all


def test_edges_of_the_bound() -> None:
    assert drifts.upper_bound(1.0, 100, 0.01) == 1.0
    assert drifts.upper_bound(0.0, 0, 0.01) == 1.0
    assert Bound.above(1.0, 100) is None
    assert Bound.above(0.0, 0) is None


@given(st.floats(0.01, 0.95), st.integers(10, 10_000))
def test_the_factors_are_fair_at_the_bound(share: float, n: int) -> None:
    bound = Bound.above(share, n)
    if bound is not None:
        assert len(bound.steps) == len(ODDS)
        for hit, miss in bound.steps:
            mean = bound.rate * math.exp(hit) + (1 - bound.rate) * math.exp(miss)
            assert mean == pytest.approx(1.0, abs=1e-9)
            assert hit > 0 > miss


def test_false_alarms_stay_within_the_stated_rate() -> None:
    """At the worst true rates, those of the bounds, over 200 streams of 500 inputs."""
    guard = DriftGuard(false_alarm_rate=1e-4)
    seen = reference(n=2000)
    assert seen.accepts is not None
    assert seen.disagrees is not None
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        monitor = DriftMonitor(guard)
        hits = generator.random(500) < seen.accepts.rate
        wrong = generator.random(500) < seen.disagrees.rate
        for hit, bad in zip(hits.tolist(), wrong.tolist(), strict=True):
            if monitor.observe(outcome(seen, hit, 1 - hit, audited=hit, disagreed=hit and bad)):
                alarms += 1
                break
    # at most 500 x 1e-4 = 5% of the streams, and three standard deviations of such a count
    assert alarms / 200 <= 0.05 + 0.05


@pytest.mark.parametrize(
    ("accept", "disagree", "words"),
    [
        (0.8, 0.02, "accepts more"),
        (0.2, 0.02, "accepts fewer"),
        (0.5, 0.2, "contradicted by mild on more"),
    ],
)
def test_drift_is_found_soon_even_after_a_long_quiet_time(
    accept: float, disagree: float, words: str
) -> None:
    monitor, seen = DriftMonitor(DriftGuard()), reference()
    generator = np.random.default_rng(3)
    for _ in range(2000):  # 200,000 inputs as they were
        accepted = int(generator.binomial(100, 0.5))
        wrong = int(generator.binomial(5, 0.02))
        assert not monitor.observe(outcome(seen, accepted, 100 - accepted, 5, wrong))
    for _ in range(300):
        accepted = int(generator.binomial(10, accept))
        wrong = int(generator.binomial(1, disagree))
        if monitor.observe(outcome(seen, accepted, 10 - accepted, 1, wrong)):
            break
    else:
        pytest.fail("nothing noticed in 3000 inputs")
    assert words in str(monitor.alarm)
    assert "call reset_drift()" in str(monitor.alarm)
    assert not monitor.observe(outcome(seen, 1, 0))  # raised once
    assert monitor.draw(1000) == []
    monitor.reset()
    assert monitor.alarm is None


def test_a_large_batch_is_no_overflow() -> None:
    monitor, seen = DriftMonitor(DriftGuard()), reference()
    assert monitor.observe(outcome(seen, 10**6, 0))
    assert "accepts more" in str(monitor.alarm)


@pytest.mark.parametrize(
    "options",
    [
        {"audit_share": 1.5},
        {"audit_share": -0.1},
        {"audit_share": "x"},
        {"audit_share": True},
        {"audit_share": float("nan")},
        {"false_alarm_rate": 0.0},
        {"false_alarm_rate": None},
    ],
)
def test_the_guard_is_checked(options: Any) -> None:
    with pytest.raises(BundleError, match=r"drift: .* expected a"):
        DriftGuard(**options)


@pytest.fixture
def judged(tiny_bundle: Path, fakes: Any) -> Path:
    """Its certificate saw 2000 images, half of them accepted, 2% of these contradicted by mild."""
    record = bundle.open_bundle(tiny_bundle).manifest.selector
    row = dataclasses.replace(record.table[0], n=2000, coverage=0.5, disagreement=0.02)
    energies = {
        name: {"value": value, "provenance": "measured_counter"}
        for name, value in {"mild": 10.0, "aggressive": 2.0}.items()
    }
    changed = {"selector": dataclasses.replace(record, table=(row,)), "energy_mj": energies}
    bundle.update_manifest(tiny_bundle, changed)
    return tiny_bundle


def drive(session: AdaptiveSession, batch: Any, calls: int) -> Any:
    """All accepted, where the certificate saw half: the last call's info."""
    for _ in range(calls):
        _, info = session.run_with_info(None, {"input": batch([0.9])})
    return info


def test_an_alarm_reverts_to_mild_and_is_told_once(judged: Path, fakes: Any, batch: Any) -> None:
    told: list[str] = []
    session = AdaptiveSession(judged, policy=CERTIFIED, drift=QUICK, on_drift=told.append)
    info = drive(session, batch, 1)
    assert (info.routes, info.certified, info.drift) == (("aggressive",), (True,), None)
    info = drive(session, batch, 60)
    assert (info.routes, info.certified) == (("mild",), (False,))
    assert info.drift == session.statistics.drift == told[0]
    assert "accepts more" in told[0]
    assert len(told) == 1
    assert session.threshold is None
    session.policy = CERTIFIED  # the alarm outlives a policy
    assert drive(session, batch, 1).routes == ("mild",)
    session.policy = Policy(route="aggressive")  # but not a forced route
    assert drive(session, batch, 1).routes == ("aggressive",)
    session.policy = CERTIFIED
    session.reset_drift()
    assert session.statistics.drift is None
    assert drive(session, batch, 1).routes == ("aggressive",)
    drive(session, batch, 60)
    assert len(told) == 2


def test_an_alarm_warns_where_nobody_listens(judged: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(judged, policy=CERTIFIED, drift=QUICK)
    with pytest.warns(RuntimeWarning, match="accepts more") as caught:
        drive(session, batch, 100)
    assert len(caught) == 1
    quiet = AdaptiveSession(judged, policy=CERTIFIED, drift=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drive(quiet, batch, 100).routes == ("aggressive",)


def test_a_listener_that_fails_costs_no_answer(
    judged: Path, fakes: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(reason: str) -> None:
        raise RuntimeError("deaf")

    session = AdaptiveSession(judged, policy=CERTIFIED, drift=QUICK, on_drift=fail)
    assert drive(session, batch, 100).routes == ("mild",)
    assert session.statistics.calls == 100
    assert "deaf" in caplog.text


def test_an_alarm_costs_no_answer_where_warnings_are_errors(
    judged: Path, fakes: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session = AdaptiveSession(judged, policy=CERTIFIED, drift=QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drive(session, batch, 100).routes == ("mild",)
    assert (session.statistics.calls, session.statistics.failed) == (100, 0)
    assert "accepts more" in caplog.text


def test_audits_are_counted_and_paid_for(judged: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(judged, policy=CERTIFIED, drift=DEAF)
    inputs = batch([0.9, 0.9, 0.9, 0.1], first=[AGREE, DISAGREE, DISAGREE, DISAGREE])
    _, info = session.run_with_info(None, {"input": inputs})
    assert info.routes == ("aggressive",) * 3 + ("mild",)
    assert info.energies_mj == (12.0,) * 4
    found = session.statistics
    assert (found.audits, found.disagreements, found.energy_mj) == (3, 2, 48.0)
    assert fakes["mild"].seen == [1, 3]  # the escalated one, then the audited ones


def test_an_alarm_where_mild_contradicts(judged: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(judged, policy=CERTIFIED, drift=QUICK, on_drift=lambda reason: None)
    for first, alarmed in ((AGREE, False), (DISAGREE, True)):
        for _ in range(20):  # half of them accepted, as at certification
            session.run(None, {"input": batch([0.9, 0.1], first=first)})
        assert (session.statistics.drift is not None) == alarmed
    assert "is contradicted by mild on more" in str(session.statistics.drift)
    assert session.threshold is None


def test_audits_take_no_trial_and_make_no_answer_late(
    judged: Path, fakes: Any, batch: Any, clock: Any
) -> None:
    session = AdaptiveSession(
        judged, policy=CERTIFIED, drift=DEAF, deadline_ms=30, breaker_seconds=30
    )
    fakes["mild"].before = lambda: clock.advance(0.1)
    session.warmup()
    for _ in range(4):
        clock.advance(31)  # an escalated call could try mild now
        _, info = session.run_with_info(None, {"input": batch([0.9])})
        assert (info.routes, info.late) == (("aggressive",), False)
    assert session.statistics.audits == 0
    _, info = session.run_with_info(None, {"input": batch([0.1])})  # still can
    assert (info.routes, info.late) == (("mild",), True)


def test_audits_change_no_answer(judged: Path, fakes: Any, batch: Any) -> None:
    scores = np.random.default_rng(0).random(64)
    guard = DriftGuard(audit_share=0.5, false_alarm_rate=1e-300)
    with_audits = AdaptiveSession(judged, policy=CERTIFIED, drift=guard)
    without = AdaptiveSession(judged, policy=CERTIFIED, drift=None)
    for start in range(0, 64, 4):
        feeds = {"input": batch(scores[start : start + 4], first=[AGREE, DISAGREE] * 2)}
        np.testing.assert_array_equal(with_audits.run(None, feeds), without.run(None, feeds))
    found = with_audits.statistics
    assert 0 < found.audits < found.routes["aggressive"]
    assert 0 < found.disagreements < found.audits
    assert found.routes == without.statistics.routes
    assert without.statistics.audits == 0


def test_audits_are_seeded_and_leave_out_what_has_no_time(
    judged: Path, fakes: Any, batch: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    audits_alone = dataclasses.replace(reference(), accepts=None, rejects=None)
    monkeypatch.setattr(Reference, "of_row", lambda row: audits_alone)

    def audited(**options: Any) -> list[int]:
        fakes["mild"].seen.clear()
        guard = DriftGuard(audit_share=0.5, false_alarm_rate=1e-300, seed=7)
        session = AdaptiveSession(judged, policy=CERTIFIED, drift=guard)
        session.warmup()
        fakes["mild"].seen.clear()
        for score in (0.9, 0.8, 0.7, 0.6) * 4:
            session.run(None, {"input": batch([score] * 8)}, **options)
        assert session.statistics.degraded == 0
        return list(fakes["mild"].seen)

    assert audited() == audited()
    assert sum(audited()) > 20
    fakes["mild"].before = lambda: clock.advance(0.020)
    assert audited(deadline_ms=10) == []
