"""greenprune: from a trained PyTorch network to a small, measured bundle for a device.

Importing this package costs nothing: each public name is loaded when it is first used, and torch
only with the names that need it.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from greenprune._version import __version__

# From 1.29 on ONNX Runtime reports its use to its maker, and keeps an identifier of the device in
# the user's home, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from greenprune.api import bench, explain, export, prune, prune_network, report, run
    from greenprune.errors import GreenpruneError

_PLACES = {
    "GreenpruneError": "greenprune.errors",
    "bench": "greenprune.api",
    "explain": "greenprune.api",
    "export": "greenprune.api",
    "prune": "greenprune.api",
    "prune_network": "greenprune.api",
    "report": "greenprune.api",
    "run": "greenprune.api",
}

__all__ = [
    "GreenpruneError",
    "__version__",
    "bench",
    "explain",
    "export",
    "prune",
    "prune_network",
    "report",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'greenprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
