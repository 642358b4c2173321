"""What a measurement found: plain records (:mod:`greenprune.harness.files` writes them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from greenprune.bundle import Provenance
from greenprune.errors import MeasurementError
from greenprune.harness.conditions import Conditions
from greenprune.harness.environment import Environment
from greenprune.harness.statistics import Interval, Latency
from greenprune.meters.energy import Energy

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 4
AT_LEAST_ONE = msgspec.Meta(min_length=1)


@dataclass(frozen=True, kw_only=True)
class MeasuredWindow:
    """One stretch of inferences by one candidate, as it was measured."""

    block: int
    order: int
    """Position within the block."""
    seconds: float
    inferences: int
    latency: Latency
    energy: Energy | None
    """Of the whole window, gross; None without a meter, or where it failed."""
    conditions: Conditions
    invalid: str = ""
    """The cause for which this window does not count; never its value."""


@dataclass(frozen=True, kw_only=True)
class InferenceEnergy:
    """Millijoules for each inference, gross; low and high join windows and the meter's model."""

    value: float
    low: float
    high: float
    provenance: Provenance
    scope: str
    meter: str
    net_value: float | None
    """The idle baseline subtracted; None where neither a counter nor a rail was read."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the numbers can be relied upon: failures forbid it, notes limit it."""

    valid: bool
    failures: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MeterRecord:
    """Where the joules came from."""

    name: str
    provenance: Provenance | None
    """None without a meter."""
    scope: str
    note: str
    period_seconds: float | None
    """Measured time between two updates of the counter; None where there is no counter."""
    tdp_watts: float | None
    """What the user said of the processor, for the estimate."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One variant on one runtime.

    ``latency_ms`` has ``min``, ``p50``, ``p90``, ``p95``, ``p99`` (None below 662 samples a
    window), ``p99.9`` (None below 6,636) and ``mean``: medians over windows. ``speedup`` is the
    dense network's mean latency over this one's on the same runtime, paired by block; the mean, as
    a pair's median hides the inputs that it answers twice. ``energy_ratio`` is this one's energy
    over the dense network's.
    """

    variant: str
    runtime: str
    images: int
    accuracy: float | None
    """Top-1 on the replay images; None where the bundle has no targets for them."""
    accept_rate: float | None
    """Of the pair: share of the replay images that the aggressive network answered."""
    routed: dict[str, int]
    """Of the pair: replay images by the network that answered."""
    steady: bool
    warmup_inferences: int
    warmup_seconds: float
    idle_watts_before: float | None
    idle_watts_after: float | None
    windows: Annotated[tuple[MeasuredWindow, ...], AT_LEAST_ONE]
    """One a block; one that is marked invalid was so twice, and the verdict says it."""
    discarded: tuple[MeasuredWindow, ...]
    """First tries that were invalid for a cause, and were run again."""
    latency_ms: dict[str, Interval | None]
    latency_cov: float
    """Between the inferences of a window; median over windows."""
    energy_mj: InferenceEnergy | None
    speedup: Interval
    energy_ratio: Interval | None
    verdict: Verdict

    @property
    def name(self) -> str:
        return f"{self.variant} on {self.runtime}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole measurement of a bundle on this machine."""

    schema: int
    bundle: str
    networks_sha256: str
    """Of the bundle's graphs and artifacts; see
    :attr:`greenprune.bundle.Bundle.networks_sha256`."""
    target: str
    created: str
    """ISO 8601, UTC."""
    preset: str
    seed: int
    threads: int
    meter: str
    meter_record: MeterRecord
    seconds: float
    environment_before: Environment
    environment_after: Environment
    candidates: Annotated[tuple[Candidate, ...], AT_LEAST_ONE]
    verdict: Verdict

    def candidate(self, variant: str, runtime: str) -> Candidate:
        """The candidate of that variant and runtime.

        Raises:
            MeasurementError: it was not measured.
        """
        for candidate in self.candidates:
            if (candidate.variant, candidate.runtime) == (variant, runtime):
                return candidate
        raise MeasurementError(
            f"'{variant} on {runtime}' was not measured; "
            f"measured are: {', '.join(candidate.name for candidate in self.candidates)}"
        )

    def table(self) -> Table:
        """The results as a table for a terminal."""
        from greenprune.harness.table import results_table

        return results_table(self)
