"""The Eyeriss accelerator, by simulation (data only so far)."""

from __future__ import annotations

from greenprune.registry import Capabilities
from greenprune_targets.base import BaseTarget


class Eyeriss(BaseTarget):
    """A row-stationary accelerator of 12 x 14 processing elements, in relative energy."""

    name = "eyeriss"
    description = "Eyeriss accelerator, simulated: relative energy, no latency on this machine"
    capabilities = Capabilities(
        precisions=("fp32",),
        runtimes=("nn_dataflow",),
        opset=20,
        width_multiple=1,
        meters=("simulated",),
        machines=(),
        status="not available yet: the simulation of each layer by nn-dataflow",
    )
