"""From gates that mostly agree to the static sub-network that meets the budget."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenprune.errors import PruningError
from greenprune.pruning.gated import Gated

SHORT = 0.02
"""Share of the target that the sub-network may stay below it without getting more."""


def settle(
    gated: Gated, opened: Tensor, probability: Tensor, *, macs: float, width_multiple: int
) -> Tensor:
    """The static gates: bool [gates].

    A block is open where its gate is for at least half of the images, and so is a channel, but for
    the widths' multiple: a group keeps the nearest width, of one multiple at least, and in it the
    channels whose gates are open most often (among equals, most probably). Then the budget is made
    to hold. While the MACs are above the target, the group that loses the least probability for
    what it saves gets one multiple narrower; where none can, the least probable block goes. If
    they are more than 2% of it below, what fits is given back, the most probable channels first.

    Args:
        opened: share of images for which each gate is open, [gates].
        probability: mean probability of each gate, [gates].
        macs: the target, as a share of the dense network's.
        width_multiple: widths that are kept are multiples of this.

    Raises:
        PruningError: the target is out of reach.
    """
    plan = _Plan(gated, probability, macs, width_multiple)
    plan.start(opened)
    plan.lower()
    plan.give_back()
    return plan.gates()


def check_target(gated: Gated, *, macs: float, width_multiple: int) -> None:
    """Refuse a target that not even the narrowest widths without any block would meet.

    Raises:
        PruningError: as it says.
    """
    _Plan(gated, torch.ones(sum(gated.sizes)), macs, width_multiple).check()


class _Plan:
    """Widths of groups and states of blocks, to be found."""

    def __init__(self, gated: Gated, probability: Tensor, target: float, multiple: int) -> None:
        self.gated, self.target, self.multiple = gated, target, multiple
        parts = [part.double().numpy() for part in probability.split(gated.sizes)]
        count = len(gated.groups)
        self.probability, self.blocks = (
            parts[:count],
            np.array([float(p[0]) for p in parts[count:]]),
        )
        self.order = [np.argsort(-part, kind="stable") for part in self.probability]
        self.widths = np.array(gated.sizes[:count])
        self.kept = np.minimum(self.multiple, self.widths)
        self.open = np.zeros(len(self.blocks), dtype=bool)

    def check(self) -> None:
        """Refuse a target below the MACs of the narrowest widths without any block."""
        least = self._share(self.kept[np.newaxis])[0]
        if least > self.target:
            raise PruningError(
                f"a target of {self.target:.1%} of the MACs cannot be reached: with widths on "
                f"multiples of {self.multiple}, {least:.1%} stay at least; raise the target or "
                "lower width_multiple"
            )

    def start(self, opened: Tensor) -> None:
        parts = [part.double().numpy() for part in opened.split(self.gated.sizes)]
        for place, (part, own) in enumerate(zip(parts, self.probability, strict=False)):
            self.order[place] = np.lexsort((-own, -part))
            nearest = round((part >= 0.5).sum() / self.multiple) * self.multiple
            self.kept[place] = min(max(nearest, self.multiple), self.widths[place])
        self.open = np.array([part[0] >= 0.5 for part in parts[len(self.widths) :]], dtype=bool)

    def lower(self) -> None:
        while (share := self._share(self.kept[np.newaxis])[0]) > self.target:
            below = (self.kept - 1) // self.multiple * self.multiple
            saved = share - self._each(below)
            price = np.full(len(below), np.inf)
            for place in np.flatnonzero((below > 0) & (saved > 1e-12)):
                price[place] = self._sum(int(place), below, self.kept) / saved[place]
            best = int(price.argmin())
            if price[best] < np.inf:
                self.kept[best] = below[best]
            elif self.open.any():
                self.open[np.where(self.open, self.blocks, np.inf).argmin()] = False
            else:
                self.check()

    def give_back(self) -> None:
        while (share := self._share(self.kept[np.newaxis])[0]) < (1 - SHORT) * self.target:
            above = np.minimum((self.kept // self.multiple + 1) * self.multiple, self.widths)
            shares = self._each(above)
            gain = np.full(len(above), -1.0)
            for place in np.flatnonzero((shares > share + 1e-12) & (shares <= self.target)):
                more = above[place] - self.kept[place]
                gain[place] = self._sum(int(place), self.kept, above) / more
            best = int(gain.argmax())
            if gain[best] < 0:
                return
            self.kept[best] = above[best]

    def gates(self) -> Tensor:
        parts = []
        for order, kept in zip(self.order, self.kept.tolist(), strict=True):
            part = np.zeros(len(order), dtype=bool)
            part[order[:kept]] = True
            parts.append(part)
        return torch.from_numpy(np.concatenate([*parts, self.open]))

    def _sum(self, place: int, fewer: NDArray[np.int64], more: NDArray[np.int64]) -> float:
        """Probability of the channels between two widths of one group."""
        return float(self.probability[place][self.order[place][fewer[place] : more[place]]].sum())

    def _each(self, changed: NDArray[np.int64]) -> NDArray[np.float64]:
        """Shares of the MACs with each group alone at its changed width."""
        return self._share(np.where(np.eye(len(changed), dtype=bool), changed, self.kept))

    def _share(self, kept: NDArray[np.int64]) -> NDArray[np.float64]:
        """Shares of the MACs for widths [choices, groups]."""
        removed = torch.from_numpy(self.widths - kept).double().unbind(dim=-1)
        ones = torch.ones(len(kept), dtype=torch.float64)
        blocks = [ones * bool(state) for state in self.open]
        return np.asarray(self.gated.macs(removed, blocks).numpy(), dtype=np.float64)
