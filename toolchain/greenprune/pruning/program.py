"""The mixed-integer linear program of widths and blocks, for HiGHS.

A binary says that group g has width w, another that a block goes
with all that is in it. A layer's cost depends on its input and its output width together: the
pairs of widths of two groups get continuous variables whose margins are these binaries (the local
polytope), so that they are whole numbers wherever the binaries are, and any table of costs, convex
or not, is a linear row. The total width of concatenated groups is made of such pairs, two by two.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from greenprune.pruning.choices import Points, Space
from greenprune.pruning.pricing import Floats, Ints, Term, price


@dataclass(frozen=True, kw_only=True)
class _Node:
    """Variables of which exactly one is 1, and the width that each stands for."""

    columns: Ints
    widths: Ints
    """0: a block is gone, and what it is in costs nothing."""


class TooLargeError(Exception):
    """A program with more variables than are solved in seconds."""


class Program:
    """The mixed-integer linear program over a space."""

    def __init__(
        self, space: Space, candidates: Sequence[Ints], limits: Mapping[str, float], size: float
    ) -> None:
        """Of these widths, within these limits.

        Raises:
            TooLargeError: more variables than ``size``.
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
            raise TooLargeError
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

    def solve(self, objective: Floats, gap: float, deadline: float) -> tuple[Points | None, float]:
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

    def _points(self, values: Floats) -> Points:
        chosen = [int(node.widths[values[node.columns].argmax()]) for node in self.groups]
        gone = [bool(values[columns[1]] > 0.5) for columns in self.blocks]
        return Points(widths=np.array([chosen]), gone=np.array([gone], dtype=bool).reshape(1, -1))


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
