"""Who gives up how much: from scores and a budget to the channels that go."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import PruningError
from greenprune.pruning.cost import Cost
from greenprune.pruning.graph import Analysis
from greenprune.pruning.scores import Scores

Removed = dict[str, tuple[int, ...]]
"""Group name to the channels that go, ascending; groups that lose nothing are left out."""


def choose(
    analysis: Analysis,
    scores: Scores,
    *,
    macs: float,
    width_multiple: int = 8,
    keep_at_least: float = 0.2,
) -> Removed:
    """Choose channels to remove until at most ``macs`` of the dense MACs are left.

    Greedy over all groups at once: the cut that loses the least score for the MACs it saves goes
    first. Every width lands on a multiple of ``width_multiple``, since that is what kernels are
    blocked for.

    Args:
        analysis: the network's groups.
        scores: one score for each channel of each group.
        macs: share of the dense MACs that may stay, in (0, 1].
        width_multiple: widths that are kept are multiples of this.
        keep_at_least: share of its channels that each group keeps.

    Raises:
        PruningError: the budget cannot be reached with these floors.
    """
    order = {group.name: np.argsort(scores[group.name], kind="stable") for group in analysis.groups}
    removed = {group.name: 0 for group in analysis.groups}
    dense = analysis.predict_cost(removed)
    cost = dense
    while cost.macs > macs * dense.macs:
        best = _best_step(analysis, scores, order, removed, cost, width_multiple, keep_at_least)
        if best is None:
            raise PruningError(
                f"the budget of {macs:.0%} of the MACs cannot be reached: with widths on "
                f"multiples of {width_multiple} and at least {keep_at_least:.0%} of every group "
                f"kept, {cost.macs / dense.macs:.1%} stay; raise the budget, or lower "
                "prune.width_multiple or prune.keep_at_least"
            )
        group, count = best
        removed[group] = count
        cost = analysis.predict_cost(removed)
    return {
        name: tuple(sorted(int(channel) for channel in order[name][:count]))
        for name, count in removed.items()
        if count
    }


def _best_step(
    analysis: Analysis,
    scores: Scores,
    order: Mapping[str, NDArray[np.int64]],
    removed: Mapping[str, int],
    cost: Cost,
    width_multiple: int,
    keep_at_least: float,
) -> tuple[str, int] | None:
    """The group to cut next and how many of its channels are gone then; None: no cut is left."""
    best: tuple[str, int] | None = None
    best_price = math.inf
    for group in analysis.groups:
        before = removed[group.name]
        width = _next_width(group.channels - before, width_multiple)
        floor = max(1, math.ceil(keep_at_least * group.channels))
        if width < floor:
            continue
        after = group.channels - width
        saved = cost.macs - analysis.predict_cost({**removed, group.name: after}).macs
        if saved <= 0:
            continue
        lost = float(scores[group.name][order[group.name][before:after]].sum())
        if lost / saved < best_price:
            best_price = lost / saved
            best = (group.name, after)
    return best


def _next_width(width: int, multiple: int) -> int:
    """The largest multiple below ``width``: 16 -> 8, 13 -> 8, 8 -> 0 for multiples of 8."""
    return (width - 1) // multiple * multiple


def widths(analysis: Analysis, removed: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Output width of every layer that can be pruned, after ``removed`` has gone."""
    counts = {name: len(channels) for name, channels in removed.items()}
    return {
        layer.module: layer.out_width
        - sum(counts.get(group, 0) * times for group, times in layer.out_groups.items())
        for layer in analysis.layers
        if layer.out_groups
    }
