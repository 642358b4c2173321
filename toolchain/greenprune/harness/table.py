"""Results as a table for people, and the words for numbers in it."""

from __future__ import annotations

from rich.table import Table

from greenprune.harness.results import Candidate, InferenceEnergy, Results
from greenprune.harness.statistics import Interval
from greenprune.meters.energy import label


def results_table(results: Results) -> Table:
    """A row for each candidate; the title carries the preset, the caption verdict and notes."""
    table = Table(
        title=f"{results.bundle} on {results.environment_before['cpu']}, {results.threads} threads"
        f", preset {results.preset}",
        caption="\n".join(_caption(results)),
        caption_justify="left",
    )
    for heading in ("variant", "runtime"):
        table.add_column(heading)
    energy_heading = "mJ each"
    if any(c.energy_mj and c.energy_mj.provenance == "estimated_model" for c in results.candidates):
        energy_heading += " (ESTIMATE)"
    for heading in ("p50 ms", "p90", "p99", "faster than dense", energy_heading, "accuracy"):
        table.add_column(heading, justify="right")
    table.add_column("accepted", justify="right")
    for candidate in results.candidates:
        table.add_row(*_row(candidate))
    return table


def _row(candidate: Candidate) -> list[str]:
    latency = candidate.latency_ms
    return [
        candidate.variant,
        candidate.runtime,
        number(latency["p50"]),
        number(latency["p90"]),
        number(latency["p99"]),
        "" if candidate.variant == "dense" else ratio(candidate.speedup),
        energy(candidate.energy_mj),
        share(candidate.accuracy),
        share(candidate.accept_rate),
    ]


def _caption(results: Results) -> list[str]:
    verdict = results.verdict
    lines = ["verdict: " + ("valid" if verdict.valid else "NOT VALID")]
    lines += [f"  {reason}" for reason in verdict.failures]
    lines += [f"note: {note}" for note in verdict.notes]
    return lines


def number(interval: Interval | None) -> str:
    """A median with three significant digits; '-' where there is none."""
    return "-" if interval is None else f"{interval.value:.3g}"


def ratio(interval: Interval) -> str:
    """A paired ratio with its interval; one that contains 1 says that nothing is claimed."""
    text = f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"
    return text if interval.excludes(1.0) else f"{text} no clear difference"


def energy(found: InferenceEnergy | None) -> str:
    """Millijoules with interval and provenance."""
    if found is None:
        return label(None)
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}] {label(found.provenance)}"


def share(fraction: float | None) -> str:
    """A fraction as a percentage; '-' where there is none."""
    return "-" if fraction is None else f"{fraction:.1%}"
