"""The widths, and the blocks, that keep the most importance within budgets: exactly, by HiGHS.

What is lost with a width, or with a block, is the sum of the scores that go (our reading: a block
whose branch vanishes loses what its own groups' channels score; ``block_importance`` overrides it).
Depth and width are chosen in one program (:mod:`greenprune.pruning.program`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import BudgetError, PruningError
from greenprune.pruning.blocks import Block
from greenprune.pruning.budget import Removed
from greenprune.pruning.choices import Points, Space
from greenprune.pruning.graph import Analysis
from greenprune.pruning.limits import Limit, allowed
from greenprune.pruning.pricing import CostFunction, Floats, Ints, Prices, Term, exact_prices
from greenprune.pruning.program import Program, TooLargeError
from greenprune.pruning.scores import Scores

__all__ = ["Choice", "CostFunction", "Floats", "Ints", "Prices", "Term", "choose", "exact_prices"]

MOST_VARIABLES = 100_000
"""Of a program that is to be solved in seconds."""
ROUNDING = 1e-9
"""A limit may be passed by this share of it: sums of the same costs differ by their order."""


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
    whole_widths: Mapping[str, int] | None = None,
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
        whole_widths: group name to the width that this is a share of, where channels went before;
            None: as they are.
        blocks: those that may go, as
            :func:`greenprune.pruning.blocks.removable_blocks` finds them. Blocks without a group
            that is wholly inside, and whose cost the analysis does not account for, stay.
        block_importance: what is lost with a block, in the scores' unit; for those left out, the
            sum of the scores of the groups inside.
        gap: the solver may stop when it has proven so much.
        seconds: the solver stops after this time; the best choice found counts.

    Raises:
        BudgetError: the limits cannot be met; it names the smallest values that can.
        PruningError: a limit of an unpriced quantity, a price that is not finite; none found in the
            time.
    """
    started = time.monotonic()
    priced = {**exact_prices(analysis), **(prices or {})}
    for limit in limits:
        if limit.quantity not in priced:
            raise PruningError(
                f"budget '{limit}': expected a quantity that is priced ({', '.join(priced)}), got "
                f"{limit.quantity}; give its prices, made from a cost table of the target"
            )
    space = Space(
        analysis=analysis,
        scores=scores,
        prices=priced,
        multiple=width_multiple,
        keep_at_least=keep_at_least,
        whole_widths=whole_widths or {},
        blocks=blocks or {},
        block_importance=block_importance or {},
    )
    dense = {name: float(values[0]) for name, values in space.costs(space.whole).items()}
    most: dict[str, float] = {
        limit.quantity: allowed(limit, dense[limit.quantity]) * (1 + ROUNDING) for limit in limits
    }
    found, bound = _search(space, most, gap, started + seconds)
    if found is None:
        cheapest = {name: _cheapest(space, name, dense[name], seconds) for name in most}
        # a limit at the very edge of what can be reached: the solver steps over it, by rounding
        found = next((each for each in cheapest.values() if _fits(space, each, most).all()), None)
        bound = 1.0
        if found is None:
            raise _unreachable(space, limits, most, dense, cheapest)
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


def _search(
    space: Space, limits: Mapping[str, float], gap: float, deadline: float
) -> tuple[Points | None, float]:
    """The best choice within the limits, and the most importance that any keeps, as proven.

    Where all widths are too many, every second, fourth, ... comes first, in half the time, and what
    lies around the best of them after it; then nothing is proven but that none keeps more than all.
    """
    program, step = _program(space, limits)
    first = deadline if step == 1 else (time.monotonic() + deadline) / 2
    found, lost = _within(program, limits, gap, first)
    # out of time, the solver has proven nothing
    most = min(1.0, 1.0 - lost) if step == 1 else 1.0
    while step > 1 and found is not None:
        step //= 2
        near = [
            candidates[_around(candidates, width, step)] if width else program.candidates[place]
            for place, (candidates, width) in enumerate(
                zip(space.candidates, found.widths[0].tolist(), strict=True)
            )
        ]
        program = Program(space, near, limits, np.inf)
        finer, _ = _within(program, limits, gap, deadline)
        if finer is not None and space.kept(finer)[0] > space.kept(found)[0]:
            found = finer
    if found is None and lost < np.inf:  # out of time: from the narrowest up
        widths = np.array([[candidates[0] for candidates in space.candidates]])
        found = Points(widths=widths, gone=space.whole.gone)
        found = found if _fits(space, found, limits).all() else None
    return found if found is None else _polished(space, found, limits), most


def _program(space: Space, limits: Mapping[str, float]) -> tuple[Program, int]:
    """Of every width or, as said, of every ``step``-th, the narrowest and the whole one."""
    step = 1
    while True:
        candidates = [
            np.unique([widths[0], *widths[widths % (step * space.multiple) == 0], widths[-1]])
            for widths in space.candidates
        ]
        try:
            size = MOST_VARIABLES if step == 1 else MOST_VARIABLES // 4  # there is more to do
            return Program(space, candidates, limits, size), step
        except TooLargeError:
            if max(map(len, candidates)) <= 2:
                return Program(space, candidates, limits, np.inf), step
            step *= 2


def _around(candidates: Ints, width: int, step: int) -> Ints:
    """Places: two steps down and up from a width."""
    places = np.searchsorted(candidates, width) + step * np.arange(-2, 3)
    return np.unique(np.clip(places, 0, len(candidates) - 1))


def _within(
    program: Program, limits: Mapping[str, float], gap: float, deadline: float
) -> tuple[Points | None, float]:
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


def _fits(space: Space, points: Points, limits: Mapping[str, float]) -> NDArray[np.bool_]:
    costs = space.costs(points)
    fits = np.ones(len(points.widths), dtype=bool)
    for name, most in limits.items():
        fits &= costs[name] <= most
    return fits


def _polished(space: Space, found: Points, limits: Mapping[str, float]) -> Points:
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
        points = Points(widths=rows, gone=np.repeat(found.gone, len(rows), axis=0))
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
        found = Points(widths=rows[[best]], gone=found.gone)


def _cheapest(space: Space, name: str, dense: float, seconds: float) -> Points:
    """The choice that costs least in one quantity.

    Raises:
        PruningError: none was found in the time.
    """
    program, _ = _program(space, {name: 2 * dense})
    columns, costs = program.cost(name)
    objective = np.zeros(len(program.binary))
    objective[columns] = costs / dense
    found, _ = program.solve(objective, 1e-9, time.monotonic() + seconds)
    if found is None:
        raise PruningError(f"no choice was found in {seconds:g} s; give the solver more time")
    return found


def _unreachable(
    space: Space,
    limits: Sequence[Limit],
    most: Mapping[str, float],
    dense: Mapping[str, float],
    cheapest: Mapping[str, Points],
) -> BudgetError:
    """The error for limits that no choice meets: it names the smallest value of each quantity."""
    said, alone = [], True
    smallest = {name: float(space.costs(each)[name][0]) for name, each in cheapest.items()}
    for limit in limits:
        least = smallest[limit.quantity]
        alone = alone and least <= most[limit.quantity]
        said.append(
            f"the smallest {limit.quantity} that can be reached is {least:.7g} "
            f"({least / dense[limit.quantity]:.1%} of the dense), '{limit}' allows "
            f"{most[limit.quantity]:.7g}"
        )
    gone = f"any of {len(space.inner)} blocks may go" if space.inner else "no block may go"
    return BudgetError(
        f"no choice within the budget was found: where widths are multiples of {space.multiple}, "
        f"at least {space.keep_at_least:.0%} of every group is kept and {gone}, "
        f"{'; '.join(said)}{'; each can be met alone, not all at once' if alone else ''}. Raise "
        "the budget, lower prune.width_multiple or prune.keep_at_least"
        + ("" if space.inner else ", or allow blocks to go"),
        smallest,
    )
