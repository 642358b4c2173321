"""The widths, and the blocks, that keep the most importance within budgets: exactly, by HiGHS.

A mixed-integer linear program: a binary says that group g has width w, another that a block goes
with all that is in it. A layer's cost depends on its input and its output width together: the
pairs of widths of two groups get continuous variables whose margins are these binaries (the local
polytope), so that they are whole numbers wherever the binaries are, and any table of costs, convex
or not, is a linear row. The total width of concatenated groups is made of such pairs, two by two.
What is lost with a width, or with a block, is the sum of the scores that go (our reading: a block
whose branch vanishes loses what its own groups' channels score; ``block_importance`` overrides it).
Depth and width are chosen in one program.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import PruningError
from greenprune.pruning.blocks import Block
from greenprune.pruning.budget import Removed
from greenprune.pruning.graph import Analysis, Group
from greenprune.pruning.limits import Limit, allowed
from greenprune.pruning.scores import Scores

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
CostFunction = Callable[[Ints, Ints], Floats]
"""Costs of a layer, float64 [n], at input and at output widths, int64 [n] each, all above 0."""

MOST_VARIABLES = 100_000
"""Of a program that is to be solved in seconds."""


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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What goes, and what the network then is."""

    removed: Removed
    """Groups of removed blocks are left out."""
    removed_blocks: tuple[str, ...]
    importance_kept: float
    """Share of all importance, in [0, 1]."""
    predicted: dict[str, float]
    """Each priced quantity, in its unit, by its prices alone (not by the solver's model)."""
    dense: dict[str, float]
    """The same of the whole network."""
    gap: float
    """No choice keeps more than (1 + gap) times ``importance_kept``: proven."""
    seconds: float


def choose(
    analysis: Analysis,
    scores: Scores,
    limits: Sequence[Limit],
    *,
    prices: Mapping[str, Prices] | None = None,
    width_multiple: int = 8,
    keep_at_least: float = 0.2,
    blocks: Mapping[str, Block] | None = None,
    block_importance: Mapping[str, float] | None = None,
    gap: float = 1e-4,
    seconds: float = 60.0,
) -> Choice:
    """Choose every group's width, and the blocks that go, within all limits.

    The channels with the lowest scores of a group go first. Channels that score zero go where
    that costs nothing.

    Args:
        analysis: the network's groups.
        scores: one score for each channel of each group.
        limits: of macs, params and the quantities in ``prices``.
        prices: of measured quantities, by name, in the limits' units.
        width_multiple: widths that are kept are multiples of this, or whole.
        keep_at_least: share of its channels that each group keeps, unless its block goes.
        blocks: those that may go, as
            :func:`greenprune.pruning.blocks.removable_blocks` finds them. Blocks without a group
            that is wholly inside, and whose cost the analysis does not account for, stay.
        block_importance: what is lost with a block, in the scores' unit; for those left out, the
            sum of the scores of the groups inside.
        gap: the solver may stop when it has proven so much.
        seconds: the solver stops after this time; the best choice found counts.

    Raises:
        PruningError: the limits cannot be met (the message names the smallest values that can), a
            limit of an unpriced quantity, a price that is not finite; none found in the time.
    """
    started = time.monotonic()
    priced = {**exact_prices(analysis), **(prices or {})}
    for limit in limits:
        if limit.quantity not in priced:
            raise PruningError(
                f"budget '{limit}': expected a quantity that is priced ({', '.join(priced)}), got "
                f"{limit.quantity}; give its prices, made from a cost table of the target"
            )
    space = _Space(
        analysis=analysis,
        scores=scores,
        prices=priced,
        multiple=width_multiple,
        keep_at_least=keep_at_least,
        blocks=blocks or {},
        block_importance=block_importance or {},
    )
    dense = {name: float(values[0]) for name, values in space.costs(space.whole).items()}
    most: dict[str, float] = {
        limit.quantity: allowed(limit, dense[limit.quantity]) for limit in limits
    }
    found, bound = _search(space, most, gap, started + seconds)
    if found is None:
        raise _unreachable(space, limits, most, dense, seconds)
    kept = float(space.kept(found)[0])
    widths, gone = found.widths[0], found.gone[0]
    return Choice(
        removed={
            group.name: tuple(np.sort(space.order[place][: group.channels - width]).tolist())
            for place, (group, width) in enumerate(
                zip(analysis.groups, widths.tolist(), strict=True)
            )
            if 0 < width < group.channels
        },
        removed_blocks=tuple(
            name for name, state in zip(space.inner, gone.tolist(), strict=True) if state
        ),
        importance_kept=kept,
        predicted={name: float(values[0]) for name, values in space.costs(found).items()},
        dense=dense,
        gap=max(0.0, bound - kept) / max(kept, 1e-12),
        seconds=time.monotonic() - started,
    )


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


@dataclass(frozen=True, kw_only=True)
class _Points:
    """Choices: widths int64 [n, groups], 0 inside blocks that are gone, bool [n, blocks]."""

    widths: Ints
    gone: NDArray[np.bool_]


class _Space:
    """What may be chosen, and what each choice keeps and costs."""

    def __init__(
        self,
        *,
        analysis: Analysis,
        scores: Scores,
        prices: Mapping[str, Prices],
        multiple: int,
        keep_at_least: float,
        blocks: Mapping[str, Block],
        block_importance: Mapping[str, float],
    ) -> None:
        self.groups = analysis.groups
        self.prices = prices
        self.multiple, self.keep_at_least = multiple, keep_at_least
        self.places = {group.name: place for place, group in enumerate(self.groups)}
        self.candidates = [self._widths(group.channels) for group in self.groups]
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
        self.whole = _Points(
            widths=np.array([[group.channels for group in self.groups]], dtype=np.int64),
            gone=np.zeros((1, len(self.inner)), dtype=bool),
        )

    def _widths(self, channels: int) -> Ints:
        floor = max(1, int(np.ceil(self.keep_at_least * channels)))
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

    def kept(self, points: _Points) -> Floats:
        """Share of all importance that stays, float64 [n]."""
        inside = np.zeros(points.widths.shape)
        for place, lost in enumerate(self.lost):
            width = points.widths[:, place]
            inside[:, place] = np.where(width > 0, lost[len(lost) - 1 - width], 0.0)
        lost_points = inside.sum(axis=1) + points.gone @ self.block_lost
        return np.asarray(1.0 - lost_points / (self.total or 1.0), dtype=np.float64)

    def costs(self, points: _Points) -> dict[str, Floats]:
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


@dataclass(frozen=True, kw_only=True)
class _Node:
    """Variables of which exactly one is 1, and the width that each stands for."""

    columns: Ints
    widths: Ints
    """0: a block is gone, and what it is in costs nothing."""


class _TooLargeError(Exception):
    """A program with more variables than are solved in seconds."""


class _Program:
    """The mixed-integer linear program over a space."""

    def __init__(
        self, space: _Space, candidates: Sequence[Ints], limits: Mapping[str, float], size: float
    ) -> None:
        """Of these widths, within these limits.

        Raises:
            _TooLargeError: more variables than ``size``.
        """
        self.space, self.candidates, self.size = space, candidates, size
        self.binary: list[bool] = []
        self.rows: list[tuple[Ints, Floats, float, float]] = []
        self.totals: dict[tuple[tuple[int, int], ...], _Node] = {}
        self.pairs: dict[tuple[bytes, bytes], Ints] = {}
        self.copies: dict[tuple[bytes, int], Ints] = {}
        self.one = self.variables(1, binary=True)
        self.row(self.one, [1.0], 1.0, 1.0)
        self.blocks = [self.variables(2, binary=True) for _ in space.inner]
        """Of each block: it stays, it is gone."""
        block_of = {place: b for b, inner in enumerate(space.inner.values()) for place in inner}
        self.groups = []
        for place, widths in enumerate(candidates):
            columns = self.variables(len(widths), binary=True)
            if place in block_of:
                columns = np.append(columns, self.blocks[block_of[place]][1])
                widths = np.append(widths, 0)
            self.groups.append(_Node(columns=columns, widths=widths))
        for columns in (*self.blocks, *(node.columns for node in self.groups)):
            self.row(columns, np.ones(len(columns)), 1.0, 1.0)
        for name, most in limits.items():
            self.limit(name, most)

    def limit(self, name: str, most: float) -> None:
        """Hold a quantity to ``most``, within a billionth of it: HiGHS allows a row 1e-6."""
        columns, costs = self.cost(name)
        spare = most - self.space.prices[name].constant
        self.row(columns, costs * (1e3 / most), -np.inf, spare * (1e3 / most))

    def variables(self, count: int, *, binary: bool) -> Ints:
        first = len(self.binary)
        if first + count > self.size:
            raise _TooLargeError
        self.binary += [binary] * count
        return np.arange(first, first + count)

    def row(
        self, columns: Ints, factors: Sequence[float] | Floats, low: float, high: float
    ) -> None:
        self.rows.append((columns, np.asarray(factors, dtype=np.float64), low, high))

    def pair(self, first: Ints, second: Ints) -> Ints:
        """Variables [first, second] that are 1 where both are: their margins are the two."""
        if len(first) == 1:
            return second[np.newaxis]
        if len(second) == 1:
            return first[:, np.newaxis]
        if first[0] > second[0]:
            return self.pair(second, first).T
        key = first.tobytes(), second.tobytes()
        if key not in self.pairs:
            grid = self.variables(len(first) * len(second), binary=False)
            self.pairs[key] = grid = grid.reshape(len(first), len(second))
            for lines, margin in ((grid, first), (grid.T, second)):
                for line, column in zip(lines, margin.tolist(), strict=True):
                    self.row(np.append(line, column), [*[1.0] * len(line), -1.0], 0.0, 0.0)
        return self.pairs[key]

    def total(self, parts: tuple[tuple[int, int], ...]) -> _Node:
        """The sum of the groups' widths, each so many times: two by two."""
        place, times = parts[-1]
        last = self.groups[place]
        last = _Node(columns=last.columns, widths=last.widths * times)
        if len(parts) == 1:
            return last
        if parts not in self.totals:
            before = self.total(parts[:-1])
            grid = self.pair(before.columns, last.columns)
            sums = before.widths[:, np.newaxis] + last.widths
            widths = np.unique(sums)
            columns = self.variables(len(widths), binary=False)
            for column, width in zip(columns.tolist(), widths.tolist(), strict=True):
                line = grid[sums == width]
                self.row(np.append(line, column), [*[1.0] * len(line), -1.0], 0.0, 0.0)
            self.totals[parts] = _Node(columns=columns, widths=widths)
        return self.totals[parts]

    def side(self, width: int, groups: Mapping[str, int]) -> _Node:
        """The input or the output width of a layer."""
        places = self.space.places
        parts = tuple(sorted((places[name], times) for name, times in groups.items()))
        fixed = width - sum(self.space.groups[place].channels * times for place, times in parts)
        if not parts:
            return _Node(columns=self.one, widths=np.array([width]))
        node = self.total(parts)
        gone = node.widths == 0
        return _Node(columns=node.columns, widths=np.where(gone, 0, node.widths + fixed))

    def inside(self, node: _Node, block: int) -> _Node:
        """The same node, but 0 where the block is gone: each variable times "it stays"."""
        stays, gone = self.blocks[block].tolist()
        key = node.columns.tobytes(), block
        if len(node.columns) == 1:
            self.copies[key] = np.array([stays])
        elif key not in self.copies:
            self.copies[key] = self.variables(len(node.columns), binary=False)
            for copied, column in zip(self.copies[key], node.columns, strict=True):
                self.row(np.array([copied, column]), [1.0, -1.0], -np.inf, 0.0)
            self.row(np.append(self.copies[key], stays), [*[1.0] * len(node.columns), -1.0], 0, 0)
        return _Node(columns=np.append(self.copies[key], gone), widths=np.append(node.widths, 0))

    def term(self, term: Term) -> tuple[Ints, Floats]:
        """Variables and what each of them costs."""
        ins = self.side(term.in_width, term.in_groups)
        outs = self.side(term.out_width, term.out_groups)
        same = np.array_equal(ins.columns, outs.columns)
        block = self.space.block_of.get(term.module)
        if block is not None and (ins.widths > 0).all() and (outs.widths > 0).all():
            if same:
                ins, outs = self.inside(ins, block), self.inside(outs, block)
            elif len(ins.columns) < len(outs.columns):
                ins = self.inside(ins, block)
            else:
                outs = self.inside(outs, block)
        if same:
            return ins.columns, price(term, ins.widths, outs.widths)
        columns = self.pair(ins.columns, outs.columns)
        grid = np.meshgrid(ins.widths, outs.widths, indexing="ij")
        return columns.ravel(), price(term, grid[0].ravel(), grid[1].ravel())

    def cost(self, name: str) -> tuple[Ints, Floats]:
        """All terms together: variables and what each of them costs, without the constant."""
        parts = [self.term(term) for term in self.space.prices[name].terms]
        columns = np.concatenate([self.one, *(columns for columns, _ in parts)])
        costs = np.zeros(len(self.binary))
        np.add.at(costs, columns, np.concatenate([[0.0], *(costs for _, costs in parts)]))
        used = np.flatnonzero(costs).astype(np.int64)
        return used, costs[used]

    def lost(self) -> Floats:
        """Share of the importance that is lost with each variable."""
        found = np.zeros(len(self.binary))
        for lost, node, widths in zip(self.space.lost, self.groups, self.candidates, strict=True):
            found[node.columns[: len(widths)]] = lost[len(lost) - 1 - widths]
        for columns, own in zip(self.blocks, self.space.block_lost.tolist(), strict=True):
            found[columns[1]] = own
        return found / (self.space.total or 1.0)

    def solve(self, objective: Floats, gap: float, deadline: float) -> tuple[_Points | None, float]:
        """Minimise.

        Returns:
            The best choice found in the time, and the proven lower bound: infinity where there is
            no choice.
        """
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import csr_array

        sizes = [len(columns) for columns, *_ in self.rows]
        matrix = csr_array(
            (
                np.concatenate([factors for _, factors, *_ in self.rows]),
                np.concatenate([columns for columns, *_ in self.rows]),
                np.concatenate([[0], np.cumsum(sizes)]),
            ),
            shape=(len(self.rows), len(self.binary)),
        )
        low, high = (np.array([row[side] for row in self.rows]) for side in (2, 3))
        with stdout_to_stderr():
            result: Any = milp(
                np.append(objective, np.zeros(len(self.binary) - len(objective))),
                integrality=np.array(self.binary, dtype=np.int64),
                bounds=(0.0, 1.0),
                constraints=LinearConstraint(matrix, low, high),
                options={"mip_rel_gap": gap, "time_limit": max(0.1, deadline - time.monotonic())},
            )
        if result.x is None:
            return None, -np.inf if result.status == 1 else np.inf  # 1: out of time
        return self._points(result.x), float(result.mip_dual_bound)

    def _points(self, values: Floats) -> _Points:
        chosen = [int(node.widths[values[node.columns].argmax()]) for node in self.groups]
        gone = [bool(values[columns[1]] > 0.5) for columns in self.blocks]
        return _Points(widths=np.array([chosen]), gone=np.array([gone], dtype=bool).reshape(1, -1))


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What C code of this process prints inside goes to stderr.

    HiGHS prints a line of its own, whatever its options say (ERGO-Code/HiGHS issue 2783), and the
    commands promise nothing but JSON on stdout.
    """
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)


def _search(
    space: _Space, limits: Mapping[str, float], gap: float, deadline: float
) -> tuple[_Points | None, float]:
    """The best choice within the limits, and the most importance that any keeps, as proven.

    Where all widths are too many, every second, fourth, ... comes first, and what lies around the
    best of them after it; then nothing is proven but that no choice keeps more than all.
    """
    program, step = _program(space, limits)
    found, lost = _within(program, limits, gap, deadline)
    most = 1.0 - lost if step == 1 else 1.0
    while step > 1 and found is not None:
        step //= 2
        near = [
            candidates[_around(candidates, width, step)] if width else program.candidates[place]
            for place, (candidates, width) in enumerate(
                zip(space.candidates, found.widths[0].tolist(), strict=True)
            )
        ]
        program = _Program(space, near, limits, np.inf)
        finer, _ = _within(program, limits, gap, deadline)
        if finer is not None and space.kept(finer)[0] > space.kept(found)[0]:
            found = finer
    if found is None and lost < np.inf:  # out of time: from the narrowest up
        widths = np.array([[candidates[0] for candidates in space.candidates]])
        found = _Points(widths=widths, gone=space.whole.gone)
        found = found if _fits(space, found, limits).all() else None
    return found if found is None else _polished(space, found, limits), most


def _program(space: _Space, limits: Mapping[str, float]) -> tuple[_Program, int]:
    """Of every width or, as said, of every ``step``-th."""
    step = 1
    while True:
        candidates = [np.unique([*widths[::step], widths[-1]]) for widths in space.candidates]
        try:
            return _Program(space, candidates, limits, MOST_VARIABLES), step
        except _TooLargeError:
            if max(map(len, candidates)) <= 2:
                return _Program(space, candidates, limits, np.inf), step
            step *= 2


def _around(candidates: Ints, width: int, step: int) -> Ints:
    """Places: two steps down and up from a width."""
    places = np.searchsorted(candidates, width) + step * np.arange(-2, 3)
    return np.unique(np.clip(places, 0, len(candidates) - 1))


def _within(
    program: _Program, limits: Mapping[str, float], gap: float, deadline: float
) -> tuple[_Points | None, float]:
    """The choice that loses the least, and the proven least that is lost.

    The solver may overstep a limit by its tolerance: then the limit is drawn in, and it runs again.
    """
    found, least = program.solve(program.lost(), gap, deadline)
    for tries in range(1, 6):
        if found is None or _fits(program.space, found, limits).all():
            break
        for name, most in limits.items():
            program.limit(name, most * (1 - 2e-9 * 10**tries))
        found, _ = program.solve(program.lost(), gap, deadline)
    if found is not None and not _fits(program.space, found, limits).all():
        found = None
    return found, least


def _fits(space: _Space, points: _Points, limits: Mapping[str, float]) -> NDArray[np.bool_]:
    costs = space.costs(points)
    fits = np.ones(len(points.widths), dtype=bool)
    for name, most in limits.items():
        fits &= costs[name] <= most
    return fits


def _polished(space: _Space, found: _Points, limits: Mapping[str, float]) -> _Points:
    """The best that one group after the other can do.

    A group gets another width where more is kept within the limits, or as much is kept and no
    quantity is higher: so channels that score zero go, though nothing asks for it.
    """
    moves = [(place, w) for place, widths in enumerate(space.candidates) for w in widths]
    places, widths = np.array(moves, dtype=np.int64).reshape(-1, 2).T
    while True:
        there = found.widths[0, places] > 0
        rows = np.repeat(found.widths, int(there.sum()), axis=0)
        rows[np.arange(len(rows)), places[there]] = widths[there]
        points = _Points(widths=rows, gone=np.repeat(found.gone, len(rows), axis=0))
        costs, now = space.costs(points), space.costs(found)
        gain = space.kept(points) - space.kept(found)
        fits = np.all([costs[name] <= limits.get(name, np.inf) for name in costs], axis=0)
        cheaper = np.all([costs[name] <= now[name] for name in costs], axis=0)
        narrower = rows.sum(axis=1) < found.widths.sum()
        better = fits & (gain > 1e-12)
        same = cheaper & narrower & (gain >= -1e-15)
        if not (better | same).any():
            return found
        worth = np.where(better, gain, np.where(same, 0.0, -1.0))
        best = np.lexsort((rows.sum(axis=1), -worth))[0]
        found = _Points(widths=rows[[best]], gone=found.gone)


def _unreachable(
    space: _Space,
    limits: Sequence[Limit],
    most: Mapping[str, float],
    dense: Mapping[str, float],
    seconds: float,
) -> PruningError:
    """The error for limits that no choice meets: it names the smallest value of each quantity."""
    said, alone = [], True
    program, _ = _program(space, {})
    for limit in limits:
        columns, costs = program.cost(limit.quantity)
        objective = np.zeros(len(program.binary))
        objective[columns] = costs / dense[limit.quantity]
        found, _ = program.solve(objective, 1e-6, time.monotonic() + seconds)
        if found is None:
            return PruningError(f"no choice was found in {seconds:g} s; give the solver more time")
        least = float(space.costs(found)[limit.quantity][0])
        alone = alone and least <= most[limit.quantity]
        said.append(
            f"the smallest {limit.quantity} that can be reached is {least:.7g} "
            f"({least / dense[limit.quantity]:.1%} of the dense), '{limit}' allows "
            f"{most[limit.quantity]:.7g}"
        )
    gone = f"any of {len(space.inner)} blocks may go" if space.inner else "no block may go"
    return PruningError(
        f"no choice within the budget was found: where widths are multiples of {space.multiple}, "
        f"at least {space.keep_at_least:.0%} of every group is kept and {gone}, "
        f"{'; '.join(said)}{'; each can be met alone, not all at once' if alone else ''}. Raise "
        "the budget, lower prune.width_multiple or prune.keep_at_least"
        + ("" if space.inner else ", or allow blocks to go")
    )
