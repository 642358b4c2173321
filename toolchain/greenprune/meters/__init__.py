"""Where joules come from: counters, or an estimate that says that it is one (device side)."""

from __future__ import annotations

from greenprune.meters.energy import Energy, label, weakest
from greenprune.meters.meter import Meter, Window
from greenprune.meters.opening import diagnose_meters, open_meter

__all__ = ["Energy", "Meter", "Window", "diagnose_meters", "label", "open_meter", "weakest"]
