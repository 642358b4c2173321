"""The account: ledger, factors, break-even and what may not be claimed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune import schema
from greenprune.errors import GreenpruneError, MeasurementError, RunError
from greenprune.harness.results import InferenceEnergy
from greenprune.harness.statistics import Interval
from greenprune.meters import Energy
from greenprune.nncec import ledger
from greenprune.nncec.account import Account, account, break_even
from greenprune.nncec.factors import WORLD, find_factor, user_supplied
from greenprune.nncec.ledger import Quantity, Row, stage_row


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
    with pytest.raises(RunError, match="line 2"):
        ledger.read(path)


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
    assert find_factor("world") is WORLD
    assert user_supplied(445.0) is WORLD
    assert user_supplied(50.0).source == "user supplied"
    with pytest.raises(GreenpruneError, match="did you mean 'Germany'"):
        find_factor("Germny")
    with pytest.raises(MeasurementError, match="above zero"):
        user_supplied(0.0)


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
    assert found.training_joules.value == 150.0
    assert found.pruning_joules.value == 50.0
    assert found.observing_joules.value == 7.0
    assert found.total_kwh.value == pytest.approx(207 / 3.6e6)
    assert found.total_kgco2e.value == pytest.approx(207 / 3.6e6 * 1.5 * 0.4)
    assert [total.stage for total in found.stages] == [
        "train",
        "prune",
        "finetune-mild",
        "bench-x86",
    ]
    assert found.provenance == "estimated_model"
    assert (found.preset, found.runtime, found.embodied) == (
        "standard",
        "onnxruntime",
        "not included",
    )
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


def test_pue_below_one_is_refused() -> None:
    with pytest.raises(MeasurementError, match=r"1\.0 or more"):
        account([], None, pue=0.9)
