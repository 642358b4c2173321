"""Which points are worth having, and one number to compare sets of points by.

Everything here is minimised. Candidates of a sweep have the *objectives* accuracy lost, latency,
energy and bytes, each in the units of the dense network: see :func:`normalised`.

Why the hypervolume: of the measures of one set of points it is the one that is strictly monotone
under dominance (Zitzler et al., IEEE Transactions on Evolutionary Computation 7(2), 2003): a set
that is better in one objective and worse in none always scores higher, without weights that trade
a point of accuracy for milliseconds. Divided by the dense network's cost, it means the same on
another machine: 0 is "no better than the dense network", 1 would be the dense network's accuracy
for nothing. Its knee is the point that alone keeps most of it, so that the front and its best
point are judged by one measure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from greenprune.errors import MissingPackageError

WORST_LOSS = 0.05
"""Accuracy lost against the dense network at which a point is worth nothing: the largest loss that
a recipe certifies unless told otherwise."""


def normalised(
    loss: ArrayLike, costs: ArrayLike, *, worst_loss: float = WORST_LOSS
) -> NDArray[np.float64]:
    """Objectives whose reference point is 1 in every column.

    Args:
        loss: accuracy of the dense network less the candidate's, as fractions, [n]; below 0 where
            the candidate is better, which counts as such.
        costs: cost of each candidate over that of the dense network measured beside it, [n, d].
        worst_loss: the loss that becomes 1.

    Returns:
        float64 [n, 1 + d].
    """
    columns = np.asarray(costs, dtype=np.float64)
    first = np.asarray(loss, dtype=np.float64)[:, None] / worst_loss
    return np.hstack([first, columns])


def pareto(values: ArrayLike) -> NDArray[np.bool_]:
    """Which rows no other row dominates (is no worse in every column and better in one).

    Of equal rows the first counts, so that a front names no place twice.

    Args:
        values: float64 [n, d], minimised.

    Returns:
        bool [n].

    Raises:
        ValueError: not two-dimensional, or not finite.
    """
    rows = _checked(values)
    no_worse = (rows[:, None, :] <= rows[None, :, :]).all(axis=2)
    better = (rows[:, None, :] < rows[None, :, :]).any(axis=2)
    earlier = np.arange(len(rows))[:, None] < np.arange(len(rows))[None, :]
    beats = no_worse & (better | earlier)  # no worse, not better and earlier: an equal row
    return np.logical_not(beats.any(axis=0), dtype=np.bool_)


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """Volume that the rows dominate up to ``reference``; what is beyond it adds nothing.

    Args:
        values: float64 [n, d], minimised.
        reference: float64 [d].

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
        MissingPackageError: moocore is not installed.
    """
    rows = _checked(values)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != rows.shape[1:]:
        raise ValueError(f"reference: expected shape {rows.shape[1:]}, got {corner.shape}")
    inside = rows[(rows < corner).all(axis=1)]
    if not len(inside):
        return 0.0
    if rows.shape[1] == 1:
        return float(corner[0] - inside.min())
    try:
        import moocore
    except ImportError as error:
        raise MissingPackageError("moocore", "sweep") from error
    return float(moocore.hypervolume(inside, ref=corner))


def knee(values: ArrayLike, reference: ArrayLike) -> int | None:
    """The row that alone dominates most volume: the best single choice by the same measure.

    Unlike a row's contribution to the front, it does not depend on how densely the front was
    sampled around it; unlike the distance from a chord, it is defined in every dimension.

    Returns:
        The row's index, of equal ones the first; None where no row is within the reference.
    """
    rows = _checked(values)
    corner = np.asarray(reference, dtype=np.float64)
    volumes = np.clip(corner - rows, 0.0, None).prod(axis=1)
    if not len(rows) or volumes.max() == 0.0:
        return None
    return int(volumes.argmax())


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"expected an array [n, d] with d > 0, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("expected finite values; leave an objective out where it was not measured")
    return rows
