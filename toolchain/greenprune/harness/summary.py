"""From windows to numbers, and from numbers to a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from greenprune.harness.results import Candidate, InferenceEnergy, MeasuredWindow, Verdict
from greenprune.harness.statistics import (
    Interval,
    coefficient_of_variation,
    order_interval,
    paired_ratio,
)

COV_NOTED, COV_FAILS = 0.01, 0.05
IDLE_DRIFT = 0.05
BUSY_LOAD_SHARE = 0.5


def summarise_candidate(
    *,
    variant: str,
    runtime: str,
    loaded: dict[str, Any],
    idle_watts: tuple[float | None, float | None],
    windows: Sequence[MeasuredWindow],
    dense_windows: Sequence[MeasuredWindow],
    seed: int,
) -> Candidate:
    """The record of one candidate; ``dense_windows`` are the same blocks' on the same runtime."""
    medians = [window.latency.p50_ns for window in windows]
    energies, dense_energies = _millijoules(windows), _millijoules(dense_windows)
    return Candidate(
        variant=variant,
        runtime=runtime,
        **loaded,
        idle_watts_before=idle_watts[0],
        idle_watts_after=idle_watts[1],
        windows=tuple(windows),
        latency_ms=latency_ms(windows),
        latency_cov=order_interval([window.latency.cov for window in windows]).value,
        energy_mj=inference_energy(windows, idle_watts),
        speedup=paired_ratio(_means(dense_windows), _means(windows), seed),
        energy_ratio=(
            paired_ratio(energies, dense_energies, seed) if energies and dense_energies else None
        ),
        verdict=_judge(loaded["steady"], windows, medians, idle_watts),
    )


def latency_ms(windows: Sequence[MeasuredWindow]) -> dict[str, Interval | None]:
    """Each statistic's median over windows, milliseconds."""
    statistics: dict[str, Interval | None] = {}
    for name in ("min", "p50", "p90", "p95", "p99", "mean"):
        values = [getattr(window.latency, f"{name}_ns") for window in windows]
        known = None not in values
        statistics[name] = order_interval([value / 1e6 for value in values]) if known else None
    return statistics


def inference_energy(
    windows: Sequence[MeasuredWindow], idle_watts: tuple[float | None, float | None]
) -> InferenceEnergy | None:
    """Millijoules for each inference: window energy over inferences, median over windows.

    The interval joins the spread over windows and the interval of the meter's model.
    """
    pairs = [(window.energy, window) for window in windows if window.energy is not None]
    if not pairs:
        return None
    first = pairs[0][0]

    def per_inference(part: str) -> Interval:
        return order_interval(
            [1e3 * getattr(energy, part) / window.inferences for energy, window in pairs]
        )

    net = None
    before, after = idle_watts
    if first.provenance.startswith("measured") and before is not None and after is not None:
        idle = (before + after) / 2
        net = order_interval(
            [1e3 * (e.value - idle * e.seconds) / window.inferences for e, window in pairs]
        ).value
    return InferenceEnergy(
        value=per_inference("value").value,
        low=per_inference("low").low,
        high=per_inference("high").high,
        provenance=first.provenance,
        scope=first.scope,
        meter=first.meter,
        net_value=net,
    )


def _means(windows: Sequence[MeasuredWindow]) -> list[float]:
    return [window.latency.mean_ns for window in windows]


def _millijoules(windows: Sequence[MeasuredWindow]) -> list[float]:
    return [1e3 * w.energy.value / w.inferences for w in windows if w.energy is not None]


def _judge(
    steady: bool,
    windows: Sequence[MeasuredWindow],
    medians: Sequence[float],
    idle_watts: tuple[float | None, float | None],
) -> Verdict:
    failures, notes = [], []
    if not steady:
        failures.append("not steady after the longest warm-up")
    spread = coefficient_of_variation(medians)
    if spread > COV_FAILS:
        failures.append(f"window medians vary by {spread:.1%} (more than {COV_FAILS:.0%})")
    elif spread > COV_NOTED:
        notes.append(f"window medians vary by {spread:.1%}")
    notes += [f"a window was measured again: {w.rerun}" for w in windows if w.rerun]
    energy, (before, after) = windows[0].energy, idle_watts
    if energy is not None and energy.provenance.startswith("measured") and before and after:
        drift = abs(after - before) / before
        if drift > IDLE_DRIFT:
            notes.append(f"idle power drifted by {drift:.0%}: read net joules with care")
    return Verdict(valid=not failures, failures=tuple(failures), notes=tuple(notes))


def judge_all(
    candidates: Sequence[Candidate],
    preset: str,
    before: dict[str, Any],
    after: dict[str, Any],
    notes: Sequence[str],
) -> Verdict:
    """The verdict on the whole: it is valid where every candidate is and nothing throttled."""
    failures = [f"{c.name}: {reason}" for c in candidates for reason in c.verdict.failures]
    found = list(notes)
    if preset == "quick":
        found.append("preset quick: windows too short for a claim; use standard or report")
    if (before["throttle_events"] or 0) < (after["throttle_events"] or 0):
        failures.append("the processor throttled during the measurement")
    if before["virtual_machine"]:
        found.append("a virtual machine: other guests share the processor")
    if before["governor"] not in (None, "performance"):
        found.append(f"frequency governor is '{before['governor']}', not 'performance'")
    if before["load_average"][0] > BUSY_LOAD_SHARE * before["usable_cores"]:
        found.append(f"the machine was busy at the start: load {before['load_average'][0]:.1f}")
    if before["on_battery"]:
        found.append("on battery")
    return Verdict(valid=not failures, failures=tuple(failures), notes=tuple(found))
