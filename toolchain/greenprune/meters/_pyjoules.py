"""pyJoules, imported without its side effect.

pyJoules 0.5.1 logs a warning through the root logger when it is imported without an NVML package,
and so installs a handler on the application's root logger. The handlers are put back here.
"""

from __future__ import annotations

import logging

_handlers = list(logging.root.handlers)

from pyJoules.device import Device, Domain  # noqa: E402
from pyJoules.energy_meter import EnergyMeter  # noqa: E402

logging.root.handlers[:] = _handlers

__all__ = ["Device", "Domain", "EnergyMeter"]
