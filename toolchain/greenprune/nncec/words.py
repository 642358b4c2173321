"""The account in words and tables: for the terminal, and shared with the page."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from greenprune.harness.table import energy
from greenprune.meters.energy import label
from greenprune.nncec.account import Account
from greenprune.nncec.factors import Factor
from greenprune.nncec.ledger import REPAIR, Quantity
from greenprune.nncec.life import Fleet


def quantity(found: Quantity | None, digits: int = 3) -> str:
    """A value with its interval, as text."""
    if found is None:
        return "not measured"
    value, low, high = (rounded(end, digits) for end in (found.value, found.low, found.high))
    # a line may end before an interval, not within it
    return value if low == high else f"{value} [{low},\u00a0{high}]"


def rounded(value: float, digits: int = 3) -> str:
    """Significant digits; whole numbers without an exponent as far as people read them."""
    if 1e3 <= abs(value) < 1e9:
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    return f"{value:.{digits}g}"


def _after(count: Quantity, account: Account) -> str:
    """Inferences, and days of the fleet."""
    told = f"{quantity(count)} inferences"
    if account.fleet is None:
        return told
    days = count.scaled(1 / (account.fleet.per_day * account.fleet.devices))
    return f"{told} ({quantity(days, 2)} days)"


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
    return f"{total}: {fleet.per_day:,g} a day over {years} on {devices}"


def stages_table(account: Account) -> Table:
    """A row for each stage of the ledger, and the total."""
    table = Table(title="Spent so far: the ledger", title_justify="left")
    table.add_column("stage")
    for heading in ("seconds", "joules", "kgCO2e"):
        table.add_column(heading, justify="right")
    table.add_column("provenance")
    for total in account.stages:
        table.add_row(
            total.stage,
            f"{total.seconds:.1f}",
            quantity(total.joules),
            quantity(total.kgco2e),
            label(total.provenance),
        )
    table.add_section()
    seconds = sum(total.seconds for total in account.stages)
    joules = account.training_joules.plus(account.pruning_joules).plus(account.observing_joules)
    table.add_row(
        "all",
        f"{seconds:.1f}",
        quantity(joules),
        quantity(account.total_kgco2e),
        label(account.provenance),
    )
    return table


def life_table(account: Account) -> Table:
    """A row for each variant: an inference and the whole life."""
    table = Table(title=f"The life: {describe_fleet(account)}", title_justify="left")
    table.add_column(f"on {account.runtime}")
    for heading in (
        "mJ each",
        "µgCO2e each",
        "SCI, µgCO2e each",
        "life, kgCO2e",
        "saved, kgCO2e",
    ):
        table.add_column(heading, justify="right")
    for name, found in account.variants.items():
        table.add_row(
            name,
            energy(found.energy_mj),
            quantity(found.ugco2e),
            quantity(found.sci_ugco2e),
            quantity(found.life_kgco2e),
            "" if name == "dense" else quantity(found.saved_kgco2e),
        )
    return table


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
                f"{_after(carbon.inferences, account)}"
            )
    return told


def footnotes(account: Account) -> list[str]:
    """What the numbers rest on."""
    embodied = "not included"
    if account.embodied is not None:
        embodied = (
            f"{account.embodied.device_kgco2e:g} kgCO2e a device that lasts "
            f"{account.embodied.lifetime_years:g} years; "
            f"{rounded(account.embodied_kgco2e or 0)} kgCO2e for the fleet"
        )
    found = [
        f"host: {describe_intensity(account.intensity)}, PUE {account.pue:g}; "
        f"source: {account.intensity.source}",
        f"device: {describe_intensity(account.device_intensity)}; "
        f"source: {account.device_intensity.source}",
        f"embodied carbon: {embodied}",
        f"joules: {label(account.provenance)} (the weakest of all parts)"
        + (f", preset {account.preset}" if account.preset else ""),
        f"equations: {account.equations}",
    ]
    if account.valid is False:
        found.append("the measurement of the inferences is NOT VALID; the report says why")
    if account.unmeasured_stages:
        found.append(f"totals are lower bounds without: {', '.join(account.unmeasured_stages)}")
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
