"""Cutting a network until it is within its budgets, as measured where that can be done.

A limit on latency or energy is held to the whole network as it is measured, and not to the sum of
a table: where the two disagree, the limit that the solver is given moves until the measured network
is within the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from greenprune.errors import BudgetError, PruningError
from greenprune.pruning import budget, limits, optimise, removal, surgery
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.limits import Limit, Quantity
from greenprune.pruning.scores import Scores

MEASURED = ("latency_ms", "energy_mj")
"""Quantities that only a device can tell."""
TRIES = 8
SPARE = 0.05
"""A network measured this much below its limit has given up more than it had to."""
STEP, MOST_STEP = 0.99, 0.4
"""While nothing was within the limit, the next aim is so far below all before it, at least and at
most."""

Price = Callable[[nn.Module, Analysis], Mapping[str, optimise.Prices]]
"""What a network costs at each of its widths, by quantity, beside MACs and parameters."""
Measure = Callable[[nn.Module, nn.Module], Mapping[str, tuple[float, float]]]
"""What two networks need, measured side by side, by quantity."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a network may cost, and how it may get there."""

    limits: tuple[Limit, ...]
    width_multiple: int = 8
    keep_at_least: float = 0.2
    blocks: bool = False
    """Whether residual blocks may go whole."""
    way: float = 1.0
    """How much of the way from the dense network to the limits is to be gone, in (0, 1], on a
    logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A limited quantity of the network that is left, in its unit."""

    value: float
    allowed: float
    dense: float

    @property
    def over(self) -> float:
        """What was measured for what is allowed."""
        return self.value / self.allowed


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What goes, and what it came to."""

    choice: optimise.Choice
    dense: dict[str, float]
    """Each quantity of the dense network, by its prices."""
    goals: dict[str, float]
    """By limited quantity: what the prediction was held to before measuring corrected it."""
    tries: int
    measured: dict[str, Measured] = field(default_factory=dict)
    """By limited quantity; empty where none of them is a device's, or the device is not here."""

    @property
    def over(self) -> float:
        """What was measured for what is allowed, of the quantity that is worst."""
        return max((each.over for each in self.measured.values()), default=0.0)

    @property
    def gone(self) -> tuple[budget.Removed, tuple[str, ...]]:
        """Channels and blocks that go."""
        return self.choice.removed, self.choice.removed_blocks

    def apply(self, network: nn.Module, analysis: Analysis, example_input: Tensor) -> removal.Cut:
        """Cut out what goes."""
        return removal.cut(network, example_input, analysis.groups, *self.gone)


def decide(
    terms: Terms,
    dense: nn.Module,
    network: nn.Module,
    analysis: Analysis,
    scores: Scores,
    example_input: Tensor,
    price: Price = lambda network, analysis: {},
    measure: Measure | None = None,
) -> Decision:
    """Choose the channels and blocks that matter least, so that all limits hold without them.

    Args:
        terms: see there.
        dense: what shares refer to, in eval mode.
        network: that is to be cut, in eval mode: the dense one, or what earlier steps left of it.
        analysis: of ``network``.
        scores: of ``network``.
        example_input: [N, ...].
        price: for limits other than of MACs and parameters.
        measure: of the quantities in ``MEASURED`` that are limited; None: they are held to the
            prediction.

    Raises:
        PruningError: a limit is out of reach, by its prices or as measured.
    """
    prices = price(network, analysis)
    whole_analysis = analyse(dense, example_input)
    whole = _whole(dense, whole_analysis, price)
    goals: dict[str, float] = {
        limit.quantity: _along(terms.way, whole[limit.quantity], limit) for limit in terms.limits
    }
    blocks = surgery.removable_blocks(network, example_input) if terms.blocks else {}
    held = [limit for limit in terms.limits if measure and limit.quantity in MEASURED]
    whole_widths = _whole_widths(whole_analysis, analysis)
    seen: dict[str, list[tuple[float, float]]] = {limit.quantity: [] for limit in held}
    found: list[Decision] = []
    refused: BudgetError | None = None  # by the prices: then what is measured decides

    def chosen(asked: Mapping[Quantity, float]) -> optimise.Choice:
        return optimise.choose(
            analysis,
            scores,
            [Limit(quantity=name, value=most) for name, most in asked.items()],
            prices=prices,
            width_multiple=terms.width_multiple,
            keep_at_least=terms.keep_at_least,
            whole_widths=whole_widths,
            blocks=blocks,
        )

    for tries in range(1, TRIES + 1):
        asked: dict[Quantity, float] = {
            limit.quantity: max(
                goals[limit.quantity] * _aim(seen.get(limit.quantity, [])),
                refused.smallest[limit.quantity] if refused and limit in held else 0.0,
            )
            for limit in terms.limits
        }
        try:
            choice = chosen(asked)
        except PruningError as error:
            if refused is None and held and isinstance(error, BudgetError):
                refused = error  # the least that the prices know is measured all the same
                continue
            if found:
                break  # the next aim asks for more than can be had
            if refused is not None:
                raise refused from error
            raise
        decided = Decision(choice=choice, dense=whole, goals=goals, tries=tries)
        same = next((each for each in found if each.gone == decided.gone), None)
        if same is not None:
            others = {name: most for name, most in asked.items() if name not in seen}
            if refused or same.choice.importance_kept >= chosen(others).importance_kept:
                break  # nothing lies below it, or a limit that is not measured holds it down
            # what is next lies beyond the aim for the quantity that it is nearest to
            nearest = max(
                (limit.quantity for limit in held),
                key=lambda name: choice.predicted[name] / asked[name],
            )
            at = asked[nearest] / goals[nearest]
            seen[nearest].append((at, same.measured[nearest].over))
            continue
        if measure is None or not held:
            return decided
        told = measure(dense, decided.apply(network, analysis, example_input).network)
        decided = replace(decided, measured=_as_measured(told, held, terms.way))
        found.append(decided)
        untouched = not (choice.removed or choice.removed_blocks)
        if 1 - SPARE <= decided.over <= 1 or (decided.over < 1 and untouched):
            break
        for quantity, each in decided.measured.items():
            seen[quantity].append((choice.predicted[quantity] / goals[quantity], each.over))
    return _best(found, terms)


def _as_measured(
    told: Mapping[str, tuple[float, float]], held: list[Limit], way: float
) -> dict[str, Measured]:
    """Of the dense network and of what is left, as they were measured side by side."""
    return {
        limit.quantity: Measured(
            value=told[limit.quantity][1],
            allowed=_along(way, told[limit.quantity][0], limit),
            dense=told[limit.quantity][0],
        )
        for limit in held
    }


def _aim(seen: list[tuple[float, float]]) -> float:
    """What to multiply the limit by that the prediction is held to.

    Args:
        seen: of each choice so far, predicted over the limit and measured over the allowed; one is
            taken to be a straight line of the other: through the nearest on both sides of 1, else
            through the two nearest, else through the origin.
    """
    if not seen:
        return 1.0
    wanted = 1 - SPARE / 2
    below = max((each for each in seen if each[1] <= 1), default=None)
    above = min((each for each in seen if each[1] > 1), default=None)
    if below and above and below[0] >= above[0]:
        below = None  # they disagree, which is noise: down from all of them
    x, y = seen[-1]
    nearest = sorted(set(seen))[-2:] if below else sorted(set(seen))[:2]
    if below and above:
        nearest = [below, above]
    aim = x * wanted / y
    if len(nearest) == 2:
        (low, under), (high, over) = nearest
        if high > low and over > under:
            aim = low + (high - low) * (wanted - under) / (over - under)
    if below and above and not below[0] < aim < above[0]:
        aim = (below[0] + above[0]) / 2
    if not below:
        aim = min(aim, STEP * min(each[0] for each in seen))
    return max(aim, MOST_STEP * min(each[0] for each in seen))


def _whole_widths(dense: Analysis, analysis: Analysis) -> dict[str, int]:
    """Group name to how many channels it had in the dense network."""
    whole = {part.module: group.channels for group in dense.groups for part in group.producers}
    return {
        group.name: whole.get(group.producers[0].module, group.channels)
        for group in analysis.groups
    }


def _best(found: list[Decision], terms: Terms) -> Decision:
    """The choice that keeps most, of those that were measured within their limits."""
    within = [each for each in found if each.over <= 1]
    if within:
        return max(within, key=lambda each: each.choice.importance_kept)
    nearest = min(found, key=lambda each: each.over)
    asked = ", ".join(str(limit) for limit in terms.limits)
    told = ", ".join(
        f"{name} {each.value:.3g} where {each.allowed:.3g} are allowed (dense: {each.dense:.3g})"
        for name, each in nearest.measured.items()
    )
    choices = "one choice was" if len(found) == 1 else f"{len(found)} choices were"
    raise PruningError(
        f"budget {asked}: {choices} measured, the nearest at {told}; raise the budget, or lower "
        "prune.keep_at_least"
    )


def check_reachable(
    terms: Terms,
    network: nn.Module,
    analysis: Analysis,
    example_input: Tensor,
    prices: Mapping[str, optimise.Prices],
    shown: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> None:
    """Whether limits can be reached follows from structure and prices; unpriced ones are left out.

    Args:
        terms: see there.
        network: the dense one, in eval mode.
        analysis: of it.
        example_input: [N, ...].
        prices: of measured quantities.
        shown: by quantity, what the dense network and a narrow one have been measured at, whatever
            the prices say.

    Raises:
        PruningError: they cannot; the smallest values that can be reached are named.
    """
    known = {"macs", "params", *prices}
    open_to_doubt = [
        limit
        for limit in terms.limits
        if limit.quantity in known and not _is_shown(limit, shown.get(limit.quantity))
    ]
    optimise.choose(
        analysis,
        {group.name: np.ones(group.channels) for group in analysis.groups},
        open_to_doubt,
        prices=prices,
        width_multiple=terms.width_multiple,
        keep_at_least=terms.keep_at_least,
        blocks=surgery.removable_blocks(network, example_input) if terms.blocks else {},
    )


def _is_shown(limit: Limit, measured: tuple[float, float] | None) -> bool:
    return measured is not None and measured[1] <= limits.allowed(limit, measured[0])


def described(decided: Decision) -> dict[str, Any]:
    """A step towards a budget, as plain data."""
    choice = decided.choice
    return {
        "importance_kept": choice.importance_kept,
        "removed_blocks": list(choice.removed_blocks),
        "gap": choice.gap,
        "tries": decided.tries,
        "quantities": {
            name: {"dense": decided.dense[name], "goal": goal, "predicted": choice.predicted[name]}
            for name, goal in decided.goals.items()
        },
        "measured": {
            name: {"dense": each.dense, "allowed": each.allowed, "measured": each.value}
            for name, each in decided.measured.items()
        },
    }


def _along(way: float, dense: float, limit: Limit) -> float:
    """Between the dense network's value and what the limit allows."""
    return float(dense ** (1 - way) * limits.allowed(limit, dense) ** way)


def _whole(dense: nn.Module, analysis: Analysis, price: Price) -> dict[str, float]:
    prices = {**optimise.exact_prices(analysis), **price(dense, analysis)}
    return {name: _total(each) for name, each in prices.items()}


def _total(prices: optimise.Prices) -> float:
    each = (
        term.cost(np.array([term.in_width]), np.array([term.out_width])) for term in prices.terms
    )
    return prices.constant + float(sum(cost[0] for cost in each))
