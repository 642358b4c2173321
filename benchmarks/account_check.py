"""A run's carbon account, derived again from the ledger and the raw windows by other code.

    python benchmarks/account_check.py runs/lenet5-digits
    python benchmarks/account_check.py runs/lenet5-digits --account account.json

Nothing of greenprune is imported: the files are read as plain JSON, and every total is computed
from the equations of docs/carbon.md. Without ``--account`` it is the file of the account stage, and
the ledger's rows up to that stage; with it, the output of ``greenprune report --carbon --json``,
and all rows. Exit status 1, and a line for each, where figures differ.

The same joules are also taken through CodeCarbon's formula, kg = kWh x PUE x (g/kWh) / 1000:
codecarbon 3.3.2, ``core/emissions.py`` (``Emissions.get_country_emissions``: kg/kWh times kWh) and
``emissions_tracker.py`` (the PUE multiplies the energy). Its own figures of countries are the
column ``codecarbon_g_per_kwh`` of ``nncec/intensity.csv``; where the package itself is installed,
it is asked too.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JOULES_PER_KWH = 3_600_000.0
ENDS = ("value", "low", "high")
TABLE = Path(__file__).parents[1] / "toolchain" / "greenprune" / "nncec" / "intensity.csv"
STRONGEST_FIRST = (
    "measured_counter",
    "measured_rail_integrated",
    "estimated_model",
    "simulated_model",
    "user_supplied",
)
Json = dict[str, Any]
Ends = dict[str, float]


def kind(stage: str) -> str:
    """What a stage counts as, by the first word of its name."""
    word = stage.split("-")[0]
    if word == "train":
        return "training"
    return "observing" if word in ("load", "bench", "account", "report") else "pruning"


def total(parts: list[Ends | None]) -> Ends:
    return {end: math.fsum(part[end] for part in parts if part is not None) for end in ENDS}


def emitted(joules: Ends, grid: Ends, pue: float) -> Ends:
    """kgCO2e."""
    return {end: joules[end] / JOULES_PER_KWH * pue * grid[end] / 1000 for end in ENDS}


def each_mj(candidate: Json) -> Ends | None:
    """Median over the windows of joules over inferences; the interval is the record's."""
    spent = [
        1000 * window["energy"]["value"] / window["inferences"]
        for window in candidate["windows"]
        if window["energy"] is not None
    ]
    return {**candidate["energy_mj"], "value": statistics.median(spent)} if spent else None


def derive(rows: list[Json], results: Json, said: Json) -> Iterator[tuple[str, Any, Any]]:
    """Every figure of the account: its name, as it was derived here, as the account has it.

    Args:
        rows: the ledger.
        results: the bench stage's.
        said: the account; only its terms (grids, PUE, fleet, device, runtime) are believed.
    """
    host, device, pue = said["intensity"], said["device_intensity"], said["pue"]
    for stage in said["stages"]:
        mine = [row for row in rows if row["stage"] == stage["stage"]]
        name = f"stage {stage['stage']}"
        yield f"{name}: seconds", math.fsum(row["seconds"] for row in mine), stage["seconds"]
        known = bool(mine) and all(row["joules"] is not None for row in mine)
        joules = total([row["joules"] for row in mine]) if known else None
        yield f"{name}: joules", joules, stage["joules"]
        yield f"{name}: kgCO2e", joules and emitted(joules, host, pue), stage["kgco2e"]
    yield (
        "stages",
        sorted({row["stage"] for row in rows}),
        sorted(s["stage"] for s in said["stages"]),
    )
    sums = {
        wanted: total([row["joules"] for row in rows if kind(row["stage"]) == wanted])
        for wanted in ("training", "pruning", "observing")
    }
    for wanted, joules in sums.items():
        yield f"{wanted}: joules", joules, said[f"{wanted}_joules"]
    everything = total(list(sums.values()))
    yield "kWh", {end: everything[end] / JOULES_PER_KWH for end in ENDS}, said["total_kwh"]
    yield "kgCO2e", emitted(everything, host, pue), said["total_kgco2e"]

    measured = {c["variant"]: c for c in results["candidates"] if c["runtime"] == said["runtime"]}
    labels = [row["provenance"] for row in rows] + [
        c["energy_mj"]["provenance"] for c in measured.values() if c["energy_mj"]
    ]
    weakest = max(filter(None, labels), key=STRONGEST_FIRST.index, default=None)
    yield "provenance", weakest, said["provenance"]
    yield from derive_fleet(said)
    for name, variant in said["variants"].items():
        for what, here, there in derive_variant(name, variant, measured, sums, said):
            yield f"{name}: {what}", here, there
    yield (
        "grids",
        True,
        all(grid["low"] <= grid["value"] <= grid["high"] for grid in (host, device)),
    )


def derive_fleet(said: Json) -> Iterator[tuple[str, Any, Any]]:
    fleet, made = said["fleet"], said["embodied"]
    if fleet is not None:
        count = round(fleet["per_day"] * 365 * fleet["years"] * fleet["devices"])
        yield "inferences", count, said["inferences"]
    if made is not None and fleet is not None:
        shares = fleet["devices"] * fleet["years"] / made["lifetime_years"]
        yield "embodied", made["device_kgco2e"] * shares, said["embodied_kgco2e"]


def derive_variant(
    name: str, variant: Json, measured: dict[str, Json], sums: dict[str, Ends], said: Json
) -> Iterator[tuple[str, Any, Any]]:
    mj = each_mj(measured[name])
    if mj is None:
        yield "mJ", None, variant["energy_mj"]
        return
    host, device, pue, count = (
        said[key] for key in ("intensity", "device_intensity", "pue", "inferences")
    )
    embodied = said["embodied_kgco2e"] or 0.0
    joules = {end: mj[end] / 1000 for end in ENDS}
    yield "mJ", {end: mj[end] for end in ENDS}, variant["energy_mj"]
    micrograms = {end: kg * 1e9 for end, kg in emitted(joules, device, 1.0).items()}
    yield "µgCO2e", micrograms, variant["ugco2e"]
    score = {end: micrograms[end] + embodied * 1e9 / count for end in ENDS}
    yield "SCI", score, variant["sci_ugco2e"]
    before = [sums["training"]] if name == "dense" else [sums["training"], sums["pruning"]]
    prepared, use = total(list(before)), {end: joules[end] * count for end in ENDS}
    yield "life, joules", total([prepared, use]), variant["life_joules"]
    life = total([emitted(prepared, host, pue), emitted(use, device, 1.0)])
    yield "life, kgCO2e", {end: life[end] + embodied for end in ENDS}, variant["life_kgco2e"]
    if name == "dense":
        return
    dense, ratio = each_mj(measured["dense"]), measured[name]["energy_ratio"]
    reached, in_co2 = (variant[key]["inferences"] for key in ("break_even", "break_even_co2"))
    if dense is None or ratio is None:
        yield "break-even", None, reached
        return
    saved = dense["value"] / 1000 * (1 - ratio["value"])  # J an inference
    pruned = sums["pruning"]["value"]
    kilograms = (count * saved * device["value"] - pruned * pue * host["value"]) / 3.6e9
    yield "saved, kgCO2e", kilograms, variant["saved_kgco2e"]["value"]
    if reached is None:  # no saving is shown, or a stage is unknown
        allowed = ratio["high"] >= 1 or any(kind(s) == "pruning" for s in said["unmeasured_stages"])
        yield "no break-even", True, allowed
        return
    yield "break-even, joules", pruned / saved, reached["value"]
    emits = pruned * pue * host["value"] / (saved * device["value"])
    yield "break-even, CO2", emits, in_co2["value"]
    yield (
        "break-even within its interval",
        True,
        reached["low"] <= pruned / saved <= reached["high"],
    )


def same(here: Any, there: Any) -> bool:
    """Whether two figures agree to rounding; of records, the figures of the first."""
    if isinstance(here, dict) and isinstance(there, dict):
        return all(same(here[key], there[key]) for key in ENDS)
    if isinstance(here, bool) or not isinstance(here, (int, float)):
        return bool(here == there)
    return isinstance(there, (int, float)) and math.isclose(
        here, there, rel_tol=1e-9, abs_tol=1e-15
    )


def differences(rows: list[Json], results: Json, said: Json) -> tuple[int, list[str]]:
    """How many figures were compared, and a line for each that differs."""
    compared = list(derive(rows, results, said))
    return len(compared), [
        f"{name}: derived {here}, the account says {there}"
        for name, here, there in compared
        if not same(here, there)
    ]


def codecarbon_kg(kwh: float, g_per_kwh: float, pue: float) -> float:
    """CodeCarbon's formula: the PUE multiplies the energy, kg/kWh multiplies that."""
    return (kwh * pue) * (g_per_kwh / 1000)


def codecarbon_figure(place: str) -> tuple[str, float] | None:
    """ISO code and g/kWh of a country by CodeCarbon's own table; None where it has none."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if place in (row["code"], row["name"]):
                return row["code"], float(row["codecarbon_g_per_kwh"])
    return None


def by_codecarbon(said: Json) -> Json:
    """The total of the ledger by CodeCarbon: with the account's grid, and with its own."""
    kwh, pue, grid = said["total_kwh"]["value"], said["pue"], said["intensity"]
    found: Json = {
        "account_kg": said["total_kgco2e"]["value"],
        "same_grid_kg": codecarbon_kg(kwh, grid["value"], pue),
    }
    own = codecarbon_figure(grid["place"])
    if own is None:
        return found
    code, g_per_kwh = own
    found |= {"country": code, "own_g_per_kwh": g_per_kwh}
    found["own_grid_kg"] = codecarbon_kg(kwh, g_per_kwh, pue)
    # so much of the account's figure is the joules' and the PUE's, whatever the grid's figure is
    found["account_at_own_grid_kg"] = found["account_kg"] / grid["value"] * g_per_kwh
    try:
        from codecarbon.core.emissions import Emissions
        from codecarbon.core.units import Energy
        from codecarbon.external.geography import GeoMetadata
        from codecarbon.input import DataSource
    except ImportError:
        return found
    asked = Emissions(DataSource()).get_country_emissions(
        Energy.from_energy(kWh=kwh * pue), GeoMetadata(country_iso_code=code)
    )
    return found | {"package_kg": asked}


def codecarbon_agrees(found: Json) -> bool:
    pairs = [("account_kg", "same_grid_kg"), ("account_at_own_grid_kg", "own_grid_kg")]
    agree = all(same(found[one], found[other]) for one, other in pairs if one in found)
    # the vendored table has one decimal
    package = found.get("package_kg", found.get("own_grid_kg"))
    return agree and (package is None or math.isclose(package, found["own_grid_kg"], rel_tol=2e-3))


def read_run(run: Path, account: Path | None) -> tuple[list[Json], Json, Json]:
    """Rows of the ledger, results and account."""
    (bench,) = run.glob("bench-*/results.json")
    lines = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if account is None:
        (account,) = run.glob("account-*/account.json")
        stages = [row["stage"] for row in rows]
        made = max(i for i, stage in enumerate(stages) if stage == account.parent.name)
        rows = rows[:made]
    said = json.loads(account.read_text(encoding="utf-8"))
    return rows, json.loads(bench.read_text(encoding="utf-8")), said.get("account", said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--account", type=Path, help="what `report --carbon --json` printed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results too")
    options = parser.parse_args()
    started = time.monotonic()
    rows, results, said = read_run(options.run, options.account)
    compared, wrong = differences(rows, results, said)
    codecarbon = by_codecarbon(said)
    figures = {
        "rows": len(rows),
        "rows_with_provenance": sum(row["provenance"] is not None for row in rows),
        "figures_compared": compared,
        "differences": wrong,
        "codecarbon": {**codecarbon, "agrees": codecarbon_agrees(codecarbon)},
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if options.write:
        from common import write_result  # the check is over, and rested on nothing of this

        seconds = time.monotonic() - started
        write_result("account_check", seed=0, seconds=seconds, figures=figures)
    return 0 if not wrong and codecarbon_agrees(codecarbon) else 1


if __name__ == "__main__":
    sys.exit(main())
