"""Energy of one layer on Eyeriss: nn-dataflow's search for its best row-stationary mapping.

Energies are relative, in *MAC units*: one 16-bit multiply-accumulate costs 1, an access to a
register file 1, to a neighbour in the array 2, to the global buffer 6, to DRAM 200 (Chen, Emer and
Sze, ISCA 2016, table IV). The array has 12 x 14 processing elements with 261 words each and a
global buffer of 108 KB (Chen et al., JSSC 2017). Every word passes through the buffer. Nothing is
compressed and no multiplication by zero is skipped, as the real chip does; the padding counts as
read. So it is a model for comparing networks, not for joules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from greenprune.errors import MissingPackageError, TargetError

ARRAY = (12, 14)
BUFFER_WORDS = 108 * 1024 // 2
REGISTER_WORDS = 261
COSTS = {"mac": 1, "register_file": 1, "array": 2, "buffer": 6, "dram": 200}
"""MAC units for each multiply-accumulate, and for each access to a level."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A convolution, or a matrix product as a convolution of one pixel; pairs are height, width."""

    in_channels: int
    out_channels: int
    output: tuple[int, int] = (1, 1)
    filter: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    batch: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole batch."""
        channels = self.in_channels * self.out_channels
        return self.batch * channels * math.prod(self.output) * math.prod(self.filter)


@dataclass(frozen=True, kw_only=True)
class LevelEnergy:
    """MAC units by where they are spent, for the whole batch."""

    mac: float
    register_file: float
    array: float
    buffer: float
    dram: float

    @property
    def total(self) -> float:
        """All levels together."""
        return math.fsum(asdict(self).values())

    def times(self, count: int) -> LevelEnergy:
        """Of ``count`` such layers."""
        return LevelEnergy(**{level: count * value for level, value in asdict(self).items()})

    @staticmethod
    def sum(parts: Iterable[LevelEnergy]) -> LevelEnergy:
        """Level by level."""
        each = [asdict(part) for part in parts]
        return LevelEnergy(
            **{
                level.name: math.fsum(part[level.name] for part in each)
                for level in fields(LevelEnergy)
            }
        )


@cache
def layer_energy(shape: LayerShape) -> LevelEnergy:
    """Energy of the cheapest mapping of a layer; a shape is searched for once in a process.

    The whole-network search of nn-dataflow 2.1 breaks on sympy 1.12 and later; this is its part
    for one layer on one chip. It takes from 10 ms to a few seconds.

    Raises:
        MissingPackageError: nn-dataflow is not installed.
        TargetError: no mapping of the layer fits the buffers.
    """
    nn = _nn_dataflow()
    layer = nn.ConvLayer(
        shape.in_channels, shape.out_channels, shape.output, shape.filter, strd=shape.stride
    )
    resource, inputs = _chip(), layer.input_layer()
    whole = nn.FmapRange(
        nn.FmapPosition(b=0, n=0, h=0, w=0),
        nn.FmapPosition(b=shape.batch, n=inputs.nofm, h=inputs.hofm, w=inputs.wofm),
    )
    undivided = nn.PartitionScheme(
        order=range(nn.ParallelEnum.NUM), pdims=[(1, 1)] * nn.ParallelEnum.NUM
    )
    condition = nn.SchedulingCondition(
        resource=resource,
        constraint=nn.SchedulingConstraint(),
        ifmap_layout=nn.DataLayout(
            frngs=(whole,), regions=(resource.src_data_region,), parts=(undivided,)
        ),
        sched_seq=(0, 0, 0),
    )
    # The order is MemHierEnum's: DRAM, GBUF, ITCN, REGF.
    levels = ("dram", "buffer", "array", "register_file")
    cost = nn.Cost(
        mac_op=COSTS["mac"],
        mem_hier=tuple(COSTS[level] for level in levels),
        noc_hop=0,
        idl_unit=0,
    )
    search = nn.Scheduling(layer, shape.batch, cost, _mapping())
    found = search.schedule_search(condition, nn.Option())
    if not found:
        raise TargetError(
            f"no mapping of {shape} fits Eyeriss's buffer of {BUFFER_WORDS} words; expected a "
            "layer of which one input and one output channel fit"
        )
    accesses = zip(levels, found[0].scheme["access"], strict=True)
    energies = {level: float(COSTS[level] * sum(counts)) for level, counts in accesses}
    return LevelEnergy(mac=float(COSTS["mac"] * found[0].total_ops), **energies)


def _chip() -> Any:
    """One chip beside one DRAM; bandwidths only matter for time, which is not asked for."""
    nn = _nn_dataflow()
    one, here = nn.PhyDim2(1, 1), nn.PhyDim2(0, 0)
    memory = nn.NodeRegion(dim=one, origin=here, type=nn.NodeRegion.DRAM)
    return nn.Resource(
        proc_region=nn.NodeRegion(dim=one, origin=here, type=nn.NodeRegion.PROC),
        dram_region=memory,
        src_data_region=memory,
        dst_data_region=memory,
        dim_array=nn.PhyDim2(*ARRAY),
        size_gbuf=BUFFER_WORDS,
        size_regf=REGISTER_WORDS,
        array_bus_width=math.inf,
        dram_bandwidth=math.inf,
        no_time_mux=False,
    )


@cache
def _mapping() -> Any:
    """nn-dataflow's row-stationary mapping, also where it leaves half of the array idle."""

    class RowStationary(_nn_dataflow().MapStrategyEyeriss):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            # nn-dataflow asserts, last of all, that half of the array is busy. A 5 x 5 filter over
            # 8 rows keeps 80 of the 168 elements busy; idle ones cost nothing here.
            try:
                super().__init__(*arguments)
            except AssertionError:
                if getattr(self, "util", 1.0) > 0.5:
                    raise

    return RowStationary


def _nn_dataflow() -> Any:
    try:
        import nn_dataflow.core
    except ImportError as error:
        raise MissingPackageError("nn-dataflow", "eyeriss") from error
    return nn_dataflow.core
