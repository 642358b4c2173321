"""The certificate: it is right as often as it says, and says why where it cannot be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune_calibration import certify, draw_balanced, smallest_certifiable_loss
from greenprune_calibration.certificate import _binomial_tails, _is_bounded

SIMULATIONS = 2000


def allowed_failures(delta: float) -> int:
    """Above this many in SIMULATIONS, a true rate of delta is ruled out (probability 1e-6)."""
    tails = _binomial_tails(SIMULATIONS, delta)
    return int(np.searchsorted(tails, 1 - 1e-6))


@pytest.mark.parametrize("method", ["betting", "binomial"])
@pytest.mark.parametrize(
    ("n", "loss", "gain", "delta"),
    [(300, 0.05, 0.0, 0.05), (300, 0.05, 0.03, 0.05), (500, 0.02, 0.01, 0.1), (50, 0.2, 0.3, 0.1)],
)
def test_at_the_boundary_false_certificates_are_at_most_delta(
    n: int, loss: float, gain: float, delta: float, method: str
) -> None:
    uniform = np.random.default_rng(n).random((SIMULATIONS, n))
    harm = loss + gain  # so that the expected difference is the loss exactly
    differences = np.where(uniform < harm, 1.0, np.where(uniform < harm + gain, -1.0, 0.0))
    failures = int(_is_bounded(differences, loss, delta, method).sum())  # type: ignore[arg-type]
    assert failures <= allowed_failures(delta)


def test_the_walk_over_thresholds_and_rows_fails_at_most_delta_times() -> None:
    """Harm grows as the score falls: the true loss of accepting score >= t is (1 - t)^2 / 4."""
    delta, n, losses, failures = 0.1, 250, (0.02, 0.05, 0.1), 0
    thresholds = np.linspace(1.0, 0.0, 26)
    generator = np.random.default_rng(7)
    for seed in range(SIMULATIONS):
        scores = generator.random(n)
        aggressive = generator.random(n) >= (1 - scores) / 2
        rows = certify(
            scores, aggressive, np.ones(n), np.ones(n), thresholds, losses, delta=delta, seed=seed
        )
        true = [(1 - (1.0 if row.threshold is None else row.threshold)) ** 2 / 4 for row in rows]
        failures += any(
            row.certified and loss > row.max_accuracy_loss
            for row, loss in zip(rows, true, strict=True)
        )
    assert failures <= allowed_failures(delta)


def test_it_certifies_what_is_clearly_safe() -> None:
    scores = np.linspace(0, 1, 2000)
    aggressive = scores > 0.3
    (row,) = certify(
        scores, aggressive, np.ones(2000), np.ones(2000),
        np.linspace(1, 0, 101), [0.02], delta=0.05, seed=0,
    )  # fmt: skip
    assert row.certified
    assert row.threshold is not None
    assert 0.28 <= row.threshold <= 0.31
    assert row.coverage == pytest.approx(1 - row.threshold, abs=0.01)
    assert row.accuracy >= 0.98
    assert (row.n, row.reference_accuracy, row.reason) == (2000, 1.0, "")


def test_betting_uses_what_the_pair_gains_and_binomial_does_not() -> None:
    """How often 5,000 samples certify one point where 0.8% are harmed and 0.4% gain."""
    generator = np.random.default_rng(0)
    certified = {"betting": 0, "binomial": 0}
    for _ in range(10):
        uniform = generator.random((SIMULATIONS // 10, 5000))
        differences = np.where(uniform < 0.008, 1.0, np.where(uniform < 0.012, -1.0, 0.0))
        for method in certified:
            certified[method] += int(_is_bounded(differences, 0.01, 0.05, method).sum())  # type: ignore[arg-type]
    assert certified["betting"] / SIMULATIONS > 0.89
    assert certified["binomial"] / SIMULATIONS == pytest.approx(0.40, abs=0.03)


@pytest.mark.parametrize(("n", "harms"), [(1000, 4), (2000, 12), (5000, 38), (10000, 83)])
def test_binomial_allows_the_tabled_harms(n: int, harms: int) -> None:
    tails = _binomial_tails(n, 0.01)
    assert tails[harms] <= 0.05 < tails[harms + 1]


def test_binomial_without_harm_needs_299_samples_for_one_point() -> None:
    assert smallest_certifiable_loss(299, 0.05, "binomial") <= 0.01
    assert smallest_certifiable_loss(298, 0.05, "binomial") > 0.01
    assert smallest_certifiable_loss(100, 0.05, "binomial") == pytest.approx(
        1 - 0.05 ** (1 / 100), abs=1e-5
    )


def test_too_few_samples_says_so() -> None:
    ones = np.ones(40)
    tight, loose = certify(ones, ones, ones, ones, [0.5], [0.01, 0.5], delta=0.05, seed=0)
    assert (tight.threshold, tight.certified, tight.coverage) == (None, False, 0.0)
    assert "too few samples: 40" in tight.reason
    assert f"{smallest_certifiable_loss(40, 0.025):.4f}" in tight.reason
    assert loose.certified
    assert loose.threshold == 0.5


def test_a_mild_network_below_the_reference_says_so() -> None:
    n = 1000
    mild = np.arange(n) >= 100
    (row,) = certify(np.ones(n), mild, mild, np.ones(n), [0.5], [0.05], delta=0.05, seed=0)
    assert (row.threshold, row.certified, row.accuracy) == (None, False, 0.9)
    assert "0.1000 below the reference" in row.reason


def test_where_only_mild_will_do_nothing_is_accepted_and_certified() -> None:
    n = 1000
    (row,) = certify(
        np.ones(n), np.zeros(n), np.ones(n), np.ones(n), [0.9, 0.5], [0.05], delta=0.05, seed=0
    )
    assert (row.threshold, row.certified, row.coverage, row.accuracy) == (None, True, 0.0, 1.0)


def test_a_score_that_is_nan_is_never_accepted_and_infinity_not_by_nothing() -> None:
    scores = np.array([np.nan, np.inf, 0.9, -np.inf] * 100)
    ones = np.ones(400)
    (row,) = certify(scores, ones, ones, ones, [0.5, -1e300], [0.05], delta=0.05, seed=0)
    assert row.coverage == 0.5


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 400), data=st.data())
@settings(max_examples=60, deadline=None)
def test_looser_losses_never_accept_less(seed: int, n: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.random(n)
    rights = [generator.random(n) < data.draw(st.floats(0.5, 1)) for _ in range(3)]
    losses = (0.02, 0.05, 0.1, 0.3)
    rows = certify(scores, *rights, np.linspace(1, 0, 11), losses, delta=0.05, seed=seed)
    again = certify(scores, *rights, np.linspace(1, 0, 11), losses, delta=0.05, seed=seed)
    assert rows == again
    assert [row.max_accuracy_loss for row in rows] == list(losses)
    for row in rows:
        assert row.certified == (not row.reason)
        assert row.certified or row.threshold is None
    coverages = [row.coverage for row in rows]
    assert coverages == sorted(coverages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.ones((3, 3))}, "scores"),
        ({"scores": np.ones(0)}, "scores"),
        ({"right_mild": np.ones(4)}, "right_mild"),
        ({"right_reference": np.full(3, np.nan)}, "right_reference"),
        ({"right_aggressive": np.full(3, 1.5)}, "right_aggressive"),
        ({"thresholds": [0.1, 0.9]}, "strict"),
        ({"thresholds": [math.nan]}, "thresholds"),
        ({"losses": []}, "losses"),
        ({"losses": [1.0]}, "losses"),
        ({"delta": 0.0}, "delta"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, object], message: str) -> None:
    ones = np.ones(3)
    good: dict[str, object] = {
        "scores": ones,
        "right_aggressive": ones,
        "right_mild": ones,
        "right_reference": ones,
        "thresholds": [0.9, 0.1],
        "losses": [0.05],
        "delta": 0.05,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        certify(**(good | changes))  # type: ignore[arg-type]


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_balanced_draw(labels: list[int], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(labels)))
    drawn = draw_balanced(labels, count, seed)
    assert len(drawn) == len(set(drawn.tolist())) == count
    np.testing.assert_array_equal(drawn, draw_balanced(labels, count, seed))
    there = {name: labels.count(name) for name in set(labels)}
    taken = {name: sum(labels[index] == name for index in drawn) for name in there}
    for name, number in taken.items():  # a class below the others has given all it has
        assert number >= min(there[name], max(taken.values()) - 1)


def test_balanced_draw_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="expected 0 to 3"):
        draw_balanced([0, 1, 2], 4, 0)
