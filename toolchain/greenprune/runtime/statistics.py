"""What a session tells about all its calls so far (device side)."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from greenprune.runtime.faults import percentile
from greenprune.runtime.outcome import Outcome
from greenprune.runtime.policy import ROUTES, Route

Mask = NDArray[np.bool_]
LATENCIES = 4096
"""Of the latest calls, from which the percentiles are taken."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Since the session was opened, taken together at one moment."""

    calls: int
    """Answered ones."""
    routes: dict[Route, int]
    """Samples by the network that answered."""
    faults: int
    """Samples for which the aggressive network, its score or the mild network failed."""
    degraded: int
    """Samples answered outside the guarantee; in ``routes`` they count as aggressive."""
    late: int
    """Calls that ended after their deadline."""
    failed: int
    """Calls that raised an error."""
    dropped: int
    """Calls that ``run_async`` did not take."""
    audits: int
    """Accepted samples on which mild was run too."""
    disagreements: int
    """Audited samples for which it answered another class."""
    drift: str | None
    """Why the session reverted to mild; None while it has not."""
    breaker_open: bool
    """The aggressive network failed too often in a row and is not asked for a while."""
    over_budget: bool
    """The policy's energy budget cannot be kept with these inputs."""
    energy_mj: float | None
    """Estimate for all answered samples; None where the bundle has no figure for a network that
    ran."""
    energy_provenance: str | None
    """As :class:`greenprune.runtime.RunInfo` has it."""
    latency_p50_ms: float | None
    """Of the latest calls, at most 4096; None before the first."""
    latency_p99_ms: float | None
    """None before a hundred calls."""


class Counters:
    """Running counts. Not safe under threads by themselves: the session holds its lock."""

    def __init__(self) -> None:
        self.calls = self.faults = self.degraded = self.late = 0
        self.failed = self.dropped = self.audits = self.disagreements = 0
        self.routes: dict[Route, int] = dict.fromkeys(ROUTES, 0)
        self.ran: dict[str, int] = dict.fromkeys(ROUTES, 0)
        """Samples that each network was run on."""
        self.latencies: deque[float] = deque(maxlen=LATENCIES)

    def add(self, outcome: Outcome, samples: int, seconds: float) -> None:
        """Count an answered call."""
        self.calls += 1
        self.latencies.append(seconds)
        if outcome.route is not None:
            self.routes[outcome.route] += samples
        else:
            accepted = outcome.sure if outcome.degraded is None else samples
            self.routes["aggressive"] += accepted
            self.routes["mild"] += samples - accepted
        self.faults += _count(outcome.faulty)
        self.degraded += _count(outcome.degraded)
        self.late += outcome.late
        self.audits += outcome.audited
        self.disagreements += outcome.disagreed
        for variant, count in outcome.ran(samples).items():
            self.ran[variant] += count

    def copy(self) -> Counters:
        """As they are now."""
        copied = copy.copy(self)
        copied.routes, copied.ran = self.routes.copy(), self.ran.copy()
        copied.latencies = self.latencies.copy()
        return copied

    def latency_ms(self) -> tuple[float | None, float | None]:
        """p50 and p99 of the latest calls."""
        ordered = sorted(self.latencies)  # so that sorting it again takes no time
        p50 = percentile(ordered, 0.5) * 1e3 if ordered else None
        return p50, percentile(ordered, 0.99) * 1e3 if len(ordered) >= 100 else None


def _count(mask: Mask | None) -> int:
    return 0 if mask is None else int(np.count_nonzero(mask))
