"""What may be chosen, widths and blocks, and what each choice keeps and costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from greenprune.pruning.blocks import Block
from greenprune.pruning.graph import Analysis, Group
from greenprune.pruning.pricing import Floats, Ints, Prices, Term, price
from greenprune.pruning.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Points:
    """Choices: widths int64 [n, groups], 0 inside blocks that are gone, bool [n, blocks]."""

    widths: Ints
    gone: NDArray[np.bool_]


class Space:
    """What may be chosen, and what each choice keeps and costs."""

    def __init__(
        self,
        *,
        analysis: Analysis,
        scores: Scores,
        prices: Mapping[str, Prices],
        multiple: int,
        keep_at_least: float,
        whole_widths: Mapping[str, int],
        blocks: Mapping[str, Block],
        block_importance: Mapping[str, float],
    ) -> None:
        self.groups = analysis.groups
        self.prices = prices
        self.multiple, self.keep_at_least = multiple, keep_at_least
        self.places = {group.name: place for place, group in enumerate(self.groups)}
        self.candidates = [
            self._widths(group.channels, whole_widths.get(group.name, group.channels))
            for group in self.groups
        ]
        self.order = [np.argsort(scores[group.name], kind="stable") for group in self.groups]
        self.lost = [
            np.concatenate([[0.0], np.cumsum(scores[group.name][order])])
            for group, order in zip(self.groups, self.order, strict=True)
        ]
        """Score lost with the n lowest channels of each group, float64 [channels + 1]."""
        self.inner = self._inner(blocks)
        """Of each block that may go, the places of the groups inside."""
        self.block_lost = np.array(
            [
                block_importance.get(name, sum(self.lost[place][-1] for place in inner))
                for name, inner in self.inner.items()
            ]
        )
        self.total = float(sum(lost[-1] for lost in self.lost)) + sum(
            max(0.0, own - sum(self.lost[place][-1] for place in inner))
            for own, inner in zip(self.block_lost.tolist(), self.inner.values(), strict=True)
        )
        self.whole = Points(
            widths=np.array([[group.channels for group in self.groups]], dtype=np.int64),
            gone=np.zeros((1, len(self.inner)), dtype=bool),
        )

    def _widths(self, channels: int, whole: int) -> Ints:
        floor = max(1, int(np.ceil(self.keep_at_least * whole)))
        least = -(-floor // self.multiple) * self.multiple
        return np.array([*range(least, channels, self.multiple), channels], dtype=np.int64)

    @cached_property
    def _terms(self) -> list[Term]:
        return [term for prices in self.prices.values() for term in prices.terms]

    def _inner(self, blocks: Mapping[str, Block]) -> dict[str, list[int]]:
        found = {}
        for name, block in blocks.items():
            prefix = f"{name}."
            inner = [
                place
                for place, group in enumerate(self.groups)
                if all(module.startswith(prefix) for module in self._modules[group.name])
            ]
            if inner and self._saves(prefix) == (block.saves.macs, block.saves.params):
                found[name] = inner
        return found

    @cached_property
    def _modules(self) -> dict[str, set[str]]:
        """The layers that write, read or are priced by each group."""
        found = {group.name: _owners(group) for group in self.groups}
        for term in self._terms:
            for name in (*term.in_groups, *term.out_groups):
                found[name].add(term.module)
        return found

    def _saves(self, prefix: str) -> tuple[int, int]:
        """MACs and parameters under the prefix; those shared with others do not go."""
        macs, params = (
            sum(
                int(term.cost(np.array([term.in_width]), np.array([term.out_width]))[0])
                for term in self.prices[quantity].terms
                if term.module.startswith(prefix)
            )
            for quantity in ("macs", "params")
        )
        return macs, params

    @cached_property
    def block_of(self) -> dict[str, int]:
        """The place, in ``inner``, of the block that a layer is in, by the layer's name."""
        return {
            term.module: place
            for place, name in enumerate(self.inner)
            for term in self._terms
            if term.module.startswith(f"{name}.")
        }

    def kept(self, points: Points) -> Floats:
        """Share of all importance that stays, float64 [n]."""
        inside = np.zeros(points.widths.shape)
        for place, lost in enumerate(self.lost):
            width = points.widths[:, place]
            inside[:, place] = np.where(width > 0, lost[len(lost) - 1 - width], 0.0)
        lost_points = inside.sum(axis=1) + points.gone @ self.block_lost
        return np.asarray(1.0 - lost_points / (self.total or 1.0), dtype=np.float64)

    def costs(self, points: Points) -> dict[str, Floats]:
        """Every priced quantity, float64 [n] each."""
        removed = self.whole.widths - points.widths
        found = {}
        for name, prices in self.prices.items():
            found[name] = np.full(len(removed), prices.constant, dtype=np.float64)
            for term in prices.terms:
                block = self.block_of.get(term.module)
                there = np.True_ if block is None else ~points.gone[:, block]
                found[name] += price(
                    term,
                    there * self._side(term.in_width, term.in_groups, removed),
                    there * self._side(term.out_width, term.out_groups, removed),
                )
        return found

    def _side(self, width: int, groups: Mapping[str, int], removed: Ints) -> Ints:
        """A layer's input or output width, int64 [n]."""
        result = np.full(len(removed), width, dtype=np.int64)
        for name, times in groups.items():
            result -= times * removed[:, self.places[name]]
        return result


def _owners(group: Group) -> set[str]:
    modules = {part.module for part in (*group.producers, *group.consumers)}
    return modules | {part.parameter.rpartition(".")[0] for part in group.parameters}
