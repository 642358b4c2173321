"""The numbers that a measurement is told in: percentiles, medians with intervals, paired ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
SAMPLES_FOR_P99 = 662
"""MLPerf Inference's least number of samples for a 99th percentile."""
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


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latencies of the single inferences of one window, nanoseconds.

    ``p99_ns`` is None below 662 samples. ``cov`` is the standard deviation over the mean.
    ``quantiles_ns`` are the 0th, 1st, … 100th percentiles, kept for plots.
    """

    samples: int
    min_ns: int
    p50_ns: float
    p90_ns: float
    p95_ns: float
    p99_ns: float | None
    mean_ns: float
    cov: float
    quantiles_ns: tuple[float, ...]


def summarise(latencies_ns: NDArray[np.int64]) -> Latency:
    """Latencies int64 [N], N >= 1, in nanoseconds."""
    quantiles = [float(q) for q in np.percentile(latencies_ns, np.arange(101))]
    mean = float(latencies_ns.mean())
    return Latency(
        samples=len(latencies_ns),
        min_ns=int(latencies_ns.min()),
        p50_ns=quantiles[50],
        p90_ns=quantiles[90],
        p95_ns=quantiles[95],
        p99_ns=quantiles[99] if len(latencies_ns) >= SAMPLES_FOR_P99 else None,
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


def coefficient_of_variation(values: Sequence[float]) -> float:
    """Standard deviation over mean."""
    return float(np.std(values) / np.mean(values))
