"""The numbers that a measurement is told in: percentiles, medians with intervals, paired ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
SAMPLES_FOR_P99 = 662
SAMPLES_FOR_P99_9 = 6636
"""MLPerf Inference's least numbers of samples for a 99th and a 99.9th percentile."""
THRESHOLD = 0.03
"""Smallest change that counts: the spread over runs of one bundle that the protocol allows."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and an interval that covers the true one with probability ``confidence``."""

    value: float
    low: float
    high: float
    confidence: float

    def excludes(self, number: float) -> bool:
        return not self.low <= number <= self.high

    @property
    def shows_difference(self) -> bool:
        """Of a single ratio: whether 95 % are reached and the interval is without 1."""
        return self.confidence >= CONFIDENCE and self.excludes(1.0)


def raised_confidence(ratios: int) -> float:
    """What each of so many intervals needs, so that all together miss with 5 % at most.

    Bonferroni's correction: 1 - 0.05 / ``ratios``.
    """
    return 1 - (1 - CONFIDENCE) / ratios


def supports_claim(ratio: Interval, confidence: float, threshold: float = THRESHOLD) -> bool:
    """Whether an interval shows that a ratio is not 1, and the ratio is one that matters.

    Args:
        ratio: one of several; computed for ``confidence``, which few values may not reach.
        confidence: see :func:`raised_confidence`.
        threshold: the ratio must be above 1 + this, or below 1 / (1 + this). What differs between
            two processes or two days, no interval over windows contains.
    """
    matters = not 1 / (1 + threshold) <= ratio.value <= 1 + threshold
    # the confidences are sums of fractions: no decision hangs on their last digit
    return matters and ratio.confidence >= confidence - 1e-12 and ratio.excludes(1.0)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latencies of the single inferences of one window, nanoseconds.

    ``p99_ns`` is None below 662 samples, ``p99_9_ns`` below 6,636. ``cov`` is the standard
    deviation over the mean.
    ``quantiles_ns`` are the 0th, 1st, … 100th percentiles, kept for plots.
    """

    samples: int
    min_ns: int
    p50_ns: float
    p90_ns: float
    p95_ns: float
    p99_ns: float | None
    p99_9_ns: float | None
    mean_ns: float
    cov: float
    quantiles_ns: tuple[float, ...]


def summarise(latencies_ns: NDArray[np.int64]) -> Latency:
    """Latencies int64 [N], N >= 1, in nanoseconds."""
    quantiles = [float(q) for q in np.percentile(latencies_ns, np.arange(101))]
    mean, samples = float(latencies_ns.mean()), len(latencies_ns)
    rarest = float(np.percentile(latencies_ns, 99.9))
    return Latency(
        samples=samples,
        min_ns=int(latencies_ns.min()),
        p50_ns=quantiles[50],
        p90_ns=quantiles[90],
        p95_ns=quantiles[95],
        p99_ns=quantiles[99] if samples >= SAMPLES_FOR_P99 else None,
        p99_9_ns=rarest if samples >= SAMPLES_FOR_P99_9 else None,
        mean_ns=mean,
        cov=float(latencies_ns.std()) / mean,
        quantiles_ns=tuple(quantiles),
    )


def order_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median, with an interval by order statistics.

    The interval from the k-th smallest to the k-th largest of n covers the median with
    probability 1 - 2 P(Binomial(n, 1/2) < k), whatever the distribution. The narrowest that
    reaches ``confidence`` is taken; where none does (of 95 %: below six values), smallest to
    largest stand with the confidence that they have (five: 93.75 %).
    """
    ordered = sorted(values)
    n, k = len(ordered), 1
    while 2 * (k + 1) <= n and _coverage(n, k + 1) >= confidence:
        k += 1
    return Interval(
        value=float(np.median(ordered)),
        low=float(ordered[k - 1]),
        high=float(ordered[n - k]),
        confidence=_coverage(n, k),
    )


def _coverage(n: int, k: int) -> float:
    return 1.0 - 2.0 * sum(math.comb(n, i) for i in range(k)) / 2.0**n


def paired_ratio(
    over: Sequence[float], under: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """Median of ``over[i] / under[i]`` over the blocks i, with that of :func:`order_interval`.

    No bootstrap, which is often asked for from 20 blocks on: by simulation of 20 blocks, a
    percentile bootstrap of the median covers it in 93.5 %, and order statistics in 95.9 %, as they
    say.
    """
    return order_interval([a / b for a, b in zip(over, under, strict=True)], confidence)


def unpaired_ratio(
    over: Sequence[float], under: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """How many times larger ``over`` is than ``under``, two samples that are not paired.

    Hodges and Lehmann's estimate: the median of all ratios ``over[i] / under[j]``, with the
    interval that belongs to the Mann-Whitney test: from the k-th smallest to the k-th largest of
    these ratios, exact for the smallest samples and free of a distribution's shape. The narrowest
    that reaches ``confidence`` is taken; where none does, smallest to largest stand with the
    confidence that they have. What shifts a whole sample, as another day does, it cannot see.

    Args:
        over: positive values, at least one.
        under: the same.
        confidence: of the interval, at least.
    """
    ratios = sorted(a / b for a in over for b in under)
    counts, total = _rank_sums(len(over), len(under)), math.comb(len(over) + len(under), len(over))
    k, tail = 1, counts[0]
    while 2 * (k + 1) <= len(ratios) and 1 - 2 * (tail + counts[k]) / total >= confidence:
        tail += counts[k]
        k += 1
    return Interval(
        value=float(np.median(ratios)),
        low=ratios[k - 1],
        high=ratios[-k],
        confidence=max(0.0, 1 - 2 * tail / total),
    )


def _rank_sums(n: int, m: int) -> list[int]:
    """Orders of n and m values, counted by the Mann-Whitney U that they have, 0 to n m.

    The coefficients of the Gaussian binomial: the product of (1 - q^(m+i)) / (1 - q^i), i = 1..n.
    """
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    return counts


def coefficient_of_variation(values: Sequence[float]) -> float:
    """The sample's standard deviation (n - 1) over its mean; one value does not vary."""
    return float(np.std(values, ddof=1) / np.mean(values)) if len(values) > 1 else 0.0
