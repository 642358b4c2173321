"""From windows to numbers; :mod:`greenprune.harness.verdict` judges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from greenprune.harness.results import Candidate, InferenceEnergy, MeasuredWindow
from greenprune.harness.statistics import CONFIDENCE, Interval, order_interval, paired_ratio
from greenprune.harness.verdict import joules, judge_candidate


def summarise_candidate(
    *,
    variant: str,
    runtime: str,
    loaded: dict[str, Any],
    idle_watts: tuple[float | None, float | None],
    windows: Sequence[MeasuredWindow],
    dense_windows: Sequence[MeasuredWindow],
    discarded: Sequence[MeasuredWindow] = (),
) -> Candidate:
    """The record of one candidate; ``dense_windows`` are the same blocks' on the same runtime."""
    return Candidate(
        variant=variant,
        runtime=runtime,
        **loaded,
        idle_watts_before=idle_watts[0],
        idle_watts_after=idle_watts[1],
        windows=tuple(windows),
        discarded=tuple(discarded),
        latency_ms=latency_ms(windows),
        latency_cov=order_interval([window.latency.cov for window in windows]).value,
        energy_mj=inference_energy(windows, idle_watts),
        speedup=latency_ratio(dense_windows, windows),
        energy_ratio=energy_ratio(windows, dense_windows),
        verdict=judge_candidate(loaded["steady"], windows, discarded, idle_watts),
    )


def settle(
    tries: Sequence[MeasuredWindow],
) -> tuple[list[MeasuredWindow], list[MeasuredWindow]]:
    """The windows that count, the last try of each block, and those that were run again."""
    last = {window.block: window for window in tries}
    return list(last.values()), [window for window in tries if window is not last[window.block]]


def latency_ratio(
    over: Sequence[MeasuredWindow],
    under: Sequence[MeasuredWindow],
    confidence: float = CONFIDENCE,
) -> Interval:
    """Mean latency of ``over`` for that of ``under``, the same blocks, paired by block."""
    return paired_ratio(
        [window.latency.mean_ns for window in over],
        [window.latency.mean_ns for window in under],
        confidence=confidence,
    )


def energy_ratio(
    over: Sequence[MeasuredWindow],
    under: Sequence[MeasuredWindow],
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """The same of joules for each inference, by the blocks where both have them; None of none."""
    pairs = [
        (ours.value / a.inferences, theirs.value / b.inferences)
        for a, b in zip(over, under, strict=True)
        if (ours := joules(a)) is not None and (theirs := joules(b)) is not None
    ]
    if not pairs:
        return None
    return paired_ratio([a for a, _ in pairs], [b for _, b in pairs], confidence=confidence)


def mean_latencies_ms(windows: Sequence[MeasuredWindow]) -> list[float]:
    """Of each window, milliseconds."""
    return [window.latency.mean_ns / 1e6 for window in windows]


def energies_mj(windows: Sequence[MeasuredWindow]) -> list[float]:
    """Of one inference, millijoules, of each window that has them."""
    return [1e3 * e.value / w.inferences for w in windows if (e := joules(w)) is not None]


def latency_ms(windows: Sequence[MeasuredWindow]) -> dict[str, Interval | None]:
    """Each statistic's median over windows, milliseconds."""
    statistics: dict[str, Interval | None] = {}
    for name in ("min", "p50", "p90", "p95", "p99", "p99.9", "mean"):
        field = f"{name.replace('.', '_')}_ns"
        values = [getattr(window.latency, field) for window in windows]
        known = None not in values
        statistics[name] = order_interval([value / 1e6 for value in values]) if known else None
    return statistics


def inference_energy(
    windows: Sequence[MeasuredWindow], idle_watts: tuple[float | None, float | None]
) -> InferenceEnergy | None:
    """Millijoules for each inference: window energy over inferences, median over windows.

    The interval joins the spread over windows and the interval of the meter's model.
    """
    pairs = [(energy, window) for window in windows if (energy := joules(window)) is not None]
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
