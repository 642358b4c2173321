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
BLOCKS_FOR_BOOTSTRAP = 20
RESAMPLES = 2000


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
        """Of a ratio: whether it may be claimed, which takes 95 % and an interval without 1."""
        return self.confidence >= CONFIDENCE and self.excludes(1.0)


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


def order_interval(values: Sequence[float]) -> Interval:
    """The median, with an interval by order statistics.

    The interval from the k-th smallest to the k-th largest of n covers the median with
    probability 1 - 2 P(Binomial(n, 1/2) < k), whatever the distribution. The narrowest that
    reaches 95 % is taken; below six values none does, and smallest to largest stand with the
    confidence that they have (five: 93.75 %).
    """
    ordered = sorted(values)
    n, k = len(ordered), 1
    while 2 * (k + 1) <= n and _coverage(n, k + 1) >= CONFIDENCE:
        k += 1
    return Interval(
        value=float(np.median(ordered)),
        low=float(ordered[k - 1]),
        high=float(ordered[n - k]),
        confidence=_coverage(n, k),
    )


def _coverage(n: int, k: int) -> float:
    return 1.0 - 2.0 * sum(math.comb(n, i) for i in range(k)) / 2.0**n


def paired_ratio(over: Sequence[float], under: Sequence[float], seed: int) -> Interval:
    """Median of ``over[i] / under[i]`` over the blocks i, with its interval.

    From 20 blocks on the interval is a percentile bootstrap over blocks, below it is that of
    :func:`order_interval`. A difference is claimed only where the interval excludes 1.
    """
    ratios = np.asarray(over, dtype=float) / np.asarray(under, dtype=float)
    if len(ratios) < BLOCKS_FOR_BOOTSTRAP:
        return order_interval([float(ratio) for ratio in ratios])
    draws = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.median(ratios[draws], axis=1), [tail, 100 - tail])
    return Interval(
        value=float(np.median(ratios)), low=float(low), high=float(high), confidence=CONFIDENCE
    )


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
    """Standard deviation over mean."""
    return float(np.std(values) / np.mean(values))
