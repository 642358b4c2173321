"""Noticing that the inputs are no longer those that the certificate was made on (device side).

Two rates are watched: how many inputs the selector accepts (for nothing), and, by running mild on a
small share of the accepted ones, how often the two networks disagree there. Each is compared with
bounds on what the certificate saw: the Chernoff bounds of its n samples at
:data:`REFERENCE_ERROR`, small enough that all three hold together with 99.9%, for a threshold
chosen among 100 on the same samples.

The test is a Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo, E-detectors, arXiv 2203.03532).
For Bernoulli observations x with rate at most b and an alternative q > b, the likelihood ratio
``e = q/b if x else (1-q)/(1-b)`` has an expectation of at most 1 whatever came before, so
``R <- (1 + R) e`` grows by at most 1 an observation in expectation, and by optional stopping
``P(R reaches 1/a within t observations) <= a t``. R is averaged over four alternatives, at
:data:`ODDS` times the odds of b; three such tests (accepts more, accepts fewer, disagrees more)
share the false-alarm rate. Unlike a test that began at the first input, it does not become slower
the longer all went well.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from greenprune.errors import BundleError
from greenprune.runtime.checks import finite

if TYPE_CHECKING:
    from greenprune.bundle import DialRow
    from greenprune.runtime.outcome import Outcome

REFERENCE_ERROR = 0.001 / (3 * 100)
ODDS = (1.25, 2.0, 4.0, 16.0)
LARGEST_LOG = 600.0


@dataclass(frozen=True, kw_only=True)
class DriftGuard:
    """How a session watches for drift.

    Raises:
        BundleError: a value out of range.
    """

    audit_share: float = 0.01
    """Of the accepted inputs, on which mild is run too: this share of mild's energy is the cost."""
    false_alarm_rate: float = 1e-8
    """The probability of a false alarm within the first t inputs is at most t times this: 1% in a
    million (while the certificate's own samples were not unlucky beyond 0.1%)."""
    seed: int = 0
    """Of the choice of the inputs."""

    def __post_init__(self) -> None:
        if not 0 <= finite("drift: audit_share", self.audit_share) <= 1:
            raise BundleError(
                f"drift: audit_share = {self.audit_share!r}: expected a share from 0 to 1"
            )
        if not 0 < finite("drift: false_alarm_rate", self.false_alarm_rate) < 1:
            raise BundleError(
                f"drift: false_alarm_rate = {self.false_alarm_rate!r}: expected a probability "
                "between 0 and 1"
            )


@dataclass(frozen=True)
class Bound:
    """An upper bound on a rate, and what a hit and a miss multiply R with, for each alternative:
    as logarithms in ``steps``, and as they are."""

    rate: float
    steps: tuple[tuple[float, float], ...]
    hit: tuple[float, ...]
    miss: tuple[float, ...]

    @staticmethod
    def above(share: float, samples: int) -> Bound | None:
        """Of the rate of which ``samples`` showed ``share``; None where any rate is possible."""
        rate = upper_bound(share, samples, REFERENCE_ERROR)
        if rate >= 1:
            return None
        steps = []
        for odds in ODDS:
            alternative = odds * rate / (1 - rate + odds * rate)
            steps.append((math.log(alternative / rate), math.log((1 - alternative) / (1 - rate))))
        hit, miss = (tuple(math.exp(step[side]) for step in steps) for side in (0, 1))
        return Bound(rate, tuple(steps), hit, miss)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Bounds on what the certificate saw at one threshold; None where it cannot be tested."""

    coverage: float
    accepts: Bound | None
    rejects: Bound | None
    disagreement: float | None
    disagrees: Bound | None

    @staticmethod
    def of_row(row: DialRow) -> Reference:
        """Of a row of the dial; its disagreement is a share of the accepted samples."""
        disagreement = row.disagreement
        accepted = round(row.coverage * row.n)
        return Reference(
            coverage=row.coverage,
            accepts=Bound.above(row.coverage, row.n),
            rejects=Bound.above(1 - row.coverage, row.n),
            disagreement=disagreement,
            disagrees=None if disagreement is None else Bound.above(disagreement, accepted),
        )


def upper_bound(share: float, samples: int, error: float) -> float:
    """The largest rate p with ``samples * KL(share || p) <= log(1 / error)`` (Chernoff): the true
    rate is above it with probability at most ``error``. 1.0 for no samples."""
    low, high = share, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if samples * _divergence(share, middle) <= math.log(1 / error):
            low = middle
        else:
            high = middle
    return high if high < 1 - 1e-8 else 1.0


def _divergence(share: float, rate: float) -> float:
    """Kullback-Leibler divergence of two Bernoulli distributions, in nats."""
    found = share * math.log(share / rate) if share else 0.0
    return found + ((1 - share) * math.log((1 - share) / (1 - rate)) if share < 1 else 0.0)


class _Detector:
    """R for each alternative; the bound may differ from call to call if chosen before it."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values = [0.0] * len(ODDS)

    def observe(self, bound: Bound | None, hits: int, misses: int) -> float:
        """Take in one call's observations at once; R's mean."""
        if bound is None:
            return 0.0
        if hits + misses == 1:  # the usual call, made quick
            factors = bound.hit if hits else bound.miss
            self._values = [
                (1.0 + value) * factor for value, factor in zip(self._values, factors, strict=True)
            ]
        else:
            self._values = [
                (1.0 + value) * math.exp(min(hits * hit + misses * miss, LARGEST_LOG))
                for value, (hit, miss) in zip(self._values, bound.steps, strict=True)
            ]
        return sum(self._values) / len(ODDS)


class DriftMonitor:
    """The running tests. Not safe under threads by itself: the session holds its lock."""

    def __init__(self, guard: DriftGuard) -> None:
        self._guard = guard
        self._random = random.Random(guard.seed)
        self._limit = 3 / guard.false_alarm_rate
        self.reset()

    def reset(self) -> None:
        """Forget all observations and the alarm."""
        self.alarm: str | None = None
        """Why it was raised."""
        self._scored = self._accepted = 0
        self._audits = self._disagreements = 0
        self._more, self._fewer, self._disagree = _Detector(), _Detector(), _Detector()

    def draw(self, accepted: int) -> list[int]:
        """Which of a call's accepted inputs to audit, as positions among them."""
        share = self._guard.audit_share
        if self.alarm or not share:
            return []
        return [place for place in range(accepted) if self._random.random() < share]

    def observe(self, outcome: Outcome) -> bool:
        """Take in a finished call; whether it raises the alarm."""
        point, scores = outcome.point, outcome.scores
        if self.alarm or point is None or point.reference is None or scores is None:
            return False
        accepted, rejected = outcome.sure, len(scores) - outcome.sure
        self._scored += len(scores)
        self._accepted += accepted
        reference = point.reference
        if self._more.observe(reference.accepts, accepted, rejected) >= self._limit:
            self._raise("accepts more", self._accepted / self._scored, reference.coverage)
        elif self._fewer.observe(reference.rejects, rejected, accepted) >= self._limit:
            self._raise("accepts fewer", self._accepted / self._scored, reference.coverage)
        if outcome.audited and reference.disagreement is not None:
            self._audits += outcome.audited
            self._disagreements += outcome.disagreed
            agreed = outcome.audited - outcome.disagreed
            found = self._disagree.observe(reference.disagrees, outcome.disagreed, agreed)
            if found >= self._limit:
                share = self._disagreements / self._audits
                self._raise("is contradicted by mild on more", share, reference.disagreement)
        return self.alarm is not None

    def _raise(self, what: str, share: float, expected: float) -> None:
        self.alarm = (
            "the inputs differ from those that the certificate was made on: the aggressive network "
            f"{what} of them, {share:.1%} so far, {expected:.1%} at "
            "certification; mild answers everything now: certify again with images of today, or "
            "call reset_drift()"
        )
