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
    if word in ("train", "training of the supplied weights"):
        return "training"
    return "observing" if word in ("load", "bench", "account", "report") else "pruning"


def total(parts: list[Ends | None]) -> Ends | None:
    """Of the parts that are known; None of none."""
    if all(part is None for part in parts):
        return None
    return {end: math.fsum(part[end] for part in parts if part is not None) for end in ENDS}


def emitted(joules: Ends | None, grid: Ends, pue: float) -> Ends:
    """kgCO2e; of no joules none."""
    if joules is None:
        return dict.fromkeys(ENDS, 0.0)
    return {end: joules[end] / JOULES_PER_KWH * pue * grid[end] / 1000 for end in ENDS}


def by_block(candidate: Json, end: str) -> dict[int, float]:
    """Millijoules an inference of each window that counts."""
    return {
        window["block"]: 1000 * window["energy"][end] / window["inferences"]
        for window in candidate["windows"]
        if window["energy"] is not None and not window["invalid"]
    }


def median_with_ends(values: list[float]) -> Ends:
    """The narrowest interval by order statistics that covers the median with 95 %, or the widest;
    ``confidence`` is what it has."""
    ordered, n = sorted(values), len(values)
    covers = {k: 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2)}
    k = max((k for k, covered in covers.items() if covered >= 0.95), default=1)
    return {
        "value": statistics.median(ordered),
        "low": ordered[k - 1],
        "high": ordered[-k],
        "confidence": covers.get(k, 1 - 2 / 2**n),
    }


def each_mj(candidate: Json) -> Ends | None:
    """Median over the windows of joules over inferences, and the ends of the meter's ends."""
    if not by_block(candidate, "value"):
        return None
    return {end: median_with_ends(list(by_block(candidate, end).values()))[end] for end in ENDS}


def paired(candidate: Json, dense: Json) -> Ends | None:
    """r: joules an inference over the dense network's, by the blocks where both have them."""
    over, under = by_block(candidate, "value"), by_block(dense, "value")
    both = sorted(over.keys() & under.keys())
    return median_with_ends([over[block] / under[block] for block in both]) if both else None


def times(one: Ends, other: Ends) -> Ends:
    return {end: one[end] * other[end] for end in ENDS}


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
        joules = total([row["joules"] for row in mine])
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
    kwh = everything and {end: everything[end] / JOULES_PER_KWH for end in ENDS}
    yield "kWh", kwh, said["total_kwh"]
    yield "kgCO2e", everything and emitted(everything, host, pue), said["total_kgco2e"]
    null = {row["stage"] for row in rows if row["joules"] is None}
    yield "unmeasured stages are named", True, null <= set(said["unmeasured_stages"])

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
    name: str, variant: Json, measured: dict[str, Json], sums: dict[str, Ends | None], said: Json
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
    dense, ratio = each_mj(measured["dense"]), paired(measured[name], measured["dense"])
    counted = mj if name == "dense" or dense is None or ratio is None else times(dense, ratio)
    yield "mJ of a life", {end: counted[end] for end in ENDS}, variant["counted_mj"]
    before = [sums["training"]] if name == "dense" else [sums["training"], sums["pruning"]]
    prepared, use = total(list(before)), {end: counted[end] / 1000 * count for end in ENDS}
    yield "life, joules", total([prepared, use]), variant["life_joules"]
    stages, field = emitted(prepared, host, pue), emitted(use, device, 1.0)
    life = {end: stages[end] + field[end] + embodied for end in ENDS}
    yield "life, kgCO2e", life, variant["life_kgco2e"]
    if name == "dense":
        return
    yield "r, paired by block", ratio, measured[name]["energy_ratio"]
    pruned = sums["pruning"]
    if dense is None or ratio is None or pruned is None or lacks_pruning(said):
        yield "no break-even", None, variant["break_even"]["inferences"]
        yield "no break-even in CO2", None, variant["break_even_co2"]["inferences"]
        yield "nothing saved is told", None, variant["saved_kgco2e"]
        return
    yield "saved, kgCO2e", saved(dense, ratio, pruned, said), variant["saved_kgco2e"]
    shown = ratio["high"] < 1 and ratio["confidence"] >= 0.95 and dense["low"] > 0
    reached = pays_after(dense, ratio, pruned) if shown else None
    yield "break-even, joules", reached, variant["break_even"]["inferences"]
    in_co2 = reached and times(reached, host_over_device(said))
    yield "break-even, CO2", in_co2, variant["break_even_co2"]["inferences"]


def lacks_pruning(said: Json) -> bool:
    """Whether a stage that belongs to E_prune was not measured."""
    return any(kind(stage) == "pruning" for stage in said["unmeasured_stages"])


def pays_after(dense: Ends, ratio: Ends, pruned: Ends) -> Ends:
    """Inferences; dense is in mJ, pruned in J."""
    opposite = {"value": "value", "low": "high", "high": "low"}
    return {end: 1000 * pruned[end] / (dense[opposite[end]] * (1 - ratio[end])) for end in ENDS}


def host_over_device(said: Json) -> Ends:
    """What a joule of the host emits over one of the device; one grid's uncertainty cancels."""
    host, device, pue = said["intensity"], said["device_intensity"], said["pue"]
    if host == device:
        return dict.fromkeys(ENDS, float(pue))
    return {
        "value": pue * host["value"] / device["value"],
        "low": pue * host["low"] / device["high"],
        "high": pue * host["high"] / device["low"],
    }


def saved(dense: Ends, ratio: Ends, pruned: Ends, said: Json) -> Ends:
    """kgCO2e over the life; the ends are the extremes over all ends."""
    device, count = said["device_intensity"], said["inferences"]
    cost = emitted(pruned, said["intensity"], said["pue"])

    def gained(e: str, r: str, grid: str) -> float:
        kwh: float = count * dense[e] / 1000 * (1 - ratio[r]) / JOULES_PER_KWH
        return kwh * float(device[grid]) / 1000

    sides = ("low", "high")
    gains = [gained(e, r, grid) for e in sides for r in sides for grid in sides]
    return {
        "value": gained("value", "value", "value") - cost["value"],
        "low": min(gains) - cost["high"],
        "high": max(gains) - cost["low"],
    }


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
    if said["total_kwh"] is None:
        return {}
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
    # an execution counts once, where its line was copied
    rows = list({row["identity"]: row for row in map(json.loads, lines)}.values())
    if account is None:
        (account,) = run.glob("account-*/account.json")
        stages = [row["stage"] for row in rows]
        made = max(
            (i for i, stage in enumerate(stages) if stage == account.parent.name),
            default=len(rows),
        )
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
        name = f"account_check/{options.run.resolve().name}"
        write_result(name, seed=0, seconds=seconds, figures=figures, script="account_check")
    return 0 if not wrong and codecarbon_agrees(codecarbon) else 1


if __name__ == "__main__":
    sys.exit(main())
