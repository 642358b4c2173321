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
from dataclasses import dataclass
from pathlib import Path

from greenprune.errors import MeasurementError

TABLE = Path(__file__).with_name("intensity.csv")


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


WORLD = Factor(
    place="world",
    value=445.0,
    low=445.0,
    high=475.0,
    year="2024, 2019",
    source="445: IEA Electricity 2025, as in carbontracker 2.4.7; 475: CodeCarbon 3.3.2",
    licence="MIT",
)


def user_supplied(g_per_kwh: float) -> Factor:
    """A factor that the user gives; 445 is the world's, and comes with its interval.

    Raises:
        MeasurementError: it is not above zero.
    """
    if g_per_kwh == WORLD.value:
        return WORLD
    if not g_per_kwh > 0:
        raise MeasurementError(
            f"carbon intensity {g_per_kwh}: expected gCO2e for each kWh, above zero; "
            f"the world's average is {WORLD.value:g}"
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


def find_factor(place: str) -> Factor:
    """The factor of ``world`` or of a country, by ISO 3166 code (``FRA``) or English name.

    Raises:
        MeasurementError: the table does not have it.
    """
    if place.lower() == WORLD.place:
        return WORLD
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if place.upper() == row["code"] or place.lower() == row["name"].lower():
            return _factor(row)
    near = difflib.get_close_matches(place.title(), [row["name"] for row in rows], n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise MeasurementError(
        f"no carbon intensity for '{place}'{hint}; expected 'world', an ISO code such as FRA or "
        "a country's name; or give the number itself"
    )


def _factor(row: dict[str, str]) -> Factor:
    newest = float(row["carbontracker_g_per_kwh"])
    other = float(row["codecarbon_g_per_kwh"])
    return Factor(
        place=row["name"],
        value=newest,
        low=min(newest, other),
        high=max(newest, other),
        year=f"{row['carbontracker_year']}, {row['codecarbon_year']}",
        source=f"{newest:g}: carbontracker 2.4.7; {other:g}: CodeCarbon 3.3.2",
        licence="MIT",
    )
