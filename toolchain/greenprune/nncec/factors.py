"""Carbon intensity of electricity: grams of CO2 equivalent for each kilowatt-hour.

``intensity.csv`` holds, for 106 countries that generate at least 10 TWh a year, the figures of two
packages, each with its year: carbontracker 2.4.7 (MIT License, Copyright (c) 2020 Lasse F. Wolff
Anthony & Benjamin Kanding) and CodeCarbon 3.3.2 (MIT License, Copyright (c) 2019 Mila, BCG Gamma,
CometML, Haverford College, 2023 Code Carbon NGO; its figures are from Our World in Data). They
disagree, and the spread is the factor's interval. Both are yearly averages; neither knows the hour
or the supplier.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from greenprune.errors import MeasurementError

TABLE = Path(__file__).with_name("intensity.csv")
HIGHEST_G_PER_KWH = 2000.0
"""No grid comes near it: burning lignite in an old plant emits about 1,200."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """``value``, ``low`` and ``high`` in gCO2e for each kWh."""

    place: str
    value: float
    low: float
    high: float
    year: str
    source: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """What one source says of one place in one year."""

    g_per_kwh: float
    year: str
    source: str


def _factor(place: str, figures: Sequence[_Figure], year: str = "") -> Factor:
    """The first figure of that year, or of all; the interval spans every source.

    Raises:
        MeasurementError: no source has that year.
    """
    matching = [figure for figure in figures if year in ("", figure.year)]
    if not matching:
        known = " and ".join(sorted({figure.year for figure in figures}))
        raise MeasurementError(
            f"no carbon intensity of {place} for {year}: the table has {known}; name one of these, "
            "leave the year out, or give the number itself"
        )
    every = [figure.g_per_kwh for figure in figures]
    return Factor(
        place=place,
        value=matching[0].g_per_kwh,
        low=min(every),
        high=max(every),
        year=matching[0].year,
        source="; ".join(f"{f.g_per_kwh:g} ({f.year}): {f.source}" for f in figures),
        licence="MIT",
    )


_WORLD = (
    _Figure(g_per_kwh=445.0, year="2024", source="IEA Electricity 2025, as in carbontracker 2.4.7"),
    _Figure(g_per_kwh=475.0, year="2019", source="CodeCarbon 3.3.2"),
)
WORLD = _factor("world", _WORLD)


def of_recipe(g_per_kwh: float) -> Factor:
    """A recipe's factor: 445, its default, is the world's with its interval.

    Raises:
        MeasurementError: it is not above zero, or above any grid's.
    """
    return WORLD if g_per_kwh == WORLD.value else user_supplied(g_per_kwh)


def user_supplied(g_per_kwh: float) -> Factor:
    """A factor that the user gives.

    Raises:
        MeasurementError: it is not above zero, or above any grid's.
    """
    if not 0 < g_per_kwh <= HIGHEST_G_PER_KWH:
        raise MeasurementError(
            f"carbon intensity {g_per_kwh:g}: expected gCO2e for each kWh, above 0 and at most "
            f"{HIGHEST_G_PER_KWH:,.0f}; grids have between about 20 and 1,000, the world's "
            f"average is {WORLD.value:g}"
        )
    return Factor(
        place="user supplied",
        value=g_per_kwh,
        low=g_per_kwh,
        high=g_per_kwh,
        year="",
        source="user supplied",
        licence="",
    )


def parse_factor(text: str) -> Factor:
    """A number of gCO2e for each kWh, or a place as in :func:`find_factor`.

    Raises:
        MeasurementError: a number that no grid has, a place or year that the table does not have.
    """
    try:
        number = float(text)
    except ValueError:
        return find_factor(text)
    return user_supplied(number)


def find_factor(place: str) -> Factor:
    """The factor of ``world`` or of a country, by ISO 3166 code (``FRA``) or English name.

    ``FRA:2023`` asks for a year that the table has; without one it is the newest source's.

    Raises:
        MeasurementError: the table does not have the place or the year.
    """
    name, _, year = (part.strip() for part in place.partition(":"))
    if place.strip().endswith(":") or (year and not re.fullmatch(r"\d{4}", year)):
        raise MeasurementError(
            f"carbon intensity '{place}': expected a year after ':', as FRA:2023"
        )
    if name.lower() == WORLD.place:
        return _factor(WORLD.place, _WORLD, year)
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if name.upper() == row["code"] or name.lower() == row["name"].lower():
            return _factor(row["name"], _figures(row), year)
    near = difflib.get_close_matches(name.title(), [row["name"] for row in rows], n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise MeasurementError(
        f"no carbon intensity for '{name}'{hint}; expected 'world', an ISO code such as FRA or "
        "a country's name; or give the number itself"
    )


def _figures(row: dict[str, str]) -> tuple[_Figure, ...]:
    return tuple(
        _Figure(
            g_per_kwh=float(row[f"{package.lower()}_g_per_kwh"]),
            year=row[f"{package.lower()}_year"],
            source=f"{package} {version}",
        )
        for package, version in (("carbontracker", "2.4.7"), ("CodeCarbon", "3.3.2"))
    )
