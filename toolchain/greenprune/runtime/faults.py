"""When to stop asking a network: a circuit breaker, and mild's expected latency (device side).

Neither is safe under threads by itself: the session calls them under its lock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

KEPT = 128
"""Latencies kept for each size of batch."""


class CircuitBreaker:
    """Leaves a network in peace for ``seconds`` after ``limit`` faults in a row; then one call
    tries it again while the others still do without it."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._faults = 0
        self._next_try = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls do without the network."""
        return self._faults >= self._limit

    @property
    def untroubled(self) -> bool:
        """Whether the last call's asking went well."""
        return not self._faults

    def allows(self, now: float) -> bool:
        """Whether this call may ask the network; ``now`` in seconds of a steady clock."""
        if not self.is_open:
            return True
        if now < self._next_try:
            return False
        self._next_try = now + self._seconds  # this call is the trial; one that never ends expires
        return True

    def record(self, fault: bool, now: float) -> None:
        """How asking went."""
        self._faults = self._faults + 1 if fault else 0
        if fault and self.is_open:
            self._next_try = now + self._seconds


class MildLatency:
    """The 99th percentile of a network's latency, by size of batch, from its latest runs.

    A slow spell must not shut the network out for good: every ``seconds`` one call tries it
    although it looks too slow, and if it was in time, what came before is forgotten. The first run
    of a size of batch does not count: a runtime compiles or allocates for it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next_try = 0.0
        self._seen: dict[int, deque[float]] = {}
        self._warm: set[int] = set()

    def p99(self, samples: int) -> float | None:
        """In seconds, for a batch of about ``samples``; None where nothing is known.

        Batches of like size (within a factor of two) count together; a larger one than any seen is
        taken to need time in proportion.
        """
        size = samples.bit_length()
        known = min(self._seen, key=lambda seen: (abs(seen - size), -seen), default=None)
        if known is None:
            return None
        return percentile(self._seen[known], 0.99) * 2.0 ** max(size - known, 0)

    def fits(self, samples: int, left: float) -> bool:
        """Whether a run may end within ``left`` seconds, by all that is known."""
        expected = self.p99(samples)
        return left > 0 and (expected is None or expected <= left)

    def tries(self, left: float, now: float) -> bool:
        """Whether this call is to try a run that looks too slow."""
        if left <= 0 or now < self._next_try:
            return False
        self._next_try = now + self._seconds
        return True

    def record(self, samples: int, seconds: float, left: float | None, now: float) -> None:
        """A run's latency, and what was left before it, where it had a deadline."""
        if not self._seen or (left is not None and seconds > left):
            self._next_try = now + self._seconds  # just tried
        elif left is not None and not self.fits(samples, left):
            self._seen.clear()
        size = samples.bit_length()
        if size in self._warm:
            self._seen.setdefault(size, deque(maxlen=KEPT)).append(seconds)
        self._warm.add(size)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of all are not above."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
