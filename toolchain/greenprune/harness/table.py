"""Results as a table for people, and the words for numbers in it."""

from __future__ import annotations

from rich.table import Table

from greenprune.harness.bundle_race import BundleRace
from greenprune.harness.regression import Comparison
from greenprune.harness.results import Candidate, InferenceEnergy, Results, Verdict
from greenprune.harness.statistics import Interval
from greenprune.meters.energy import label


def results_table(results: Results) -> Table:
    """A row for each candidate; the title carries the preset, the caption verdict and notes."""
    table = Table(
        title=f"{results.bundle} on {results.environment_before['cpu']}, {results.threads} threads"
        f", preset {results.preset}",
        caption="\n".join(_caption(results.verdict)),
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


def race_table(race: BundleRace) -> Table:
    """A row for each variant and runtime of two bundles; B over A, below 1 B is better."""
    a, b = race.first, race.second
    table = Table(
        title=f"A = {a.bundle} ({a.created}), B = {b.bundle}, on {a.environment_before['cpu']}, "
        f"{a.threads} threads, preset {a.preset}",
        caption="\n".join(
            [f"{pair.name}: {pair.words}" for pair in race.pairs] + _caption(race.verdict)
        ),
        caption_justify="left",
    )
    for heading in ("variant", "runtime"):
        table.add_column(heading)
    provenance = label(a.meter_record.provenance)
    headings = ("A p50 ms", "B p50 ms", "B / A latency", f"B / A energy ({provenance})")
    for heading in (*headings, "A accuracy", "B accuracy"):
        table.add_column(heading, justify="right")
    for pair in race.pairs:
        p50 = [side.candidate(pair.variant, pair.runtime).latency_ms["p50"] for side in (a, b)]
        table.add_row(
            pair.variant,
            pair.runtime,
            *(number(interval) for interval in p50),
            _bare(pair.latency_ratio),
            _bare(pair.energy_ratio),
            *(share(accuracy) for accuracy in pair.accuracy),
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """A row for each quantity of each candidate; new over old, above 1 the new is worse."""
    presets = " and ".join(dict.fromkeys(comparison.preset))
    table = Table(
        title=f"old = {comparison.old}; new = {comparison.new}; preset {presets}",
        caption="\n".join(
            [
                "verdict: "
                + ("REGRESSION" if comparison.regression else "no regression")
                + f" (smallest change that counts: {comparison.threshold:.1%})",
                *(f"note: {difference}" for difference in comparison.differences),
            ]
        ),
        caption_justify="left",
    )
    for heading in ("variant", "runtime", "quantity"):
        table.add_column(heading)
    for heading in ("old", "new", "new / old"):
        table.add_column(heading, justify="right")
    table.add_column("judgement")
    units = {"latency": "mean latency, ms", "energy": f"energy, mJ ({comparison.energy})"}
    for change in comparison.changes:
        table.add_row(
            change.variant,
            change.runtime,
            units[change.quantity],
            f"{change.old:.3g}",
            f"{change.new:.3g}",
            _bare(change.ratio),
            change.judgement,
        )
    return table


def _caption(verdict: Verdict) -> list[str]:
    lines = ["verdict: " + ("valid" if verdict.valid else "NOT VALID")]
    lines += [f"  {reason}" for reason in verdict.failures]
    lines += [f"note: {note}" for note in verdict.notes]
    return lines


def _bare(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def number(interval: Interval | None) -> str:
    """A median with three significant digits; '-' where there is none."""
    return "-" if interval is None else f"{interval.value:.3g}"


def ratio(interval: Interval) -> str:
    """A paired ratio with its interval; one that contains 1 says that nothing is claimed."""
    text = f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"
    if interval.shows_difference:
        return text
    return f"{text} {'too few windows' if interval.excludes(1.0) else 'no clear difference'}"


def energy(found: InferenceEnergy | None) -> str:
    """Millijoules with interval and provenance."""
    if found is None:
        return label(None)
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}] {label(found.provenance)}"


def share(fraction: float | None) -> str:
    """A fraction as a percentage; '-' where there is none."""
    return "-" if fraction is None else f"{fraction:.1%}"
