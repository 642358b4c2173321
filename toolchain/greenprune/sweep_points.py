"""The points of a sweep: their names, and the recipe of each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from greenprune import api
from greenprune.errors import RecipeError
from greenprune.pruning.limits import Limit, parse_all
from greenprune.recipe import Recipe
from greenprune.registry import load_target
from greenprune.sweep_record import Point

BASE = "base"
"""The run that all points take their training from."""


def plan(
    recipe: str | Path | None,
    budgets: Sequence[Sequence[str]],
    targets: Sequence[str],
    *,
    mild: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> list[tuple[Point, Recipe]]:
    """Every pair of a target and a set of budgets, with its recipe, checked.

    Raises:
        RecipeError: a budget or an override that cannot be, or a pair that is there twice.
        TargetError: an unknown target.
    """
    if not budgets or not targets:
        raise RecipeError("a sweep: expected one set of budgets and one target at least, got none")
    planned: dict[str, tuple[Point, Recipe]] = {}
    for named, texts in product(targets, budgets):
        target = load_target(named).name
        limits = parse_all(texts)
        name = point_name(target, limits)
        if name in planned:
            raise RecipeError(f"point '{name}' is there twice; leave one of the two out")
        changes = [
            *overrides,
            f"compile.target={json.dumps(target)}",
            *budget_overrides(texts, mild),
        ]
        own = api.open_job(recipe, overrides=changes, name=name).recipe
        told = tuple(str(limit) for limit in limits)
        planned[name] = Point(name=name, target=own.compile.target, budgets=told), own
    return list(planned.values())


def point_name(target: str, limits: Sequence[Limit]) -> str:
    """Usable as a folder's name: ``x86-latency-x0.5-params-x0.4``."""
    words = [target, *(re.sub(r"[^\w.]+", "-", str(limit)) for limit in limits)]
    return "-".join(words)


def budget_overrides(texts: Sequence[str], mild: Sequence[str] | None = None) -> list[str]:
    """``--set`` overrides that give the aggressive and the mild network these budgets.

    Args:
        texts: the aggressive network's.
        mild: the mild one's; None: half-way between the aggressive one's shares and 1; where it has
            none, the recipe's.

    Raises:
        RecipeError: a budget that cannot be read, or that is no looser for the mild network.
    """
    aggressive = parse_all(texts)
    if not aggressive:
        raise RecipeError("a point of a sweep: expected a budget, such as 'macs x0.5', got none")
    if mild is None:
        looser = tuple(
            Limit(quantity=limit.quantity, share=(1 + limit.share) / 2)
            for limit in aggressive
            if limit.share is not None
        )
    else:
        looser = parse_all(mild)
        _check_looser(aggressive, looser)
    return [
        *_of_variant("aggressive", aggressive),
        *(_of_variant("mild", looser) if looser else []),
    ]


def _check_looser(aggressive: Sequence[Limit], mild: Sequence[Limit]) -> None:
    by_quantity = {limit.quantity: limit for limit in aggressive}
    for limit in mild:
        other = by_quantity.get(limit.quantity)
        if other is None:
            continue
        for own, tighter in ((limit.value, other.value), (limit.share, other.share)):
            if own is not None and tighter is not None and own <= tighter:
                raise RecipeError(
                    f"budget '{limit}' of the mild network: expected a looser one than the "
                    f"aggressive one's '{other}'; raise the one or lower the other"
                )


def _of_variant(variant: str, limits: Sequence[Limit]) -> list[str]:
    """Shares of MACs and parameters are keys of their own; what else there is, is a budget."""
    shares = {limit.quantity: limit.share for limit in limits if limit.share is not None}
    simple = len(shares) == len(limits) and shares.keys() <= {"macs", "params"}
    texts = [] if simple else [str(limit) for limit in limits]
    place = f"prune.{variant}"
    return [
        f"{place}.macs={float(shares.get('macs') or 1.0) if simple else 1.0}",
        f"{place}.params={float(shares.get('params') or 1.0) if simple else 1.0}",
        f"{place}.rates={{}}",
        f"{place}.budget={json.dumps(texts)}",
    ]
