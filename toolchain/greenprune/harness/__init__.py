"""Measuring a bundle on this machine by a fixed protocol (device side)."""

from __future__ import annotations

from greenprune.harness.environment import describe_environment, diagnose
from greenprune.harness.presets import PRESETS
from greenprune.harness.protocol import bench
from greenprune.harness.results import Candidate, Results, read_results, write_results

__all__ = [
    "PRESETS",
    "Candidate",
    "Results",
    "bench",
    "describe_environment",
    "diagnose",
    "read_results",
    "write_results",
]
