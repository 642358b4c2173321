"""A recipe run from nothing once for each of several seeds, and what its runs have in common."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from greenprune import api

SEEDS = (0, 1, 2)


def over_seeds(recipe: str, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Mean and deviation over ``SEEDS`` of each variant, and what else each run found."""
    summaries, seconds = [], []
    for seed in SEEDS:
        started = time.monotonic()
        name = f"{recipe}-{seed}"
        summaries.append(
            api.run(recipe, overrides=[*overrides, f"seed={seed}"], runs=folder, name=name)
        )
        seconds.append(time.monotonic() - started)
    return {
        "variants": {
            variant: _spreads([summary["variants"][variant] for summary in summaries])
            for variant in summaries[0]["variants"]
        },
        "certificates": [summary["certificate"]["headline"] for summary in summaries],
        "selectors": [summary["selector"] for summary in summaries],
        "bench_valid": [summary["valid"] for summary in summaries],
        "run_seconds": seconds,
    }


def _spreads(found: list[dict[str, Any]]) -> dict[str, Any]:
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
