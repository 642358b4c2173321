"""Policies worked out against a dial, and the energy budget kept by moving along it."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenprune import bundle
from greenprune.bundle import DialRow
from greenprune.errors import BundleError
from greenprune.runtime import AdaptiveSession, Policy
from greenprune.runtime.budget import HORIZON, BudgetController

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
    for _ in range(2 * HORIZON):
        ask(session, batch([0.3]))  # nothing is accepted any more: 12 mJ, or mild's 10
    assert session.statistics.over_budget
    assert session.threshold is not None or session.statistics.routes["mild"] > 0


@given(
    budget=st.floats(6.1, 14),
    coverages=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 99),
)
def test_the_choice_depends_on_earlier_calls_alone(
    budget: float, coverages: tuple[float, float, float], seed: int
) -> None:
    def controller() -> BudgetController:
        return BudgetController(
            budget_mj=budget,
            aggressive_mj=2.0,
            mild_mj=10.0,
            thresholds=[None, 0.8, 0.6, 0.4],
            coverages=[0.0, *sorted(coverages)],
        )

    one, other = controller(), controller()
    for scores in np.random.default_rng(seed).random((30, 4)).astype(np.float32):
        choice = one.choice
        assert choice == one.choice == other.choice  # asking changes nothing
        seen = None if choice == 0 else scores
        for each in (one, other):
            each.observe(seen, 4, 30.0)


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
