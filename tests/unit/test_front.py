"""The Pareto front, its hypervolume and its knee, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from greenprune import front

pytest.importorskip("moocore", reason="the hypervolume needs the extra 'sweep'")

Values = NDArray[np.float64]


@st.composite
def points(draw: st.DrawFn, least: int = 1) -> Values:
    """[n, d] on a coarse grid, so that ties and duplicates are common; some beyond 1."""
    shape = draw(st.integers(least, 12)), draw(st.integers(1, 4))
    return draw(arrays(np.float64, shape, elements=st.integers(-2, 12).map(lambda k: k / 10)))


def ones(values: Values) -> Values:
    return np.ones(values.shape[1])


def dominates(one: Values, other: Values) -> bool:
    return bool((one <= other).all() and (one < other).any())


@given(points())
def test_front_by_its_definition(values: Values) -> None:
    chosen = front.pareto(values)

    for place, row in enumerate(values):
        beaten = any(dominates(other, row) for other in values)
        repeated = any((other == row).all() for other in values[:place])
        assert chosen[place] == (not beaten and not repeated)
    assert chosen.any()


@given(points(), st.randoms(use_true_random=False))
def test_order_does_not_matter(values: Values, random: object) -> None:
    order = np.random.default_rng(random.randrange(1 << 30)).permutation(len(values))  # type: ignore[attr-defined]
    shuffled = values[order]

    assert {tuple(row) for row in values[front.pareto(values)]} == {
        tuple(row) for row in shuffled[front.pareto(shuffled)]
    }
    volumes = [front.hypervolume(rows, ones(rows)) for rows in (values, shuffled)]
    assert volumes[0] == pytest.approx(volumes[1])


@given(points(least=2))
def test_more_points_never_take_volume_away(values: Values) -> None:
    assert (
        front.hypervolume(values, ones(values))
        >= front.hypervolume(values[:-1], ones(values)) - 1e-12
    )


@given(points())
def test_only_the_front_counts(values: Values) -> None:
    chosen = front.pareto(values)

    assert front.hypervolume(values[chosen], ones(values)) == pytest.approx(
        front.hypervolume(values, ones(values))
    )


@given(points())
def test_a_better_point_adds_volume(values: Values) -> None:
    within = np.minimum(values, 0.9)
    better = np.vstack([within, within.min(axis=0) - 0.1])

    assert front.hypervolume(better, ones(values)) > front.hypervolume(within, ones(values))


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_is_the_share_of_thrown_darts(dimensions: int) -> None:
    generator = np.random.default_rng(dimensions)
    values = generator.uniform(0.0, 1.2, size=(9, dimensions))
    darts = generator.uniform(size=(200_000, dimensions))
    hit = (darts[:, None, :] >= values[None]).all(axis=2).any(axis=1)

    assert front.hypervolume(values, np.ones(dimensions)) == pytest.approx(hit.mean(), abs=0.01)


def test_hypervolume_of_known_sets() -> None:
    assert front.hypervolume([[0.5, 0.5]], [1, 1]) == pytest.approx(0.25)
    assert front.hypervolume([[0.2, 0.6], [0.6, 0.2]], [1, 1]) == pytest.approx(0.48)
    assert front.hypervolume([[1.0, 1.0]], [1, 1]) == 0.0, "the dense network is worth nothing"
    assert front.hypervolume([[0.1, 1.5]], [1, 1]) == 0.0, "nothing beyond the reference counts"


@given(points())
def test_knee_is_the_best_single_choice(values: Values) -> None:
    place = front.knee(values, ones(values))
    alone = [front.hypervolume(values[[row]], ones(values)) for row in range(len(values))]

    if place is None:
        assert max(alone) == 0.0
    else:
        assert alone[place] == pytest.approx(max(alone))
        assert place == int(np.argmax(np.prod(np.clip(1 - values, 0, None), axis=1)))


def test_normalised_objectives_meet_at_one() -> None:
    values = front.normalised([0.0, front.WORST_LOSS, -0.01], [[0.0, 0.5], [1.0, 1.0], [0.3, 0.4]])

    expected = np.array([[0.0, 0.0, 0.5], [1.0, 1.0, 1.0], [-0.2, 0.3, 0.4]])
    assert values == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "told"),
    [([1.0, 2.0], r"\[n, d\]"), ([[1.0, np.nan]], "finite"), ([[1.0, np.inf]], "finite")],
)
def test_what_is_no_set_of_points(values: object, told: str) -> None:
    for measure in (
        front.pareto,
        lambda rows: front.hypervolume(rows, [1.0, 1.0]),
        lambda rows: front.knee(rows, [1.0, 1.0]),
    ):
        with pytest.raises(ValueError, match=told):
            measure(values)


def test_reference_of_another_shape() -> None:
    with pytest.raises(ValueError, match="reference"):
        front.hypervolume([[0.5, 0.5]], [1.0])
