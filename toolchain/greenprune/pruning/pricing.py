"""What a network costs in any quantity: a sum over its layers, by their widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import PruningError
from greenprune.pruning.graph import Analysis

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
CostFunction = Callable[[Ints, Ints], Floats]
"""Costs of a layer, float64 [n], at input and at output widths, int64 [n] each, all above 0."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one layer costs."""

    module: str
    """Its name; with a block that it is in, it goes."""
    in_width: int
    """Dense, as ``out_width``."""
    out_width: int
    in_groups: Mapping[str, int]
    """Group name to how many of the layer's inputs one channel of the group takes."""
    out_groups: Mapping[str, int]
    cost: CostFunction


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a network costs in one quantity: the sum over its layers, and a constant."""

    constant: float
    terms: Sequence[Term]


def exact_prices(analysis: Analysis) -> dict[str, Prices]:
    """MACs of one sample and parameters, priced without error.

    Each is a sum of products of two sizes, each of which is a sum over groups; the products are
    taken apart, so that no term reads more than one group on a side.
    """
    table = analysis.cost_table
    found: dict[str, list[Term]] = {"macs": [], "params": []}
    widths = [group.channels for group in analysis.groups]
    for row, name in enumerate(analysis.shapes):
        sides: list[list[tuple[int, dict[str, int]]]] = []
        for size, times in zip(table.sizes[row], table.per_channel[row], strict=True):
            grouped = [
                (int(times[place]) * widths[place], {group.name: int(times[place])})
                for place, group in enumerate(analysis.groups)
                if times[place]
            ]
            fixed = int(size) - sum(width for width, _ in grouped)
            sides.append(([(fixed, {})] if fixed else []) + grouped)
        for quantity, factor in (("macs", table.macs[row]), ("params", table.params[row])):
            found[quantity] += [
                Term(
                    module=name.rpartition(".")[0],
                    in_width=in_width,
                    out_width=out_width,
                    in_groups=in_groups,
                    out_groups=out_groups,
                    cost=_product(float(factor)),
                )
                for out_width, out_groups in sides[0]
                for in_width, in_groups in sides[1]
                if factor
            ]
    return {
        "macs": Prices(constant=float(table.fixed_macs), terms=found["macs"]),
        "params": Prices(constant=0.0, terms=found["params"]),
    }


def _product(factor: float) -> CostFunction:
    return lambda ins, outs: np.asarray(factor * ins * outs, dtype=np.float64)


def price(term: Term, ins: Ints, outs: Ints) -> Floats:
    """Costs at widths int64 [n], 0 where either is 0.

    Raises:
        PruningError: a cost that is not finite.
    """
    costs = np.asarray(term.cost(np.maximum(ins, 1), np.maximum(outs, 1)), dtype=np.float64)
    costs = np.where((ins > 0) & (outs > 0), costs, 0.0)
    if not np.isfinite(costs).all():
        place = int(np.flatnonzero(~np.isfinite(costs))[0])
        raise PruningError(
            f"layer '{term.module}': expected a finite cost at {ins[place]} inputs and "
            f"{outs[place]} outputs, got {costs[place]}; measure the cost table again"
        )
    return costs
