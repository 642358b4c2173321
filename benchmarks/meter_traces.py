"""Replay random power traces of known energy through the meters, on a simulated clock.

    python benchmarks/meter_traces.py [--traces 10000]

Constant, rising and stepped power; counters with RAPL's ticks of 1 ms and NVML's of 100 ms, sensors
with INA3221's of 6.6 ms, and a processor's counter beside a GPU's; wraps at every phase, dropped
samples, freezes, resets, files that vanish or become unreadable. A measurement is valid where it
raised nothing and its interval reaches at most 0.5% from its value. Exit status 1 where one is
wrong and called valid, or fewer than 95% of the recoverable ones are valid.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import write_result

from greenprune.progress import progress

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "fakes"))

import power_traces

SEED = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=int, default=10_000)
    count = parser.parse_args().traces
    start = time.monotonic()
    with progress("traces", count) as advance:
        tallies: dict[str, Counter[str]] = {}
        worst = 0.0
        for seed in range(SEED, SEED + count):
            trace = power_traces.draw_trace(seed)
            outcome = power_traces.measure_trace(trace)
            for key in ("all", trace.kind, f"{trace.kind}, {trace.fault}"):
                add(tallies.setdefault(key, Counter()), trace, outcome)
            if outcome.valid and outcome.energy is not None:
                worst = max(worst, abs(outcome.energy.value / outcome.truth - 1))
            advance()
    whole = tallies["all"]
    figures: dict[str, Any] = {
        "traces": count,
        "valid_and_wrong": whole["wrong"],
        "interval_misses_truth_or_zero": whole["unsound"],
        "recoverable_valid_share": whole["recoverable_valid"] / max(1, whole["recoverable"]),
        "worst_error_of_valid": worst,
        "tallies": {key: dict(sorted(tallies[key].items())) for key in sorted(tallies)},
    }
    path = write_result(
        "meter_traces", seed=SEED, seconds=time.monotonic() - start, figures=figures
    )
    for key, value in figures.items():
        if key != "tallies":
            print(f"{key}: {value:.4g}")
    print(path)
    sound = not whole["wrong"] and not whole["unsound"]
    return 0 if sound and figures["recoverable_valid_share"] >= 0.95 else 1


def add(tally: Counter[str], trace: power_traces.Trace, outcome: power_traces.Outcome) -> None:
    """Count one outcome."""
    tally["traces"] += 1
    tally["valid"] += outcome.valid
    tally["invalid_for_cause"] += outcome.energy is None
    tally["wide_interval"] += outcome.energy is not None and not outcome.valid
    tally["wrong"] += outcome.wrong
    tally["unsound"] += not outcome.sound
    tally["recoverable"] += trace.recoverable
    tally["recoverable_valid"] += trace.recoverable and outcome.valid


if __name__ == "__main__":
    sys.exit(main())
