"""Checks of what an app sets: each returns the value, or says what was expected (device side)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from greenprune.errors import BundleError


def finite(name: str, value: object) -> float:
    """A number, NumPy's included; a truth value is none.

    Raises:
        BundleError: it is something else, NaN, infinite or beyond a float's range.
    """
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer, of so many digits that a message should not show them
        value = "a huge integer"
    raise BundleError(f"{name} = {value!r:.60}: expected a finite number")


def positive(name: str, value: object) -> float:
    """A number above 0."""
    number = finite(name, value)
    if number <= 0:
        raise BundleError(f"{name} = {value!r}: expected a number above 0")
    return number


def whole(name: str, value: object, least: int) -> int:
    """A whole number, at least ``least``."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    raise BundleError(f"{name} = {value!r:.60}: expected a whole number, at least {least}")


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """One of some words."""
    if value not in choices:
        raise BundleError(f"{name} = {value!r:.60}: expected one of {', '.join(choices)}")
    return value
