"""Who gives up how much: from scores and a budget to the channels that go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import PruningError
from greenprune.pruning.graph import Analysis, unknown_group
from greenprune.pruning.scores import Scores

Removed = dict[str, tuple[int, ...]]
"""Group name to the channels that go, ascending; groups that lose nothing are left out."""

Counts = NDArray[np.int64]
"""How many channels each group loses, int64 [groups], in the order of ``Analysis.groups``."""


def choose(
    analysis: Analysis,
    scores: Scores,
    *,
    macs: float = 1.0,
    params: float = 1.0,
    width_multiple: int = 8,
    keep_at_least: float = 0.2,
    scope: Literal["global", "uniform"] = "global",
) -> Removed:
    """Choose channels to remove until the MACs and the parameters are within their shares.

    ``global``: greedy over all groups at once. The cut that loses the least score for what it
    saves of the budgets that are still exceeded goes first; then, as the last cut may have taken
    more than was needed, what still fits is given back, the highest scores first. Channels whose
    score is zero go in any case: nothing is lost with them.
    ``uniform``: every group loses the same share of its channels, the smallest that is enough.

    Every width lands on a multiple of ``width_multiple``, since that is what kernels are blocked
    for.

    Args:
        analysis: the network's groups.
        scores: one score for each channel of each group.
        macs: share of the dense MACs that may stay, in (0, 1].
        params: share of the dense parameters that may stay, in (0, 1].
        width_multiple: widths that are kept are multiples of this.
        keep_at_least: share of its channels that each group keeps.
        scope: as above.

    Raises:
        PruningError: the budget cannot be reached with these floors; the message names the
            tightest that can.
    """
    if not (0 < macs <= 1 and 0 < params <= 1):
        raise PruningError(
            f"expected shares above 0 and at most 1, got macs = {macs} and params = {params}"
        )
    plan = _Plan(analysis, scores, {"macs": macs, "params": params}, width_multiple, keep_at_least)
    counts = plan.greedy() if scope == "global" else plan.uniform()
    return _lowest(analysis, scores, counts)


def by_rates(
    analysis: Analysis,
    scores: Scores,
    rates: Mapping[str, float],
    *,
    width_multiple: int = 1,
) -> Removed:
    """Choose channels by a rate for each group, as papers give them.

    A group of c channels keeps ``floor(c (1 - rate))`` of them, rounded up to a multiple of
    ``width_multiple``; groups without a rate keep all.

    Raises:
        PruningError: an unknown group, or a rate outside [0, 1) or that leaves no channel.
    """
    counts = np.zeros(len(analysis.groups), dtype=np.int64)
    places = {group.name: place for place, group in enumerate(analysis.groups)}
    for name, rate in rates.items():
        if name not in places:
            raise unknown_group(analysis, name)
        if not 0 <= rate < 1:
            raise PruningError(
                f"group '{name}': expected a rate of 0 or more and below 1 (the share of its "
                f"channels that goes), got {rate}"
            )
        width = analysis.groups[places[name]].channels
        kept = math.floor(width * (1 - Fraction(str(rate))))  # 10 (1 - 0.7) is 3, not 3.0000004
        kept = min(width, math.ceil(kept / width_multiple) * width_multiple)
        if kept < 1:
            raise PruningError(
                f"group '{name}': a rate of {rate} leaves none of its {width} channels; lower it "
                f"to at most {1 - 1 / width:.3f}"
            )
        counts[places[name]] = width - kept
    return _lowest(analysis, scores, counts)


def _lowest(analysis: Analysis, scores: Scores, counts: Counts) -> Removed:
    """The channels with the lowest scores, so many of each group."""
    return {
        group.name: tuple(sorted(_order(scores[group.name])[:count].tolist()))
        for group, count in zip(analysis.groups, counts.tolist(), strict=True)
        if count
    }


def _order(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.argsort(scores, kind="stable")


class _Plan:
    """One budget problem: groups in rows, counts of removed channels to be found."""

    def __init__(
        self,
        analysis: Analysis,
        scores: Scores,
        shares: Mapping[str, float],
        multiple: int,
        keep_at_least: float,
    ) -> None:
        self.analysis = analysis
        self.shares = shares
        self.multiple = multiple
        self.keep_at_least = keep_at_least
        self.widths = np.array([group.channels for group in analysis.groups], dtype=np.int64)
        floors = np.maximum(1, np.ceil(keep_at_least * self.widths)).astype(np.int64)
        least = -(-floors // multiple) * multiple
        self.limits = self.widths - np.minimum(least, self.widths)
        """How many channels each group can lose at most."""
        self.lost = [
            np.concatenate([[0.0], np.cumsum(np.sort(scores[group.name]))])
            for group in analysis.groups
        ]
        """Score lost with the n lowest channels of each group, float64 [channels + 1]."""
        self.dense = self._costs(np.zeros((1, len(self.widths)), dtype=np.int64))[0]
        self.allowed = np.array([shares["macs"], shares["params"]]) * self.dense

    def greedy(self) -> Counts:
        dead = self._dead()
        counts = dead.copy()
        cost = self._costs(counts[np.newaxis])[0]
        while (over := cost > self.allowed).any():
            after = self._step_down(counts)
            possible = np.flatnonzero(after <= self.limits)
            if not len(possible):
                raise self._impossible(counts)
            costs = self._costs(_each_alone(counts, possible, after))
            saved = ((cost - costs) / self.dense)[:, over].sum(axis=1)
            lost = self._lost(possible, counts, after)
            price = np.divide(lost, saved, out=np.full(len(saved), np.inf), where=saved > 0)
            if not (saved > 0).any():
                raise self._impossible(counts)
            best = int(price.argmin())
            counts[possible[best]] = after[possible[best]]
            cost = costs[best]
        return self._give_back(counts, dead)

    def _dead(self) -> Counts:
        """How many channels each group can lose whose score is zero."""
        zeros = np.array([np.count_nonzero(lost[1:] == 0) for lost in self.lost])
        kept = -(-(self.widths - zeros) // self.multiple) * self.multiple
        return np.asarray(np.minimum(self.widths - np.minimum(kept, self.widths), self.limits))

    def _give_back(self, counts: Counts, least: Counts) -> Counts:
        while (counts > least).any():
            before = np.maximum(self._step_up(counts), least)
            possible = np.flatnonzero(counts > least)
            fits = (self._costs(_each_alone(counts, possible, before)) <= self.allowed).all(axis=1)
            possible = possible[fits]
            if not len(possible):
                break
            best = possible[int(self._lost(possible, before, counts).argmax())]
            counts[best] = before[best]
        return counts

    def uniform(self) -> Counts:
        steps = np.arange(1001) / 1000
        rounded = (self.widths - np.floor(np.outer(steps, self.widths))).astype(np.int64)
        kept = np.minimum(-(-rounded // self.multiple) * self.multiple, self.widths)
        counts = np.minimum(self.widths - kept, self.limits)
        enough = (self._costs(counts) <= self.allowed).all(axis=1)
        if not enough.any():
            raise self._impossible(counts[-1])
        return np.asarray(counts[int(enough.argmax())], dtype=np.int64)

    def _costs(self, counts: Counts) -> NDArray[np.int64]:
        """MACs and parameters, int64 [choices, 2]."""
        return np.stack(self.analysis.predict_costs(counts), axis=1)

    def _lost(self, places: Counts, fewer: Counts, more: Counts) -> NDArray[np.float64]:
        return np.array([self.lost[p][more[p]] - self.lost[p][fewer[p]] for p in places.tolist()])

    def _step_down(self, counts: Counts) -> Counts:
        """Counts with every group one block narrower: widths 16 -> 8, 13 -> 8 for blocks of 8."""
        width = self.widths - counts
        return np.asarray(self.widths - (width - 1) // self.multiple * self.multiple)

    def _step_up(self, counts: Counts) -> Counts:
        width = self.widths - counts
        up = np.minimum((width // self.multiple + 1) * self.multiple, self.widths)
        return np.asarray(self.widths - up)

    def _impossible(self, counts: Counts) -> PruningError:
        tightest = self._costs(counts[np.newaxis])[0] / self.dense
        asked = " and ".join(
            f"{share:.0%} of the {'MACs' if name == 'macs' else 'parameters'}"
            for name, share in self.shares.items()
            if share < 1
        )
        return PruningError(
            f"the budget of {asked} cannot be reached: with widths on multiples of "
            f"{self.multiple} and at least {self.keep_at_least:.0%} of every group kept, "
            f"{tightest[0]:.1%} of the MACs and {tightest[1]:.1%} of the parameters stay; raise "
            "the budget, or lower prune.width_multiple or prune.keep_at_least"
        )


def _each_alone(counts: Counts, places: Counts, changed: Counts) -> NDArray[np.int64]:
    """``counts`` with one place changed in each row, int64 [places, groups]."""
    rows = np.repeat(counts[np.newaxis], len(places), axis=0)
    rows[np.arange(len(places)), places] = changed[places]
    return rows


def widths(analysis: Analysis, removed: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Output width of every layer that can be pruned, after ``removed`` has gone."""
    counts = {name: len(channels) for name, channels in removed.items()}
    return {
        layer.module: layer.out_width
        - sum(counts.get(group, 0) * times for group, times in layer.out_groups.items())
        for layer in analysis.layers
        if layer.out_groups
    }
