"""The record of measured or estimated joules, and how records add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from greenprune.bundle import Provenance

_STRONGEST_FIRST: tuple[Provenance, ...] = get_args(Provenance)

_WORDS: dict[Provenance, str] = {
    "measured_counter": "measured",
    "measured_rail_integrated": "measured",
    "estimated_model": "ESTIMATE",
    "simulated_model": "SIMULATED",
    "user_supplied": "USER SUPPLIED",
}


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules over a stretch of time.

    ``value``, ``low`` and ``high`` are joules, ``seconds`` the length of the stretch. Of a meter
    the interval holds what its ticks, samples and gaps leave open, not the error of the hardware,
    which states none; of an estimate it is the model's. ``scope`` says what the joules cover,
    ``note`` what a reader must know.
    """

    value: float
    low: float
    high: float
    provenance: Provenance
    scope: str
    meter: str
    seconds: float
    note: str = ""


def weakest(provenances: Iterable[Provenance]) -> Provenance | None:
    """The label of a total: the weakest of its parts; None of no parts."""
    return max(provenances, key=_STRONGEST_FIRST.index, default=None)


def label(provenance: Provenance | None) -> str:
    """The word for tables and plots, such as ``ESTIMATE``."""
    return "not measured" if provenance is None else _WORDS[provenance]
