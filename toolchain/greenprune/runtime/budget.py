"""Holding a mean energy for each sample by moving among the rows of the dial (device side)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

HORIZON = 200
"""Samples over which a debt or credit of energy is paid back."""


class BudgetController:
    """Chooses the point for the next call from what earlier calls took; never from its input.

    What was spent below or above the budget is a credit, kept within one budget times
    :data:`HORIZON` (so that a long easy spell does not pay for a long expensive one). The choice is
    the most expensive point whose expected energy is at most ``budget + credit / HORIZON``, since
    accepting less is never less accurate by certificate: a proportional controller, our reading.
    A point's expected energy is ``aggressive + (1 - accept rate) * mild``, or ``mild`` where it
    accepts nothing; accept rates begin with the certificate's and follow the observed ones.

    Not safe under threads by itself: the session calls it under its lock.
    """

    def __init__(
        self,
        *,
        budget_mj: float,
        aggressive_mj: float,
        mild_mj: float,
        thresholds: Sequence[float | None],
        coverages: Sequence[float],
    ) -> None:
        self.budget_mj = budget_mj
        self._aggressive_mj, self._mild_mj = aggressive_mj, mild_mj
        self._nothing = np.array([threshold is None for threshold in thresholds])
        self._thresholds = np.array(
            [np.inf if threshold is None else threshold for threshold in thresholds]
        )
        self._certified_coverages = np.array(coverages, dtype=np.float64)
        self._coverages = self._certified_coverages.copy()
        self._credit_mj = 0.0
        self.choice = 0
        """Index of the point for the next call."""
        self._choose()

    @property
    def cheapest_mj(self) -> float:
        """The smallest mean energy of a sample that the points are expected to reach."""
        return float(self._expected_mj().min())

    @property
    def out_of_reach(self) -> bool:
        """Whether the inputs have become too hard for the budget: all credit is used up although
        the cheapest point is in force."""
        return self._credit_mj <= -self.budget_mj * HORIZON * 0.99

    def observe(self, scores: NDArray[np.float32] | None, samples: int, spent_mj: float) -> None:
        """Take in a finished call: its scores, None where there are none, and its energy."""
        bound = self.budget_mj * HORIZON
        credit = self._credit_mj + self.budget_mj * samples - spent_mj
        self._credit_mj = min(max(credit, -bound), bound)
        if scores is None:
            # Nothing was learnt: trust the certificate again, so that no point is given up for ever
            seen = self._certified_coverages
        else:
            seen = (scores[:, None] >= self._thresholds).mean(axis=0)
        weight = -math.expm1(-samples / HORIZON)
        self._coverages += weight * (seen - self._coverages)
        self._choose()

    def _choose(self) -> None:
        expected = self._expected_mj()
        allowed = self.budget_mj + self._credit_mj / HORIZON
        within = np.where(expected <= allowed, expected, -np.inf)
        best = within if np.isfinite(within).any() else -expected
        self.choice = int(best.argmax())

    def _expected_mj(self) -> NDArray[np.float64]:
        pair = self._aggressive_mj + (1 - self._coverages) * self._mild_mj
        return np.where(self._nothing, self._mild_mj, pair)
