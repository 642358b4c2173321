"""The account derived again by other code, from plain JSON, and by CodeCarbon's formula."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune import schema
from greenprune.nncec import ledger
from greenprune.nncec.account import account
from greenprune.nncec.factors import find_factor
from greenprune.nncec.life import Embodied, Fleet

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "account_check.py"
STAGES = ("train", "sparsify", "prune", "finetune-mild", "prune", "compile-x86", "bench-x86")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load(SCRIPT)
builders = load(Path(__file__).with_name("test_nncec.py"))
results = load(Path(__file__).with_name("test_harness.py")).results()


def plain(value: Any) -> Any:
    return json.loads(json.dumps(schema.encode(value)))


def rows_of(joules: list[float | None]) -> list[Any]:
    return [builders.row(stage, j) for stage, j in zip(STAGES, joules, strict=False)]


def test_script_imports_nothing_of_greenprune() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("greenprune")]


@settings(deadline=None, max_examples=40)
@given(
    joules=st.lists(st.none() | st.floats(0.01, 1e7), min_size=1, max_size=len(STAGES)),
    grids=st.tuples(*[st.sampled_from(["FRA", "POL:2023", "world", "42"])] * 2),
    pue=st.floats(1.0, 3.0),
    fleet=st.none()
    | st.builds(
        Fleet, per_day=st.floats(1, 1e6), years=st.floats(0.1, 20), devices=st.integers(1, 10**5)
    ),
    kilograms=st.none() | st.floats(0.1, 500),
)
def test_every_total_is_derived_again(
    joules: list[float | None],
    grids: tuple[str, str],
    pue: float,
    fleet: Fleet | None,
    kilograms: float | None,
) -> None:
    rows = rows_of(joules)
    host, device = (42.0 if grid == "42" else find_factor(grid) for grid in grids)
    made = account(
        rows,
        results,
        intensity_g_per_kwh=host,
        device_intensity_g_per_kwh=device,
        pue=pue,
        fleet=fleet,
        embodied=Embodied(device_kgco2e=kilograms) if kilograms and fleet else None,
    )
    compared, wrong = check.differences(plain(rows), plain(results), plain(made))
    assert wrong == []
    assert compared > 20
    assert check.codecarbon_agrees(check.by_codecarbon(plain(made)))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("total_kgco2e", "value"), "kgCO2e"),
        (("pruning_joules", "high"), "pruning: joules"),
        (("stages", 0, "joules", "low"), "stage train: joules"),
        (("variants", "mild", "break_even", "inferences", "value"), "break-even, joules"),
        (("variants", "mild", "break_even_co2", "inferences", "value"), "break-even, CO2"),
        (("variants", "mild", "break_even", "inferences", "low"), "break-even, joules"),
        (("variants", "mild", "break_even_co2", "inferences", "high"), "break-even, CO2"),
        (("variants", "mild", "saved_kgco2e", "low"), "saved, kgCO2e"),
        (("variants", "mild", "saved_kgco2e", "high"), "saved, kgCO2e"),
        (("variants", "mild", "counted_mj", "value"), "mJ of a life"),
        (("variants", "mild", "sci_ugco2e", "value"), "SCI"),
        (("variants", "dense", "life_kgco2e", "value"), "life, kgCO2e"),
        (("embodied_kgco2e",), "embodied"),
    ],
)
def test_wrong_figure_is_found(keys: tuple[Any, ...], name: str) -> None:
    rows = rows_of([100.0, 20.0, 5.0, 30.0])
    made = account(rows, results, fleet=Fleet(), embodied=Embodied(device_kgco2e=30.0))
    said = plain(made)
    place = copy.deepcopy(said)
    holder = place
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] *= 1.001
    assert check.differences(plain(rows), plain(results), said)[1] == []
    wrong = check.differences(plain(rows), plain(results), place)[1]
    assert any(name in line for line in wrong)


def test_provenance_that_is_too_strong_is_found() -> None:
    rows = rows_of([100.0, 20.0])
    said = plain(account(rows, results)) | {"provenance": "measured_counter"}
    (line,) = check.differences(plain(rows), plain(results), said)[1]
    assert line.startswith("provenance: derived estimated_model")


def test_ratio_that_the_windows_do_not_have_is_found() -> None:
    rows = rows_of([100.0, 20.0])
    said, changed = plain(account(rows, results)), plain(results)
    changed["candidates"][1]["energy_ratio"]["value"] *= 1.001
    (line,) = check.differences(plain(rows), changed, said)[1]
    assert line.startswith("mild: r, paired by block")


@pytest.mark.parametrize("absent", [[], ["prune"], ["train"]])
def test_break_even_is_told_where_and_only_where_pruning_is_known(absent: list[str]) -> None:
    rows = [builders.row("load", 1.0), builders.row("prune", 20.0)]
    said = plain(account(rows, results, absent=absent))
    told = said["variants"]["mild"]["break_even"]["inferences"]
    assert (told is None) == ("prune" in absent)
    assert check.differences(plain(rows), plain(results), said)[1] == []
    other = None if told else {"value": 1.0, "low": 1.0, "high": 1.0}
    said["variants"]["mild"]["break_even"]["inferences"] = other
    assert check.differences(plain(rows), plain(results), said)[1] != []


def test_codecarbon_agrees_for_its_own_country_figure() -> None:
    rows = rows_of([3.6e6])  # 1 kWh
    made = account(rows, results, intensity_g_per_kwh=find_factor("FRA:2023"), pue=1.5)
    found = check.by_codecarbon(plain(made))
    assert found["country"] == "FRA"
    assert found["own_grid_kg"] == pytest.approx(builders.known(made.total_kgco2e).value, rel=1e-12)
    assert found["own_grid_kg"] == pytest.approx(1.5 * found["own_g_per_kwh"] / 1000)
    assert not check.codecarbon_agrees(found | {"own_grid_kg": 1.0})


def test_check_of_a_run_folder(tmp_path: Path) -> None:
    for number, row in enumerate(rows_of([100.0, 20.0, 5.0, 30.0])):
        ledger.append(tmp_path / "ledger.jsonl", row)
        assert len(ledger.read(tmp_path / "ledger.jsonl")) == number + 1
    rows = ledger.read(tmp_path / "ledger.jsonl")
    for stage, name, content in (
        ("bench-x86", "results.json", results),
        ("account-x86", "account.json", account(rows, results)),
    ):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / name).write_text(json.dumps(schema.encode(content)))
    for stage in ("account-x86", "report-x86"):  # entered after the account was made
        ledger.append(tmp_path / "ledger.jsonl", builders.row(stage, 1.0))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["rows"] == 4
    damaged = tmp_path / "account-x86" / "account.json"
    damaged.write_text(damaged.read_text().replace('"pue": 1.0', '"pue": 1.2'))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "kgCO2e" in done.stdout
