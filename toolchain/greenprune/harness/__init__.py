"""Measuring a bundle on this machine by a fixed protocol (device side)."""

from __future__ import annotations

from greenprune.harness.bundle_race import BundleRace, race_bundles
from greenprune.harness.environment import describe_environment, diagnose
from greenprune.harness.files import check_destination, read_results, write_results
from greenprune.harness.presets import PRESETS
from greenprune.harness.protocol import bench
from greenprune.harness.regression import Comparison, compare_results
from greenprune.harness.results import Candidate, Results

__all__ = [
    "PRESETS",
    "BundleRace",
    "Candidate",
    "Comparison",
    "Results",
    "bench",
    "check_destination",
    "compare_results",
    "describe_environment",
    "diagnose",
    "race_bundles",
    "read_results",
    "write_results",
]
