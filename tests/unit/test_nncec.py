"""The account: ledger, factors, break-even and what may not be claimed."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from greenprune import deployment, schema
from greenprune.bundle import open_bundle
from greenprune.errors import GreenpruneError, MeasurementError, RunError
from greenprune.harness.results import InferenceEnergy
from greenprune.harness.statistics import Interval
from greenprune.meters import Energy, Meter, Window
from greenprune.nncec import ledger
from greenprune.nncec.account import (
    NOTHING_PRUNED,
    TRAINED_ELSEWHERE,
    UNREADABLE,
    Account,
    account,
    break_even,
    understated,
)
from greenprune.nncec.factors import (
    TABLE,
    WORLD,
    find_factor,
    of_recipe,
    parse_factor,
    user_supplied,
)
from greenprune.nncec.ledger import Quantity, Row, stage_row
from greenprune.nncec.life import Embodied, Fleet
from greenprune.nncec.words import (
    break_evens,
    damage,
    footnotes,
    grams,
    joules,
    life_carbon,
    life_table,
    provenance,
    quantity,
    rounded,
    saved_carbon,
    spent,
    stage_carbon,
    stage_joules,
    stages_table,
)
from greenprune.pipeline import BEGUN_BEFORE, LEDGER_FILE, STAGE_FILE, Job, Stage, execute
from greenprune.recipe import Recipe


def neighbour(name: str) -> ModuleType:
    """Another test module: its builders are shared."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def energy(joules: float) -> Energy:
    return Energy(
        value=joules,
        low=joules / 2,
        high=joules * 2,
        provenance="estimated_model",
        scope="a test",
        meter="estimate",
        seconds=1.0,
    )


def row(stage: str, joules: float | None, **changes: Any) -> Row:
    return stage_row(
        identity=f"{stage} 1",
        stage=stage,
        seconds=10.0,
        energy=None if joules is None else energy(joules),
        **{"intensity_g_per_kwh": 400.0, "pue": 1.5} | changes,
    )


def each_mj(value: float) -> InferenceEnergy:
    return InferenceEnergy(
        value=value,
        low=value / 2,
        high=value * 2,
        provenance="measured_counter",
        scope="a test",
        meter="rapl",
        net_value=None,
    )


def known(found: Quantity | None) -> Quantity:
    assert found is not None
    return found


def interval(low: float, value: float, high: float) -> Interval:
    return Interval(value=value, low=low, high=high, confidence=0.95)


def test_row_counts_carbon() -> None:
    found = row("train", 3.6e6)  # 1 kWh
    assert found.kwh is not None
    assert found.kgco2e is not None
    assert found.kwh.value == pytest.approx(1.0)
    assert found.kgco2e.value == pytest.approx(1.0 * 1.5 * 400 / 1000)
    assert found.provenance == "estimated_model"


def test_row_of_an_unmeasured_stage_is_null_not_zero() -> None:
    found = row("train", None)
    assert (found.joules, found.kwh, found.kgco2e, found.provenance) == (None, None, None, None)


def test_row_takes_the_plain_data_of_a_stage() -> None:
    plain = schema.encode(energy(7.0))
    assert row("prune", 7.0) == stage_row(
        identity="prune 1",
        stage="prune",
        seconds=10.0,
        energy=plain,
        intensity_g_per_kwh=400.0,
        pue=1.5,
    )


def test_ledger_is_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run/ledger.jsonl"
    assert ledger.read(path) == ()
    rows = (row("train", 5.0), row("prune", None))
    ledger.append(path, rows[0])
    first = path.read_bytes()
    ledger.append(path, rows[1])
    assert path.read_bytes().startswith(first)
    assert ledger.read(path) == rows


def test_broken_ledger_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row("train", 5.0))
    with path.open("a") as file:
        file.write('{"stage": "pru\n')
    ledger.append(path, row("prune", 2.0))
    with pytest.raises(RunError, match=r"line 2: .*put a copy of it back"):
        ledger.read(path)
    found = ledger.scan(path)
    assert found.rows == (row("train", 5.0), row("prune", 2.0))
    (fault,) = found.unreadable
    assert fault.startswith(f"{path}, line 2: expected a row as JSON")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda plain: plain | {"stages": "x"}, "unknown key 'stages' .did you mean 'stage'"),
        (lambda plain: plain | {"seconds": "long"}, "key 'seconds'"),
        (lambda plain: plain | {"provenance": "guessed"}, "expected one of: measured_counter"),
        (
            lambda plain: plain | {"joules": {"value": -5, "low": -5, "high": -5}},
            "joules: expected",
        ),
        (lambda plain: plain | {"kwh": {"value": 2.0, "low": 3.0, "high": 4.0}}, "kwh: expected"),
        (lambda plain: [plain], "expected"),
    ],
)
def test_row_that_is_json_and_no_row_is_named(damage: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(damage(schema.encode(row("train", 5.0)))) + "\n")
    ledger.append(path, row("prune", 2.0))
    found = ledger.scan(path)
    assert [kept.stage for kept in found.rows] == ["prune"]
    assert len(found.unreadable) == 1
    assert re.search(f"line 1: .*{fault}", found.unreadable[0])


@given(st.binary(max_size=60))
def test_damage_of_any_kind_costs_its_own_line_alone(noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger.append(path, row("train", 5.0))
        with path.open("ab") as file:
            file.write(noise.replace(b"\n", b" ") + b"\n")
        ledger.append(path, row("prune", 2.0))
        found = ledger.scan(path)
    assert found.rows == (row("train", 5.0), row("prune", 2.0))
    assert len(found.unreadable) == 1


def test_row_that_a_killed_writer_did_not_finish_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    rows = [row("train", 5.0), row("prune", 2.0)]
    ledger.append(path, rows[0])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"stage": "pru')
    assert ledger.read(path) == (rows[0],)
    ledger.append(path, rows[1])
    assert path.read_bytes().startswith(whole)
    assert ledger.read(path) == tuple(rows)


def test_factors_carry_their_spread_and_source() -> None:
    assert (WORLD.value, WORLD.low, WORLD.high) == (445, 445, 475)
    france = find_factor("France")
    assert france == find_factor("fra")
    assert france.low <= france.value <= france.high < 100
    assert france.licence == "MIT"
    assert "carbontracker" in france.source
    assert find_factor("world") == WORLD
    assert of_recipe(445.0) is WORLD
    assert parse_factor("445") == user_supplied(445.0)  # a user's own figure is the user's
    assert user_supplied(445.0).source == "user supplied"
    assert user_supplied(50.0).source == "user supplied"
    with pytest.raises(GreenpruneError, match="did you mean 'Germany'"):
        find_factor("Germny")


@pytest.mark.parametrize("absurd", [0.0, -3.0, 2001.0, 445_000.0, math.inf, math.nan])
def test_absurd_intensity_names_the_plausible_range(absurd: float) -> None:
    with pytest.raises(MeasurementError, match=r"above 0 and at most 2,000; .* 20 and 1,000"):
        user_supplied(absurd)
    with pytest.raises(MeasurementError, match="at most 2,000"):
        parse_factor(str(absurd))


def test_intensity_by_country_and_year() -> None:
    newest, other = find_factor("FRA"), find_factor("FRA:2023")
    assert (newest.year, other.year) == ("2024", "2023")
    assert other.value != newest.value
    assert (other.low, other.high) == (newest.low, newest.high)  # the sources still disagree
    assert find_factor("fra:2024") == newest
    assert (find_factor("world:2019").value, find_factor("world:2024")) == (475.0, WORLD)
    assert parse_factor("42") == user_supplied(42.0)
    assert parse_factor("France:2023") == other
    with pytest.raises(MeasurementError, match="of France for 1999: the table has 2023 and 2024"):
        find_factor("FRA:1999")
    for text in ("FRA:", "FRA:last"):
        with pytest.raises(MeasurementError, match="expected a year"):
            find_factor(text)


def test_every_row_of_the_table_is_a_factor() -> None:
    with TABLE.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            found = find_factor(line["code"])
            assert 0 < found.low <= found.value <= found.high <= 2000
            for package in ("carbontracker", "codecarbon"):
                dated = find_factor(f"{line['name']}:{line[f'{package}_year']}")
                years = (line["carbontracker_year"], line["codecarbon_year"])
                if years[0] != years[1]:
                    assert dated.value == float(line[f"{package}_g_per_kwh"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices = 0: expected 1 or more"),
        ({"devices": -1}, "devices = -1"),
        ({"per_day": 0.0}, "inferences a day = 0"),
        ({"per_day": math.nan}, "inferences a day = nan"),
        ({"years": -2.0}, "years = -2: expected above 0 and at most 100"),
        ({"years": 1000.0}, "years = 1000"),
        ({"per_day": 1e-9}, "expected at least one"),
    ],
)
def test_fleet_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        Fleet(**changes)


def test_embodied_carbon_is_shared_over_the_life() -> None:
    with pytest.raises(MeasurementError, match="embodied carbon of a device"):
        Embodied(device_kgco2e=-1.0)
    with pytest.raises(MeasurementError, match="lifetime"):
        Embodied(device_kgco2e=1.0, lifetime_years=0.0)
    fleet = Fleet(per_day=100.0, years=2.0, devices=10)
    assert fleet.inferences == 100 * 365 * 2 * 10
    device = Embodied(device_kgco2e=50.0, lifetime_years=5.0)
    assert device.kgco2e(fleet) == pytest.approx(10 * 50 * 2 / 5)  # M = TE x TS x RS, RS = 1
    results = neighbour("test_harness").results()
    found = account([row("train", 1.0)], results, fleet=fleet, embodied=device)
    mild = found.variants["mild"]
    assert mild.ugco2e is not None
    assert mild.sci_ugco2e is not None
    assert mild.life_kgco2e is not None
    share = 200e9 / fleet.inferences
    assert mild.sci_ugco2e.value == pytest.approx(mild.ugco2e.value + share)
    assert mild.life_kgco2e.value > 200
    with pytest.raises(MeasurementError, match="a fleet too"):
        account([], results, embodied=device)


def test_host_and_device_have_grids_of_their_own() -> None:
    results = neighbour("test_harness").results()
    rows = [row("train", 100.0), row("prune", 50.0)]
    terms: dict[str, Any] = {"intensity_g_per_kwh": 50.0, "pue": 1.5, "inferences": 1000}
    same = account(rows, results, **terms)
    apart = account(rows, results, device_intensity_g_per_kwh=600.0, **terms)
    assert apart.total_kgco2e == same.total_kgco2e
    here, there = same.variants["mild"], apart.variants["mild"]
    assert here.ugco2e is not None
    assert there.ugco2e is not None
    assert there.ugco2e.value == pytest.approx(12 * here.ugco2e.value)
    assert there.break_even == here.break_even
    joules, carbon = there.break_even.inferences, there.break_even_co2.inferences
    assert joules is not None
    assert carbon is not None
    assert carbon.value == pytest.approx(joules.value * 1.5 * 50 / 600)
    assert there.life_kgco2e is not None
    assert there.energy_mj is not None
    spent = 150 / 3.6e6 * 1.5 * 50 / 1000
    used = 1000 * there.energy_mj.value * 1e-3 / 3.6e6 * 600 / 1000
    assert there.life_kgco2e.value == pytest.approx(spent + used)


def test_one_grid_adds_no_uncertainty_to_the_break_even() -> None:
    results = neighbour("test_harness").results()
    rows = [row("train", 100.0), row("prune", 50.0)]
    same = account(rows, results, intensity_g_per_kwh=find_factor("FRA")).variants["mild"]
    assert same.break_even_co2 == same.break_even
    apart = account(
        rows,
        results,
        intensity_g_per_kwh=find_factor("FRA"),
        device_intensity_g_per_kwh=find_factor("POL"),
    ).variants["mild"]
    wide, narrow = apart.break_even_co2.inferences, same.break_even_co2.inferences
    assert wide is not None
    assert narrow is not None
    assert wide.high / wide.low > narrow.high / narrow.low


def test_saved_carbon_is_zero_at_the_break_even() -> None:
    results = neighbour("test_harness").results()
    rows = [row("train", 100.0), row("prune", 50.0)]
    terms: dict[str, Any] = {"intensity_g_per_kwh": 50.0, "device_intensity_g_per_kwh": 600.0}
    reached = account(rows, results, **terms).variants["mild"].break_even_co2.inferences
    assert reached is not None
    found = account(rows, results, inferences=round(reached.value), **terms).variants
    saved, spent = found["mild"].saved_kgco2e, found["mild"].life_kgco2e
    assert saved is not None
    assert spent is not None
    assert saved.value == pytest.approx(0.0, abs=1e-3 * spent.value)
    assert saved.low < 0 < saved.high
    assert found["dense"].saved_kgco2e is None


def test_damaged_ledger_makes_the_account_a_lower_bound() -> None:
    results = neighbour("test_harness").results()
    rows = [row("train", 100.0), row("prune", 50.0)]
    found = account(rows, results, unreadable=["ledger.jsonl, line 2: expected a row"])
    assert UNREADABLE in found.unmeasured_stages
    assert known(found.total_kwh).value == pytest.approx(150 / 3.6e6)
    paid = found.variants["mild"].break_even
    assert paid.inferences is None
    assert UNREADABLE in paid.reason
    assert "line 2" in damage(found)


def test_account_in_words() -> None:
    results = neighbour("test_harness").results()
    rows = [row("train", 100.0), row("prune", 50.0), row("bench-x86", None)]
    found = account(
        rows,
        results,
        intensity_g_per_kwh=find_factor("FRA"),
        fleet=Fleet(per_day=10.0, years=1.0, devices=3),
        embodied=Embodied(device_kgco2e=20.0),
    )
    console = Console(width=160, record=True, file=io.StringIO())
    for table in (stages_table(found), life_table(found)):
        console.print(table)
    text = console.export_text()
    assert "10,950 inferences: 10 a day over 1 year on 3 devices" in text
    assert "not measured" in text
    told = break_evens(found)
    assert list(told) == ["mild"]
    assert re.search(r"in joules after .* days\), in CO2 after .* days\)", told["mild"])
    notes = "\n".join(footnotes(found))
    assert "France, 2024" in notes
    assert "12\u00a0kg of CO2e for the fleet" in notes
    assert "lower bounds without: bench-x86" in notes


def test_break_even_is_where_the_lives_meet() -> None:
    found = break_even(
        Quantity(value=1000.0, low=1000.0, high=1000.0),
        InferenceEnergy(
            value=10.0,
            low=10.0,
            high=10.0,
            provenance="measured_counter",
            scope="",
            meter="rapl",
            net_value=None,
        ),
        interval(0.4, 0.5, 0.6),
    )
    assert found.inferences is not None
    assert found.inferences.value == pytest.approx(1000 / (10e-3 * 0.5))
    assert found.inferences.low == pytest.approx(1000 / (10e-3 * 0.6))
    assert found.inferences.high == pytest.approx(1000 / (10e-3 * 0.4))


@settings(deadline=None)
@given(joules=st.floats(1, 1e6), millijoules=st.floats(0.01, 1e3), ratio=st.floats(0.05, 0.9))
def test_break_even_meets_for_any_numbers(joules: float, millijoules: float, ratio: float) -> None:
    pruning = Quantity(value=joules, low=joules / 2, high=joules * 2)
    spread = interval(ratio * 0.95, ratio, ratio * 1.05)
    found = break_even(pruning, each_mj(millijoules), spread).inferences
    assert found is not None
    dense_life = found.value * millijoules * 1e-3
    assert joules + dense_life * ratio == pytest.approx(dense_life)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("high", [1.0, 1.2])
def test_no_break_even_where_no_saving_is_shown(high: float) -> None:
    pruning = Quantity(value=10.0, low=10.0, high=10.0)
    found = break_even(pruning, each_mj(1.0), interval(0.7, 0.9, high))
    assert found.inferences is None
    assert "no saving" in found.reason


def test_no_break_even_of_an_unmeasured_stage() -> None:
    pruning = Quantity(value=10.0, low=10.0, high=10.0)
    found = break_even(pruning, each_mj(1.0), interval(0.4, 0.5, 0.6), ["finetune-mild"])
    assert found.inferences is None
    assert "finetune-mild" in found.reason
    assert break_even(pruning, each_mj(1.0), interval(0.4, 0.5, 0.6), ["bench-x86"]).inferences
    assert break_even(pruning, None, None).reason == "inferences were not measured"


def test_account_of_a_run() -> None:
    results = neighbour("test_harness").results()
    rows = [
        row("train", 100.0),
        row("train", 50.0),
        row("prune", 20.0),
        row("finetune-mild", 30.0),
        row("bench-x86", 7.0),
    ]
    found = account(rows, results, intensity_g_per_kwh=400.0, pue=1.5, inferences=1000)
    assert known(found.training_joules).value == 150.0
    assert known(found.pruning_joules).value == 50.0
    assert known(found.observing_joules).value == 7.0
    assert known(found.total_kwh).value == pytest.approx(207 / 3.6e6)
    assert known(found.total_kgco2e).value == pytest.approx(207 / 3.6e6 * 1.5 * 0.4)
    assert [total.stage for total in found.stages] == [
        "train",
        "prune",
        "finetune-mild",
        "bench-x86",
    ]
    assert found.provenance == "estimated_model"
    assert (found.preset, found.runtime, found.embodied) == ("standard", "onnxruntime", None)
    assert found.valid
    mild, dense = found.variants["mild"], found.variants["dense"]
    assert mild.energy_mj is not None
    assert mild.ugco2e is not None
    assert mild.life_joules is not None
    assert dense.life_joules is not None
    assert mild.ugco2e.value == pytest.approx(mild.energy_mj.value * 1e-3 / 3.6e6 * 400 * 1e6)
    assert mild.life_joules.value == pytest.approx(200 + mild.energy_mj.value)
    assert dense.life_joules.value == pytest.approx(150 + 2 * mild.energy_mj.value)
    assert mild.break_even.inferences is not None
    assert dense.break_even.inferences is None
    plain = json.loads(json.dumps(schema.encode(found)))
    assert schema.decode(plain, Account, "account.json", RunError) == found


def test_account_without_measurements_says_what_is_missing() -> None:
    found = account([row("train", None), row("prune", 5.0)], None)
    assert found.unmeasured_stages == ("train",)
    assert found.stages[0].joules is None
    assert found.variants == {}
    assert found.runtime is None
    assert found.intensity is WORLD


@pytest.mark.parametrize("absurd", [0, -1, 10**400])
def test_life_without_inferences_or_of_too_many_is_refused(absurd: int) -> None:
    with pytest.raises(MeasurementError, match=r"inferences = .*: expected 1 or more"):
        account([], neighbour("test_harness").results(), inferences=absurd)


def test_stage_that_was_measured_in_part_is_a_lower_bound_everywhere() -> None:
    rows = [row("train", 100.0), row("prune", 50.0), row("prune", None, note="stuck")]
    found = account(rows, None)
    prune = found.stages[1]
    assert known(prune.joules).value == 50.0
    assert stage_joules(found, prune).startswith("at least 50")
    assert stage_carbon(found, prune).startswith("at least ")
    assert provenance(prune) == "ESTIMATE: stuck"
    assert known(found.total_kwh).value == pytest.approx(
        sum(known(total.joules).value for total in found.stages) / 3.6e6
    )
    pytest.importorskip("matplotlib")
    from greenprune.nncec import account_plots

    plot = account_plots.stages_bar(found)
    assert plot is not None
    assert "150 J over 2 stages" in plot.svg


def test_pue_below_one_is_refused() -> None:
    for absurd in (0.9, 156.0, math.nan):
        with pytest.raises(MeasurementError, match=r"1\.0 or more, and at most 5"):
            account([], None, pue=absurd)


def exactly(value: float) -> Quantity:
    return Quantity(value=value, low=value, high=value)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run with three finished stages, each with its row."""
    monkeypatch.setattr(deployment, "results_of", lambda _: neighbour("test_harness").results())
    monkeypatch.setattr(deployment, "default_runtime", lambda _: "onnxruntime")
    for number, stage in enumerate(("train", "prune", "finetune-mild")):
        content: dict[str, Any] = {
            "stage": stage,
            "inputs_sha256": str(number) * 64,
            "needs": {},
            "started": f"2026-01-0{number + 1}",
            "seconds": 1.0,
            "energy": None,
            "results": {},
            "resumed": stage == "finetune-mild",
        }
        (tmp_path / stage).mkdir()
        (tmp_path / stage / STAGE_FILE).write_text(json.dumps(content))
        identity = f"{stage} {content['started']} {content['inputs_sha256'][:16]}"
        note = BEGUN_BEFORE if content["resumed"] else ""
        entered = dataclasses.replace(row(stage, 100.0), identity=identity, note=note)
        ledger.append(tmp_path / LEDGER_FILE, entered)
    return Job(Recipe(), tmp_path)


def account_of(job: Job) -> Account:
    return deployment.account_from(job, ledger.scan(job.folder / LEDGER_FILE))


def test_finished_stage_without_a_row_is_unmeasured(job: Job) -> None:
    whole = account_of(job)
    assert whole.unmeasured_stages == ()
    assert whole.incomplete_stages == ("finetune-mild",)
    assert whole.intensity is WORLD
    assert whole.variants["mild"].break_even.inferences is not None
    path = job.folder / LEDGER_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    lost = account_of(job)
    assert lost.unmeasured_stages == ("prune",)
    assert lost.variants["mild"].break_even.inferences is None
    assert "prune" in lost.variants["mild"].break_even.reason
    path.unlink()
    gone = account_of(job)
    assert gone.unmeasured_stages == ("train", "prune", "finetune-mild")
    assert gone.total_kwh is gone.total_kgco2e is gone.pruning_joules is None
    assert gone.variants["mild"].break_even.inferences is None
    assert gone.variants["mild"].saved_kgco2e is None
    assert spent(gone) == "not measured"


def test_manifest_marks_joules_of_an_invalid_measurement(job: Job) -> None:
    results = neighbour("test_harness").results()
    failed = dataclasses.replace(results.verdict, valid=False, failures=("hot",))
    for verdict in (results.verdict, failed):
        told = deployment._energy_mj(job, dataclasses.replace(results, verdict=verdict))
        assert {found["valid"] for found in told.values()} == {verdict.valid}


def test_joules_of_a_device_elsewhere_take_the_place_of_the_runs_own(
    job: Job, tiny_bundle: Path
) -> None:
    from greenprune.harness import write_results

    path, name = job.folder / "carried-back.json", job.recipe.name
    ours = neighbour("test_harness").results(factor=0.25)
    for bundle, target in ((name, "jetson"), ("another", "x86")):
        write_results(path, dataclasses.replace(ours, bundle=bundle, target=target))
        with pytest.raises(RunError, match=f"'{bundle}' for '{target}'; expected .* '{name}'"):
            deployment.measured_elsewhere(job, path)
    (job.folder / "bundle-jetson").mkdir()
    content = json.loads((job.folder / "prune" / STAGE_FILE).read_text())
    content |= {"stage": "bundle-jetson", "started": "2026-01-09"}
    (job.folder / "bundle-jetson" / STAGE_FILE).write_text(json.dumps(content))
    shutil.copytree(tiny_bundle, job.folder / "bundle-jetson" / "bundle")
    written = dataclasses.replace(ours, bundle=name, target="jetson")
    write_results(path, written)
    with pytest.raises(RunError, match="of other networks than those in"):
        deployment.measured_elsewhere(job, path)
    networks = open_bundle(tiny_bundle).networks_sha256
    written = dataclasses.replace(written, networks_sha256=networks)
    write_results(path, written)
    there, results = deployment.measured_elsewhere(job, path)
    assert results == written
    assert there.bundle == job.folder / "bundle-jetson" / "bundle"
    entered = ledger.scan(job.folder / LEDGER_FILE)
    device, own = deployment.account_from(there, entered, results), account_of(job)
    assert known(device.variants["mild"].counted_mj).value == pytest.approx(
        known(own.variants["mild"].counted_mj).value / 2
    )
    assert device.pruning_joules == own.pruning_joules


def test_copied_line_counts_once(job: Job) -> None:
    path, whole = job.folder / LEDGER_FILE, account_of(job)
    path.write_text(path.read_text() * 2)
    assert account_of(job) == whole


def test_resumed_stages_are_said_to_be_lower_bounds(job: Job) -> None:
    found = account_of(job)
    assert understated(found) == {"pruning"}
    assert spent(found).startswith("at least ")
    assert stage_joules(found, found.stages[2]).startswith("at least 100")
    assert not stage_joules(found, found.stages[1]).startswith("at least")
    assert not life_carbon(found, "dense").startswith("at least")
    assert life_carbon(found, "mild").startswith("at least")
    assert saved_carbon(found, "mild").startswith("at most")
    assert "after at least" in break_evens(found)["mild"]
    assert any(note.startswith("measured in part: finetune-mild") for note in footnotes(found))
    assert BEGUN_BEFORE in provenance(found.stages[2])


def test_unmeasured_pruning_saves_nothing_that_is_known() -> None:
    results = neighbour("test_harness").results()
    rows = [row("train", 100.0), row("prune", 50.0), row("finetune-mild", None)]
    mild = account(rows, results).variants["mild"]
    assert mild.saved_kgco2e is None
    assert "finetune-mild" in mild.break_even.reason
    only_trained = account(rows[:1], results)
    assert only_trained.pruning_joules is None
    assert only_trained.variants["mild"].break_even.reason == NOTHING_PRUNED
    assert life_carbon(only_trained, "mild").startswith("at least")


def test_weights_trained_elsewhere_do_not_hide_the_break_even() -> None:
    found = account([row("load", 1.0), row("prune", 50.0)], neighbour("test_harness").results())
    assert found.unmeasured_stages == (TRAINED_ELSEWHERE,)
    assert found.training_joules is None
    assert understated(found) == {"training"}
    assert found.variants["mild"].break_even.inferences is not None
    assert not saved_carbon(found, "mild").startswith("at most")


def test_few_windows_show_no_saving() -> None:
    few = Interval(value=0.5, low=0.4, high=0.6, confidence=0.9375)
    found = break_even(exactly(10.0), each_mj(1.0), few)
    assert found.inferences is None
    assert "too few windows" in found.reason


def test_dense_energy_that_may_be_zero_gives_no_break_even() -> None:
    dense = dataclasses.replace(each_mj(1.0), low=0.0)
    found = break_even(exactly(10.0), dense, interval(0.4, 0.5, 0.6))
    assert found.inferences is None
    assert "above 0" in found.reason


def test_lives_meet_at_the_break_even_whatever_the_medians_are() -> None:
    results = neighbour("test_harness").results()
    dense, mild = results.candidates
    assert mild.energy_mj is not None
    assert dense.energy_mj is not None
    # r is 0.5; the ratio of the medians is now 0.9
    apart = dataclasses.replace(mild.energy_mj, value=0.9 * dense.energy_mj.value)
    results = dataclasses.replace(
        results, candidates=(dense, dataclasses.replace(mild, energy_mj=apart))
    )
    rows = [row("train", 100.0), row("prune", 50.0)]
    reached = account(rows, results).variants["mild"].break_even.inferences
    assert reached is not None
    lives = account(rows, results, inferences=round(reached.value)).variants
    one, other = lives["dense"].life_joules, lives["mild"].life_joules
    assert one is not None
    assert other is not None
    assert other.value == pytest.approx(one.value, rel=1e-3)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ({"provenance": None}, "null are: provenance"),
        ({"joules": None, "kwh": None, "kgco2e": None}, "null are: joules, kwh, kgco2e"),
        ({"seconds": math.nan}, "seconds: expected 0 or more, got nan"),
        ({"pue": 0.5}, "pue: expected"),
        ({"pue": math.nan}, "pue: expected"),
        ({"seconds": 99.0, "identity": "prune 1"}, "identity: expected one of its own"),
        ({"joules": {"value": 1.0, "low": 0.5, "high": 2.0}}, "kwh.value: expected 2.77778e-07"),
        ({"pue": 2.0}, "kgco2e.value: expected"),
        ({"intensity_g_per_kwh": {"value": 400.0, "low": 400.0, "high": 500.0}}, "kgco2e.high: "),
    ],
)
def test_row_that_cannot_be_is_damage(damage: dict[str, Any], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row("prune", 2.0))
    with path.open("a") as file:
        file.write(json.dumps(schema.encode(row("train", 5.0)) | damage) + "\n")
    found = ledger.scan(path)
    assert [kept.stage for kept in found.rows] == ["prune"]
    assert len(found.unreadable) == 1
    assert fault in found.unreadable[0]


@settings(deadline=None, max_examples=60)
@given(
    ends=st.lists(st.floats(0, 1e15), min_size=3, max_size=3).map(sorted),
    intensity=st.just(445.0) | st.floats(1e-6, 2000),
    pue=st.floats(1, 5),
)
def test_every_row_that_is_written_is_sound(
    ends: list[float], intensity: float, pue: float
) -> None:
    low, value, high = ends
    spent = dataclasses.replace(energy(1.0), value=value, low=low, high=high)
    entered = stage_row(
        identity="train 1",
        stage="train",
        seconds=1.0,
        energy=spent,
        intensity_g_per_kwh=intensity,
        pue=pue,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger.append(path, entered)
        assert ledger.scan(path) == ledger.Content(rows=(entered,), unreadable=())


def test_deep_nesting_is_damage_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"[" * 200_000 + b"\n")
    ledger.append(path, row("prune", 2.0))
    found = ledger.scan(path)
    assert len(found.rows) == len(found.unreadable) == 1


def test_whole_last_row_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    rows = (row("train", 5.0), row("prune", 2.0))
    ledger.append(path, rows[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert ledger.read(path) == rows[:1]
    ledger.append(path, rows[1])
    assert ledger.read(path) == rows


def test_ledger_of_before_the_notes_is_read(tmp_path: Path) -> None:
    plain = schema.encode(row("train", 5.0))
    del plain["note"]
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(plain) + "\n")
    assert ledger.read(path) == (row("train", 5.0),)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (609.4, "609"), (999.9, "1,000"), (1.234e9, "1,230,000,000"), (-0.01, "-0.01")],
)
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert rounded(value) == text
    assert rounded(609.4, 2) == "610"


def test_units_suit_the_figure() -> None:
    assert joules(exactly(36.9e3)) == "36.9\u00a0kJ"
    assert joules(exactly(0.0)) == "0\u00a0J"
    assert grams(exactly(2e-9)) == "2\u00a0µg"
    assert grams(Quantity(value=-4000.0, low=-5000.0, high=1.0)) == ("-4 [-5,\u00a00.001]\u00a0t")
    assert (
        quantity(Quantity(value=1e6, low=1e3, high=2e9)) == "1,000,000 [1,000,\u00a02,000,000,000]"
    )


def test_reason_of_a_gap_is_in_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stuck(_: Meter) -> Iterator[Window]:
        yield Window()
        raise MeasurementError("the counter did not move")

    monkeypatch.setattr(Meter, "measure", stuck)
    execute(Job(Recipe(), tmp_path), [Stage("prune", lambda _: {})])
    rows = ledger.read(tmp_path / LEDGER_FILE)
    assert [(entered.joules, entered.note) for entered in rows] == [
        (None, "the counter did not move")
    ]
    assert account(rows, None).stages[0].note == "the counter did not move"
