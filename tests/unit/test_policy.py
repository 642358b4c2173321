"""Policies worked out against a dial, and the energy budget kept by moving along it."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from greenprune import bundle, registry
from greenprune.bundle import DialRow
from greenprune.errors import BundleError
from greenprune.runtime import AdaptiveSession, Policy, decide
from greenprune.runtime.budget import HORIZON

ROW = DialRow(
    threshold=0.8,
    max_accuracy_loss=0.01,
    certified=True,
    delta=0.05,
    n=1000,
    coverage=0.2,
    accuracy=0.9,
    reference_accuracy=0.9,
)
ROWS = (
    dataclasses.replace(
        ROW, max_accuracy_loss=0.005, certified=False, threshold=None, reason="too few samples"
    ),
    ROW,
    dataclasses.replace(ROW, max_accuracy_loss=0.02, threshold=0.6, coverage=0.4),
    dataclasses.replace(ROW, max_accuracy_loss=0.03, threshold=0.4, coverage=0.6),
    dataclasses.replace(
        ROW, max_accuracy_loss=0.1, certified=False, threshold=0.1, coverage=0.9, reason="no luck"
    ),
)
ENERGIES = {
    name: {"value": value, "low": value, "high": value, "provenance": "measured_counter"}
    for name, value in {"dense": 20.0, "mild": 10.0, "aggressive": 2.0}.items()
}


@pytest.fixture
def dialled(tiny_bundle: Path, fakes: Any) -> Path:
    """A bundle with rows at 1, 2 and 3 points, uncertified ones on both ends, and energies."""
    record = bundle.open_bundle(tiny_bundle).manifest.selector
    record = dataclasses.replace(record, table=ROWS, threshold=0.6)
    bundle.update_manifest(tiny_bundle, {"selector": record, "energy_mj": ENERGIES})
    return tiny_bundle


def ask(session: AdaptiveSession, inputs: Any) -> Any:
    return session.run_with_info(None, {"input": inputs})[1]


@pytest.mark.parametrize(
    ("policy", "threshold", "certified"),
    [
        (Policy(), 0.6, True),
        (Policy(max_accuracy_loss=0.01), 0.8, True),
        (Policy(max_accuracy_loss=0.019), 0.8, True),
        (Policy(max_accuracy_loss=0.02), 0.6, True),
        (Policy(max_accuracy_loss=0.5), 0.4, True),  # the loosest certified one, no further
        (Policy(max_accuracy_loss=0.5, allow_uncertified=True), 0.1, False),
        (Policy(max_accuracy_loss=0.05, allow_uncertified=True), 0.4, True),
        (Policy(threshold=np.float32(0.5), allow_uncertified=True), 0.5, False),
        (Policy(threshold=0.8), 0.8, True),
    ],
)
def test_a_policy_picks_a_row(
    dialled: Path, batch: Any, policy: Policy, threshold: float, certified: bool
) -> None:
    session = AdaptiveSession(dialled, policy=policy)
    assert session.policy is policy
    assert session.threshold == threshold
    scores = [threshold, np.nextafter(np.float32(threshold), np.float32(0)) - 0.001]
    info = ask(session, batch(scores))
    assert info.routes == ("aggressive", "mild")
    assert info.threshold == threshold
    assert info.certified == (certified, certified)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Policy(max_accuracy_loss=0.005),
            r"at most 0\.50 points on x86, onnxruntime, fp32, found none; the dial of 'tiny' has: "
            r"0\.50 points: not certified \(too few samples\); "
            r"1\.00 points: certified, threshold 0\.8, accepts 20%",
        ),
        (
            Policy(max_accuracy_loss=0.005, allow_uncertified=True),
            "expected a row of the dial with a threshold",
        ),
        (
            Policy(max_accuracy_loss=0.005, energy_budget_mj=12),  # mild alone would do for 10 mJ
            r"certified for a loss of at most 0\.50 points .*, found none; the dial",
        ),
        (Policy(threshold=0.5), r"threshold = 0\.5 is not certified .*allow_uncertified=True; the"),
        (Policy(threshold=0.1), "not certified for x86, onnxruntime, fp32"),
        (Policy(energy_budget_mj=5.9), r"reach down to 6 mJ a sample, mild alone takes 10 mJ"),
        (Policy(energy_budget_mj=7, max_accuracy_loss=0.02), "reach down to 8 mJ"),
        (Policy(energy_budget_mj=7, allow_uncertified=True), "among certified rows only"),
    ],
)
def test_a_policy_that_the_dial_cannot_keep_changes_nothing(
    dialled: Path, batch: Any, policy: Policy, message: str
) -> None:
    session = AdaptiveSession(dialled)
    assert session.dial == ROWS
    before = session.policy
    with pytest.raises(BundleError, match=message):
        session.policy = policy
    assert session.policy is before
    assert ask(session, batch([0.7])).routes == ("aggressive",)
    with pytest.raises(BundleError, match=message):
        AdaptiveSession(dialled, policy=policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_accuracy_loss": 1.0}, "one point is 0.01"),
        ({"max_accuracy_loss": "0.01"}, "expected a finite number"),
        ({"max_accuracy_loss": [0.01]}, "expected a finite number"),
        ({"threshold": True}, "expected a finite number"),
        ({"threshold": 1j}, "expected a finite number"),
        ({"max_accuracy_loss": 10**400}, "expected a finite number"),
        ({"threshold": -(10**5000)}, "expected a finite number"),
        ({"threshold": 0.3, "allow_uncertified": "no"}, "'no': expected True or False"),
        ({"threshold": float("nan")}, "expected a finite number"),
        ({"energy_budget_mj": 0}, "expected more than 0"),
        ({"route": "fast"}, "one of aggressive, mild, dense"),
        ({"route": "mild", "threshold": 0.5}, "threshold and route exclude each other"),
        ({"max_accuracy_loss": 0.1, "threshold": 0.5}, "exclude each other"),
    ],
)
def test_policies_are_checked(options: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Policy(**options)


def test_accepting_nothing_is_certified_for_the_promised_loss_alone(
    dialled: Path, batch: Any
) -> None:
    """Mild alone is certified at 3 points, and at 1 point it is not."""
    manifest = bundle.open_bundle(dialled).manifest
    table = (ROWS[0], dataclasses.replace(ROWS[3], threshold=None))
    for operating_loss, certified in ((0.005, False), (0.03, True)):
        changed = {
            "selector": dataclasses.replace(manifest.selector, threshold=None, table=table),
            "certification": dataclasses.replace(
                manifest.certification, operating_loss=operating_loss
            ),
        }
        bundle.update_manifest(dialled, changed)
        assert ask(AdaptiveSession(dialled), batch([0.9])).certified == (certified,)
    for policy in (
        Policy(max_accuracy_loss=0.03),
        Policy(energy_budget_mj=12),
        Policy(energy_budget_mj=12, max_accuracy_loss=0.03),
    ):
        info = ask(AdaptiveSession(dialled, policy=policy), batch([0.9]))
        assert (info.routes, info.certified) == (("mild",), (True,))


def test_a_certificate_holds_where_it_was_made(dialled: Path, batch: Any) -> None:
    manifest = bundle.open_bundle(dialled).manifest
    changed = dataclasses.replace(manifest.selector, certified_on="x86, other, fp32")
    bundle.update_manifest(dialled, {"selector": changed})
    session = AdaptiveSession(dialled)
    assert ask(session, batch([0.9])).certified == (False,)
    assert not any(row.certified for row in session.dial)
    assert session.dial[1].reason == "certified on x86, other, fp32 only"
    for policy in (Policy(max_accuracy_loss=0.02), Policy(energy_budget_mj=7)):
        with pytest.raises(BundleError, match="certified"):
            session.policy = policy
    session.policy = Policy(max_accuracy_loss=0.02, allow_uncertified=True)
    assert session.threshold == 0.6


def test_a_certificate_does_not_hold_on_another_kind_of_machine(
    dialled: Path, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.load_target("x86"), "here", False, raising=False)
    session = AdaptiveSession(dialled)
    assert ask(session, batch([0.9])).certified == (False,)
    assert session.dial[1].reason.endswith("only, and this machine is another")
    with pytest.raises(BundleError, match="certified"):
        session.policy = Policy(max_accuracy_loss=0.02)


def test_energies_of_a_measurement_that_was_not_valid_say_so(dialled: Path, batch: Any) -> None:
    doubted = {**ENERGIES, "mild": {**ENERGIES["mild"], "valid": False}}
    bundle.update_manifest(dialled, {"energy_mj": doubted})
    session = AdaptiveSession(dialled, policy=Policy(energy_budget_mj=9))
    assert ask(session, batch([0.7])).energy_provenance == "measured_counter, not valid"
    assert session.statistics.energy_provenance == "measured_counter, not valid"


def test_energies_are_those_of_the_networks_that_ran(dialled: Path, batch: Any) -> None:
    session = AdaptiveSession(dialled, policy=Policy(max_accuracy_loss=0.02), drift=None)
    info = ask(session, batch([0.9, 0.1, np.nan]))
    assert info.energies_mj == (2.0, 12.0, 12.0)
    assert info.energy_provenance == "measured_counter"
    assert session.statistics.energy_mj == 26.0
    session.policy = Policy(route="dense")
    assert ask(session, batch([0.9])).energies_mj == (20.0,)
    assert session.statistics.energy_mj == 46.0
    bundle.update_manifest(dialled, {"energy_mj": {"aggressive": ENERGIES["aggressive"]}})
    session = AdaptiveSession(dialled, policy=Policy(max_accuracy_loss=0.02))
    assert ask(session, batch([0.9, 0.1])).energies_mj == (2.0, None)
    assert session.statistics.energy_mj is None  # a gap, not a smaller sum
    with pytest.raises(BundleError, match="needs the energy of mild and aggressive"):
        session.policy = Policy(energy_budget_mj=7)


@pytest.mark.parametrize("budget", [6.5, 7.3, 9.0, 9.9, 12.0])
def test_the_budget_is_kept_among_certified_rows(dialled: Path, batch: Any, budget: float) -> None:
    session = AdaptiveSession(dialled, policy=Policy(energy_budget_mj=budget), drift=None)
    generator = np.random.default_rng(1)
    infos = [ask(session, batch([score])) for score in generator.random(1500)]
    assert {info.threshold for info in infos} <= {None, 0.8, 0.6, 0.4}
    assert all(info.certified == (True,) for info in infos)
    mean = float(np.mean([info.energies_mj for info in infos]))
    assert mean == pytest.approx(min(budget, 10.0), rel=0.05)
    assert not session.statistics.over_budget


def test_inputs_that_are_too_hard_for_the_budget_are_told(dialled: Path, batch: Any) -> None:
    session = AdaptiveSession(dialled, policy=Policy(energy_budget_mj=7), drift=None)
    infos = [ask(session, batch([0.3])) for _ in range(2 * HORIZON)]  # none is accepted any more
    assert session.statistics.over_budget
    spent = [info.energies_mj[0] for info in infos]
    assert set(spent) == {12.0, 10.0}  # mild alone is the cheaper one now


@given(budget=st.floats(6.1, 14), seed=st.integers(0, 99))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_threshold_in_force_depends_on_earlier_calls_alone(
    dialled: Path, batch: Any, budget: float, seed: int
) -> None:
    """Whatever the call's own scores are: two sessions with the same past, and different ones."""
    generator = np.random.default_rng(seed)
    policy, past = Policy(energy_budget_mj=budget), generator.random((40, 4))
    chosen = set()
    for scores in (np.zeros(4), np.full(4, 0.99), generator.random(4)):
        session = AdaptiveSession(dialled, policy=policy, drift=None)
        before: list[float | None] = []
        infos = []
        for each in (*past, scores):
            before.append(session.threshold)
            infos.append(ask(session, batch(each)))
        assert [info.threshold for info in infos] == before
        for each, info in zip((*past, scores), infos, strict=True):
            accepted = decide(np.float32(each), info.threshold)
            assert info.routes == tuple("aggressive" if yes else "mild" for yes in accepted)
        chosen.add(tuple(before))
    assert len(chosen) == 1


def test_a_policy_changes_between_calls_and_never_within_one(
    dialled: Path, fakes: Any, batch: Any
) -> None:
    session = AdaptiveSession(dialled, policy=Policy(max_accuracy_loss=0.01), drift=None)
    inside, changed = threading.Event(), threading.Event()
    fakes["aggressive"].before = lambda: (inside.set(), changed.wait())
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, session, batch([0.7]))
        inside.wait()
        session.policy = Policy(max_accuracy_loss=0.03)
        changed.set()
        assert (call.result().threshold, call.result().routes) == (0.8, ("mild",))
    assert ask(session, batch([0.7])).routes == ("aggressive",)
    session.policy = Policy(route="mild")
    assert ask(session, batch([0.7])).routes == ("mild",)
