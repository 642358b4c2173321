"""Budgets as the user writes them: ``"latency_ms <= 4"`` or ``"latency x0.5"``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from greenprune.errors import RecipeError

Quantity = Literal["latency_ms", "energy_mj", "macs", "params"]

_ABSOLUTE = ("latency_ms", "energy_mj", "macs", "params")
_RELATIVE = {"latency": "latency_ms", "energy": "energy_mj", "macs": "macs", "params": "params"}
_FORM = re.compile(r"(?P<name>\w+)\s*(?P<relation><=|(?<=\s)x)\s*(?P<number>\S+)")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most that one quantity may be: ``value`` or ``share``, the other is None."""

    quantity: Quantity
    value: float | None = None
    """In the quantity's unit (milliseconds and millijoules for one input, MACs, parameters)."""
    share: float | None = None
    """Of what the dense network needs, in (0, 1]."""

    def __str__(self) -> str:
        """As :func:`parse` reads it."""
        if self.value is not None:
            return f"{self.quantity} <= {self.value:.12g}"
        name = next(name for name, quantity in _RELATIVE.items() if quantity == self.quantity)
        return f"{name} x{self.share:.12g}"


def parse(text: str) -> Limit:
    """Read one budget.

    Args:
        text: ``QUANTITY <= NUMBER`` with latency_ms, energy_mj, macs or params; or ``NAME xSHARE``
            with latency, energy, macs or params, the share being that of the dense network.

    Raises:
        RecipeError: anything else; a number that is not finite or not above 0; a share above 1.
    """
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise _refusal(text, "a text of another form")
    name, number = form["name"], _number(text, form["number"])
    if form["relation"] == "<=":
        if name not in _ABSOLUTE:
            raise _refusal(text, f"'{name}' before '<='")
        return Limit(quantity=cast(Quantity, name), value=number)
    if name not in _RELATIVE:
        raise _refusal(text, f"'{name}' before 'x'")
    if number > 1:
        raise _refusal(text, "a share above 1, which is more than the dense network needs")
    return Limit(quantity=cast(Quantity, _RELATIVE[name]), share=number)


def parse_all(texts: Iterable[str]) -> tuple[Limit, ...]:
    """Read several budgets, which hold all at once.

    Raises:
        RecipeError: as :func:`parse`; or two for one quantity.
    """
    found: dict[str, str] = {}
    limits = []
    for text in texts:
        limit = parse(text)
        if limit.quantity in found:
            raise RecipeError(
                f"budgets '{found[limit.quantity]}' and '{text}': expected one budget for a "
                f"quantity, got two for {limit.quantity}; keep the tighter one"
            )
        found[limit.quantity] = text
        limits.append(limit)
    return tuple(limits)


def allowed(limit: Limit, dense_value: float) -> float:
    """The most that ``limit`` allows, in its quantity's unit.

    Args:
        dense_value: what the dense network needs, in the same unit.
    """
    return limit.value if limit.value is not None else cast(float, limit.share) * dense_value


def _number(text: str, digits: str) -> float:
    try:
        number = float(digits)
    except ValueError:
        raise _refusal(text, f"'{digits}', which is no plain number") from None
    if not math.isfinite(number) or number <= 0:
        raise _refusal(text, f"{digits}, which is not a finite number above 0")
    return number


def _refusal(text: str, found: str) -> RecipeError:
    return RecipeError(
        f"budget '{text}': expected QUANTITY <= NUMBER ({', '.join(_ABSOLUTE)}) or NAME xSHARE of "
        f"the dense network ({', '.join(_RELATIVE)}), got {found}; for example 'latency_ms <= 4' "
        "or 'latency x0.5'"
    )
