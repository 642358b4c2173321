"""The account in words and tables: for the terminal, and shared with the page."""

from __future__ import annotations

import math
import sys

from rich.console import Console
from rich.table import Table

from greenprune.harness.table import energy
from greenprune.meters.energy import label, weakest
from greenprune.nncec.account import Account, StageTotal, understated
from greenprune.nncec.factors import Factor
from greenprune.nncec.ledger import JOULES_PER_KWH, REPAIR, Quantity
from greenprune.nncec.life import Fleet

NBSP = "\u00a0"
UNITS = {
    "J": {"µJ": 1e-6, "mJ": 1e-3, "J": 1.0, "kJ": 1e3, "MJ": 1e6, "GJ": 1e9},
    "Wh": {"µWh": 1e-6, "mWh": 1e-3, "Wh": 1.0, "kWh": 1e3, "MWh": 1e6, "GWh": 1e9},
    "g": {"ng": 1e-9, "µg": 1e-6, "mg": 1e-3, "g": 1.0, "kg": 1e3, "t": 1e6},
}
"""Smallest first."""


def quantity(found: Quantity | None, digits: int = 3) -> str:
    """A value with its interval, as text."""
    if found is None:
        return "not measured"
    value, low, high = (rounded(end, digits) for end in (found.value, found.low, found.high))
    # a line may end before an interval, not within it
    return value if low == high else f"{value} [{low},{NBSP}{high}]"


def rounded(value: float, digits: int = 3) -> str:
    """Significant digits, never an exponent; thousands are kept apart by commas."""
    near = float(f"{value:.{digits}g}")
    if near == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(near))))
    text = f"{near:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def joules(found: Quantity | None) -> str:
    """Joules, in the unit that suits them."""
    return _in_unit(found, "J", 1.0)


def watt_hours(found: Quantity | None) -> str:
    """kWh, in the unit that suits them."""
    return _in_unit(found, "Wh", 1e3)


def grams(found: Quantity | None) -> str:
    """kgCO2e, in µg to tonnes."""
    return _in_unit(found, "g", 1e3)


def micrograms(found: Quantity | None) -> str:
    """µgCO2e, in µg to tonnes."""
    return _in_unit(found, "g", 1e-6)


def _in_unit(found: Quantity | None, base: str, scale: float) -> str:
    """``found`` x ``scale`` in the largest unit that leaves a whole number before the point."""
    if found is None:
        return "not measured"
    found = found.scaled(scale)
    size = abs(found.value) or max(abs(found.low), abs(found.high))
    units = UNITS[base]
    smallest = next(iter(units))
    unit = max((u for u in units if units[u] <= size), key=units.__getitem__, default=smallest)
    if size == 0:
        unit = base
    return f"{quantity(found.scaled(1 / units[unit]))}{NBSP}{unit}"


def _at_least(text: str, understates: bool) -> str:
    return f"at least {text}" if understates and text != "not measured" else text


def _after(count: Quantity, account: Account) -> str:
    """Inferences, and days of the fleet."""
    told = _at_least(f"{quantity(count)} inferences", "pruning" in understated(account))
    if account.fleet is None:
        return told
    days = count.scaled(1 / (account.fleet.per_day * account.fleet.devices))
    return f"{told} ({quantity(days, 2)} days)"


def spent(account: Account) -> str:
    """What the ledger adds up to: electricity and carbon."""
    if account.total_kwh is None:
        return "not measured"
    told = f"{watt_hours(account.total_kwh)} and {grams(account.total_kgco2e)} of CO2e"
    return _at_least(told, bool(understated(account)))


def life_carbon(account: Account, name: str) -> str:
    """A variant's whole life."""
    low = understated(account) & ({"training"} if name == "dense" else {"training", "pruning"})
    return _at_least(grams(account.variants[name].life_kgco2e), bool(low))


def saved_carbon(account: Account, name: str) -> str:
    """What a pruned variant saves against dense; empty for dense."""
    if name == "dense":
        return ""
    saved = account.variants[name].saved_kgco2e
    if saved is None:
        return "not known"
    return f"at most {grams(saved)}" if "pruning" in understated(account) else grams(saved)


def _in_part(account: Account, total: StageTotal) -> bool:
    """Whether some of a stage's joules are in no row: a part was killed, or not measured."""
    return total.stage in (*account.incomplete_stages, *account.unmeasured_stages)


def stage_joules(account: Account, total: StageTotal) -> str:
    """A stage's joules."""
    return _at_least(joules(total.joules), _in_part(account, total))


def stage_carbon(account: Account, total: StageTotal) -> str:
    """A stage's carbon."""
    return _at_least(grams(total.kgco2e), _in_part(account, total))


def provenance(total: StageTotal) -> str:
    """Where a stage's joules come from, or why there are none."""
    return f"{label(total.provenance)}: {total.note}" if total.note else label(total.provenance)


def exact_grams(kgco2e: float) -> str:
    """kgCO2e without an interval."""
    return grams(Quantity(value=kgco2e, low=kgco2e, high=kgco2e))


def describe_intensity(factor: Factor) -> str:
    """Grams, place and year."""
    spread = "" if factor.low == factor.high else f" [{factor.low:g}, {factor.high:g}]"
    year = f", {factor.year}" if factor.year else ""
    return f"{factor.value:g}{spread} gCO2e/kWh ({factor.place}{year})"


def describe_fleet(account: Account) -> str:
    """How many inferences the account counts, and where they come from."""
    fleet: Fleet | None = account.fleet
    total = f"{account.inferences:,} inferences"
    if fleet is None:
        return total
    devices = "1 device" if fleet.devices == 1 else f"{fleet.devices:,} devices"
    years = "1 year" if fleet.years == 1 else f"{fleet.years:g} years"
    return f"{total}: {rounded(fleet.per_day)} a day over {years} on {devices}"


def stages_table(account: Account) -> Table:
    """A row for each stage of the ledger, and the total."""
    table = Table(title="Spent so far: the ledger", title_justify="left")
    table.add_column("stage")
    for heading in ("seconds", "energy", "CO2e"):
        table.add_column(heading, justify="right")
    table.add_column("provenance")
    for total in account.stages:
        table.add_row(
            total.stage,
            f"{total.seconds:.1f}",
            stage_joules(account, total),
            stage_carbon(account, total),
            provenance(total),
        )
    table.add_section()
    seconds = sum(total.seconds for total in account.stages)
    kwh, short = account.total_kwh, bool(understated(account))
    table.add_row(
        "all",
        f"{seconds:.1f}",
        _at_least(joules(None if kwh is None else kwh.scaled(JOULES_PER_KWH)), short),
        _at_least(grams(account.total_kgco2e), short),
        label(weakest(t.provenance for t in account.stages if t.provenance is not None)),
    )
    return table


def life_table(account: Account) -> Table:
    """A row for each variant: an inference and the whole life."""
    title = f"The life: {describe_fleet(account)}{not_valid(account)}"
    table = Table(title=title, title_justify="left")
    table.add_column(f"on {account.runtime}")
    for heading in ("mJ each", "CO2e each", "SCI, CO2e each", "life, CO2e", "saved, CO2e"):
        table.add_column(heading, justify="right")
    for name, found in account.variants.items():
        table.add_row(
            name,
            energy(found.energy_mj),
            micrograms(found.ugco2e),
            micrograms(found.sci_ugco2e),
            life_carbon(account, name),
            saved_carbon(account, name),
        )
    return table


def not_valid(account: Account) -> str:
    """What must stand beside a claim that rests on inferences; empty where they are valid."""
    return ", by a measurement that is NOT VALID" if account.valid is False else ""


def break_evens(account: Account) -> dict[str, str]:
    """For each pruned variant, when its pruning has paid for itself, or why that is unknown."""
    told = {}
    for name, found in account.variants.items():
        joules, carbon = found.break_even, found.break_even_co2
        if name == "dense":
            continue
        if joules.inferences is None or carbon.inferences is None:
            told[name] = f"not shown to have paid for itself ({joules.reason})"
        else:
            told[name] = (
                "pruning has paid for itself in joules after "
                f"{_after(joules.inferences, account)}, in CO2 after "
                f"{_after(carbon.inferences, account)}{not_valid(account)}"
            )
    return told


def footnotes(account: Account) -> list[str]:
    """What the numbers rest on."""
    embodied = "not included"
    if account.embodied is not None:
        embodied = (
            f"{account.embodied.device_kgco2e:g} kgCO2e a device that lasts "
            f"{account.embodied.lifetime_years:g} years; "
            f"{exact_grams(account.embodied_kgco2e or 0)} of CO2e for the fleet"
        )
    found = [
        f"host: {describe_intensity(account.intensity)}, PUE {account.pue:g}; "
        f"source: {account.intensity.source}",
        f"device: {describe_intensity(account.device_intensity)}; "
        f"source: {account.device_intensity.source}",
        f"embodied carbon: {embodied}",
        f"joules: {label(account.provenance)} (the weakest label of all joules)"
        + (f", preset {account.preset}" if account.preset else ""),
        "lives, savings and break-even count a pruned network's inference as its energy ratio to "
        "dense, paired by block, times dense's",
        f"equations: {account.equations}",
    ]
    if account.valid is False:
        found.append("the measurement of the inferences is NOT VALID; the report says why")
    if account.unmeasured_stages:
        found.append(f"totals are lower bounds without: {', '.join(account.unmeasured_stages)}")
    if account.incomplete_stages:
        found.append(
            f"measured in part: {', '.join(account.incomplete_stages)}; their joules are lower "
            "bounds, for the reason beside them"
        )
    return found


def print_account(account: Account) -> None:
    """The tables and what they rest on, on stdout."""
    # a pipe has no width of its own, and 80 columns would break every figure
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    console.print(stages_table(account))
    if account.variants:
        console.print(life_table(account))
    paid = [f"{name}: {told}" for name, told in break_evens(account).items()]
    for line in (*paid, *footnotes(account)):
        console.print(line, highlight=False, soft_wrap=True)


def damage(account: Account) -> str:
    """What is wrong with the ledger, and what to do."""
    return f"{'; '.join(account.unreadable)}; the other rows were counted; {REPAIR}"
