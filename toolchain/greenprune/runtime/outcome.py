"""What came of one call: for the session's own books and for its caller (device side)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.runtime.policy import Point, Route


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What happened to each sample of one call."""

    routes: tuple[Route, ...]
    """The network that answered."""
    scores: NDArray[np.float32]
    """[N]; NaN where the selector was not asked or failed."""
    threshold: float | None
    """In force for this call; None: nothing was to be accepted."""
    energies_mj: tuple[float | None, ...]
    """Estimate for each sample: the bundle's energy of the networks that ran on it, an audit
    included; None where the bundle has no figure for this runtime."""
    energy_provenance: str | None
    """Where the bundle's figures come from, such as ``measured_counter``; ``measured_counter, not
    valid`` where the measurement was not."""
    certified: tuple[bool, ...]
    """Whether the bundle's certificate covers the answer: runtime, threshold, not degraded, no
    drift."""
    degraded: tuple[bool, ...]
    """The aggressive network answered although it was not sure, for want of time or of mild:
    outside the guarantee."""
    faults: tuple[str | None, ...]
    """Why a sample did not go where its score sent it; None where nothing went wrong."""
    late: bool
    """The call ended after its deadline."""
    drift: str | None
    """Why the session reverted to mild; None while it has not."""


@dataclass(slots=True)
class Outcome:
    """The answers to one call, and how they came about; masks are bool [N], None where empty."""

    outputs: dict[str, NDArray[Any]]
    point: Point | None = None
    """None where the route was fixed."""
    route: Route | None = None
    """The fixed one."""
    accepted: NDArray[np.bool_] | None = None
    """Answered by the aggressive network."""
    scores: NDArray[Any] | None = None
    sure: int = 0
    """Samples that the selector accepts."""
    faulty: NDArray[np.bool_] | None = None
    """A network or its score failed."""
    degraded: NDArray[np.bool_] | None = None
    reasons: list[tuple[NDArray[np.bool_], str]] = field(default_factory=list)
    """Why samples did not go where their scores sent them."""
    aggressive_ran: bool = False
    mild_ran: NDArray[np.bool_] | None = None
    audited: int = 0
    disagreed: int = 0
    late: bool = False
    drift: str | None = None

    def fail(self, samples: int, reason: str) -> None:
        """Of a whole call."""
        self.faulty = np.ones(samples, dtype=np.bool_)
        self.reasons.append((self.faulty, reason))

    def ran(self, samples: int) -> dict[str, int]:
        """The number of samples that each network was run on."""
        if self.route is not None:
            return {self.route: samples}
        return {
            "aggressive": samples * self.aggressive_ran,
            "mild": 0 if self.mild_ran is None else int(np.count_nonzero(self.mild_ran)),
        }

    def info(
        self, samples: int, energies_mj: Mapping[str, float], provenance: str | None
    ) -> RunInfo:
        """For the caller; energies are the bundle's, of one inference by variant."""
        nothing = np.zeros(samples, dtype=np.bool_)
        accepted = nothing if self.accepted is None else self.accepted
        degraded = nothing if self.degraded is None else self.degraded
        scores = np.full(samples, np.nan) if self.scores is None else self.scores
        covered = self.point is not None and self.point.certified and self.drift is None
        texts: list[list[str]] = [[] for _ in range(samples)]
        for concerned, reason in self.reasons:
            for index in np.flatnonzero(concerned):
                texts[index].append(reason)
        return RunInfo(
            routes=tuple(self.route or ("aggressive" if yes else "mild") for yes in accepted),
            scores=scores.astype(np.float32),
            threshold=None if self.point is None else self.point.threshold,
            energies_mj=self._energies(samples, energies_mj),
            energy_provenance=provenance,
            certified=tuple(covered and not bad for bad in degraded.tolist()),
            degraded=tuple(degraded.tolist()),
            faults=tuple("; ".join(text) or None for text in texts),
            late=self.late,
            drift=self.drift,
        )

    def _energies(self, samples: int, energies_mj: Mapping[str, float]) -> tuple[float | None, ...]:
        if self.route is not None:
            return (estimate_mj({self.route: 1}, energies_mj),) * samples
        mild_ran = np.zeros(samples, dtype=np.bool_) if self.mild_ran is None else self.mild_ran
        aggressive = int(self.aggressive_ran)
        return tuple(
            estimate_mj({"aggressive": aggressive, "mild": int(mild)}, energies_mj)
            for mild in mild_ran
        )


def estimate_mj(ran: Mapping[str, int], energies_mj: Mapping[str, float]) -> float | None:
    """Energy of so many runs of each network; None where one that ran has no figure."""
    if any(count and variant not in energies_mj for variant, count in ran.items()):
        return None
    return sum(count * energies_mj[variant] for variant, count in ran.items() if count)
