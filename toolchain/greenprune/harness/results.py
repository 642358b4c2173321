"""What a measurement found: plain records, written whole and read back strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenprune import schema, storage
from greenprune.bundle import Provenance
from greenprune.errors import MeasurementError
from greenprune.harness.statistics import Interval, Latency
from greenprune.meters.energy import Energy

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 2


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
    """Of the whole window, gross; None without a meter."""
    rerun: str = ""
    """Why a first try was thrown away; the reason is never its value."""


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
    """The idle baseline subtracted; None where the meter is not a counter."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the numbers can be relied upon: failures forbid it, notes limit it."""

    valid: bool
    failures: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One variant on one runtime.

    ``latency_ms`` has ``min``, ``p50``, ``p90``, ``p95``, ``p99`` (None below 662 samples a
    window) and ``mean``: medians over windows. ``speedup`` is the dense network's mean latency over
    this one's on the same runtime, paired by block; the mean, as a pair's median hides the inputs
    that it answers twice. ``energy_ratio`` is this one's energy over the dense network's.
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
    windows: tuple[MeasuredWindow, ...]
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
    target: str
    created: str
    """ISO 8601, UTC."""
    preset: str
    seed: int
    threads: int
    meter: str
    seconds: float
    environment_before: dict[str, Any]
    environment_after: dict[str, Any]
    candidates: tuple[Candidate, ...]
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


def write_results(path: Path, results: Results) -> None:
    """Write JSON, raw windows included, atomically."""
    storage.write_json(path, schema.encode(results))


def read_results(path: Path) -> Results:
    """Read what :func:`write_results` wrote.

    Raises:
        MeasurementError: the file is missing, not JSON, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MeasurementError(
            f"{path}: expected results written by greenprune-bench: {error}"
        ) from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise MeasurementError(
            f"{path}: results of schema {found}, this version reads {SCHEMA_VERSION}; measure again"
        )
    return schema.decode(content, Results, str(path), MeasurementError)
