"""The default job, LeNet-5 on scikit-learn's digits, once for each of three seeds.

    python benchmarks/digits.py [--runs DIR]

Each seed is a run of its own from nothing, in the folder given. Figures are mean and deviation over
the seeds, at the last epoch; latencies are of the preset 'quick' and meant as an illustration.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write_result

from greenprune import api

SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.runs or Path(scratch)
        begin = time.monotonic()
        summaries, seconds = [], []
        for seed in SEEDS:
            started = time.monotonic()
            summaries.append(
                api.run(overrides=[f"seed={seed}"], runs=folder, name=f"digits-{seed}")
            )
            seconds.append(time.monotonic() - started)
        figures = {
            "variants": {
                variant: _over_seeds([summary["variants"][variant] for summary in summaries])
                for variant in summaries[0]["variants"]
            },
            "certificates": [summary["certificate"]["headline"] for summary in summaries],
            "selectors": [summary["selector"] for summary in summaries],
            "bench_valid": [summary["valid"] for summary in summaries],
            "run_seconds": seconds,
        }
        print(write_result("digits", seed=0, seconds=time.monotonic() - begin, figures=figures))


def _over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {
        key: _spread([run[key] for run in found])
        for key in ("accuracy", "macs", "params", "accept_rate")
        if key in found[0]
    }
    for runtime in found[0]["latency_ms"]:
        made.setdefault("mean_latency_ms", {})[runtime] = _spread(
            [run["latency_ms"][runtime]["mean"] for run in found]
        )
        made.setdefault("speedup", {})[runtime] = _spread(
            [run["speedup"][runtime] for run in found]
        )
    return made


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}


if __name__ == "__main__":
    main()
