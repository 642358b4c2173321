"""Results on disk and beside each other: schema, CSV, the gate, races of bundles."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from greenprune import cli
from greenprune.errors import MeasurementError, StorageError
from greenprune.harness import (
    Results,
    check_destination,
    compare_results,
    read_results,
    write_results,
)
from greenprune.harness.bundle_race import BundleRace, make_race
from greenprune.harness.files import HERE, SCHEMA_FILES, results_schema, windows_csv
from greenprune.harness.results import MeasuredWindow
from greenprune.harness.summary import summarise_candidate


def neighbour(name: str) -> ModuleType:
    """Another test module: its builders are shared."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


harness = neighbour("test_harness")


def scattered(
    seed: int, factor: float = 1.0, *, windows: int = 10, preset: str = "standard"
) -> Results:
    """Dense and mild, windows that vary by 1 %; latencies and joules of mild times ``factor``."""
    draw = np.random.default_rng(seed)
    template: Results = harness.results(preset)

    def made(milliseconds: float) -> list[MeasuredWindow]:
        spread = draw.lognormal(0.0, 0.01, size=(windows, 2)) * milliseconds
        return [harness.window(block, *pair) for block, pair in enumerate(spread.tolist())]

    found = {"dense": made(2.0), "mild": made(1.0 * factor)}
    candidates = tuple(
        summarise_candidate(
            variant=name,
            runtime="onnxruntime",
            loaded=harness.LOADED,
            idle_watts=(1.0, 1.0),
            windows=each,
            dense_windows=found["dense"],
        )
        for name, each in found.items()
    )
    return dataclasses.replace(template, candidates=candidates)


def test_results_survive_the_disk_whole(tmp_path: Path) -> None:
    written = harness.results()
    write_results(tmp_path / "results.json", written)
    assert read_results(tmp_path / "results.json") == written
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["preset"] == "standard"
    assert content["candidates"][0]["windows"][0]["energy"]["provenance"] == "measured_counter"
    with pytest.raises(MeasurementError, match=r"ends in \.json"):
        write_results(tmp_path / "results.csv", written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema=2), "schema 2, this version of greenprune reads 4"),
        (lambda content: content.pop("schema"), "without a 'schema'"),
        (lambda content: content.update(pairs=[]), "a race of two bundles"),
        (lambda content: content.update(threads="2"), "'threads': expected 'int', got 'str'"),
        (lambda content: content.pop("verdict"), "missing required field 'verdict'"),
        (lambda content: content.update(speed=1), "unknown key 'speed'"),
        (lambda content: content["environment_before"].pop("cpu"), "environment_before"),
        (
            lambda content: content["environment_after"].update(moon="full"),
            "environment_after: unknown key moon",
        ),
        (lambda content: content.update(candidates=[]), "length >= 1"),
        (lambda content: content["candidates"][0].update(windows=[]), "length >= 1"),
        (
            lambda content: content["candidates"][0]["windows"][0].update(energy=0),
            r"candidates\[0\]\.windows\[0\]\.energy",
        ),
    ],
)
def test_damaged_results_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "results.json"
    write_results(path, harness.results())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def first_window(content: Any) -> Any:
    return content["candidates"][0]["windows"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: first_window(c)["latency"].update(mean_ns=0),
            r"\[0\]\.latency\.mean_ns: expect",
        ),
        (lambda c: first_window(c).update(inferences=0), "inferences: expected above 0, got 0"),
        (lambda c: first_window(c).update(seconds=-1.0), "seconds: expected above 0"),
        (lambda c: first_window(c)["energy"].update(value=0, low=0), "energy: expected low <="),
        (lambda c: first_window(c)["latency"].update(mean_ns=float("nan")), "finite .* got NaN"),
        (lambda c: first_window(c)["energy"].update(high=float("inf")), "got Infinity"),
        (lambda c: first_window(c).update(inferences=10**400), "expected finite numbers"),
        (lambda c: c["candidates"][1]["speedup"].update(low=9.0), "speedup: expected low <= value"),
        (
            lambda c: c["candidates"][1]["energy_mj"].update(value=-1.0, low=-2.0),
            "energy_mj: expected low <= value",
        ),
    ],
)
def test_figures_that_cannot_be_are_refused(
    tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = tmp_path / "results.json", tmp_path / "good.json"
    for each in (path, good):
        write_results(each, scattered(0))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=message):
        read_results(path)
    assert gate("--compare", good, path) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 200_000])
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(MeasurementError, match="expected results written by greenprune-bench"):
        read_results(path)


def test_what_the_schema_forbids_is_not_written(tmp_path: Path) -> None:
    wrong: Any = dataclasses.replace(harness.results(), threads="many")
    with pytest.raises(MeasurementError, match="threads"):
        write_results(tmp_path / "results.json", wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCHEMA_FILES)
def test_published_schema_is_that_of_the_records(name: str) -> None:
    """After a change: python -c "from greenprune.harness import files; files.publish_schemas()"."""
    published = json.loads((HERE / name).read_text())
    assert published == results_schema(SCHEMA_FILES[name])
    assert published["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_other_tools_accept_results_by_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from greenprune import schema

    for kind, content in ((Results, harness.results()), (BundleRace, race(1.0))):
        published = results_schema(kind)
        jsonschema.Draft202012Validator.check_schema(published)
        plain = json.loads(json.dumps(schema.encode(content)))
        jsonschema.validate(plain, published)
        plain["speed"] = 1
        with pytest.raises(jsonschema.ValidationError, match="speed"):
            jsonschema.validate(plain, published)


def test_csv_has_a_row_for_each_window_with_units_preset_and_provenance(tmp_path: Path) -> None:
    found = harness.results("quick")
    dense = found.candidates[0]
    first_try = harness.window(3, 9.0, None, invalid="did not move, twice")
    dense = dataclasses.replace(dense, discarded=(first_try,))
    found = dataclasses.replace(found, candidates=(dense, found.candidates[1]))
    write_results(tmp_path / "results.json", found)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == 21
    assert {row["preset"] for row in rows} == {"quick"}
    bad = [row for row in rows if row["counts"] == "False"]
    assert [(row["block"], row["invalid"], row["energy_j"]) for row in bad] == [
        ("3", "did not move, twice", "")
    ]
    assert bad[0]["energy_label"] == "not measured"
    assert rows.index(bad[0]) == 3  # before the window that took its place
    assert rows[0]["energy_provenance"] == "measured_counter"
    assert float(rows[0]["latency_p50_ns"]) == dense.windows[0].latency.p50_ns
    assert rows[0]["latency_p99_9_ns"] == ""


def judged(old: Results, new: Results, **options: Any) -> dict[str, str]:
    compared = compare_results(old, new, **options)
    assert compared.regression == any(c.judgement == "regression" for c in compared.changes)
    return {f"{c.variant} {c.quantity}": c.judgement for c in compared.changes}


def test_a_planted_regression_is_found_and_named() -> None:
    expected = {"dense latency": "no clear difference", "dense energy": "no clear difference"}
    old, slower = scattered(0), scattered(1, 1.05)
    worse = {"mild latency": "regression", "mild energy": "regression"}
    assert judged(old, slower) == expected | worse
    assert judged(slower, old) == expected | dict.fromkeys(worse, "improvement")
    assert judged(old, slower, threshold=0.2) == expected | dict.fromkeys(
        worse, "no clear difference"
    )
    table = compare_results(old, slower).table()
    assert table.row_count == 4
    assert "REGRESSION" in str(table.caption)


def test_equal_results_are_no_regression_in_95_of_100_simulations() -> None:
    # without a threshold, which is the harder gate
    found = [
        compare_results(scattered(2 * i), scattered(2 * i + 1), threshold=0.0) for i in range(100)
    ]
    assert sum(each.regression for each in found) <= 5
    assert not any(change.ratio.confidence < 0.9875 for each in found for change in each.changes)


def test_a_planted_regression_is_found_in_most_simulations() -> None:
    found = [compare_results(scattered(i), scattered(1000 + i, 1.05)) for i in range(40)]
    assert sum(each.regression for each in found) >= 38


def test_too_few_windows_support_nothing() -> None:
    compared = compare_results(scattered(0, windows=3), scattered(1, 2.0, windows=3))
    assert not compared.regression
    (told,) = compared.differences
    assert told.startswith("too few windows to find a regression: 90.00% sure at most, and 4 ")
    # five against five, as mlperf-tiny has them, are enough for four quantities
    compared = compare_results(scattered(0, windows=5), scattered(1, 2.0, windows=5))
    assert compared.regression
    assert compared.differences == ()


GPU = {
    "name": "A",
    "driver": "595",
    "clock_mhz": 1000,
    "memory_clock_mhz": 2000,
    "power_limit_watts": 250.0,
    "temperature_c": 40,
    "limited_by": [],
}


def test_what_differs_is_told() -> None:
    old = dataclasses.replace(
        scattered(0), environment_before=harness.ENVIRONMENT | {"gpus": [GPU]}
    )
    new = dataclasses.replace(
        scattered(1, preset="quick"),
        threads=4,
        environment_before=harness.ENVIRONMENT
        | {
            "cpu": "another",
            "versions": {"python": "3.12"},
            "gpus": [GPU | {"driver": "600"}],
            "clocks_locked": True,
            "energy_preference": "performance",
        },
    )
    told = "\n".join(compare_results(old, new).differences)
    for words in (
        "preset: standard (old), quick (new)",
        "threads: 2 (old), 4 (new)",
        "cpu: a test (old), another (new)",
        "versions: python 3.11 (old), python 3.12 (new)",
        "clocks locked: None (old), True (new)",
        "energy preference: None (old), performance (new)",
        "GPUs: A, driver 595, power limit 250.0 W (old), A, driver 600, power limit 250.0 W (new)",
    ):
        assert words in told, words
    assert compare_results(old, old).differences == ()
    # what a GPU does from moment to moment is no difference
    warmer = harness.ENVIRONMENT | {"gpus": [GPU | {"temperature_c": 60, "clock_mhz": 900}]}
    again = dataclasses.replace(old, environment_before=warmer)
    assert compare_results(old, again).differences == ()


def invalid(results: Results) -> Results:
    verdict = dataclasses.replace(results.verdict, valid=False, failures=("hot",))
    return dataclasses.replace(results, verdict=verdict)


def relabelled(results: Results, provenance: Any) -> Results:
    """The same joules, from elsewhere; None: without them."""
    candidates = []
    for candidate in results.candidates:
        energy, windows = candidate.energy_mj, candidate.windows
        assert energy is not None
        if provenance is None:
            windows = tuple(dataclasses.replace(window, energy=None) for window in windows)
        changed = dataclasses.replace(energy, provenance=provenance) if provenance else None
        candidates.append(dataclasses.replace(candidate, windows=windows, energy_mj=changed))
    record = dataclasses.replace(results.meter_record, provenance=provenance)
    return dataclasses.replace(results, candidates=tuple(candidates), meter_record=record)


def test_what_cannot_be_compared_is_an_error() -> None:
    old, new = scattered(0), scattered(1)
    with pytest.raises(MeasurementError, match=r"estimated_model and measured_counter.*--meter"):
        compare_results(old, relabelled(new, "estimated_model"))
    for pair, which in (((old, invalid(new)), "new"), ((invalid(old), new), "old")):
        with pytest.raises(MeasurementError, match=f"the {which} results are NOT VALID: hot"):
            compare_results(*pair)
    lacking = dataclasses.replace(new, candidates=new.candidates[:1])
    with pytest.raises(MeasurementError, match="lack mild on onnxruntime"):
        compare_results(old, lacking)
    more = compare_results(lacking, new)
    assert "only the new results have: mild on onnxruntime" in more.differences
    without = compare_results(old, relabelled(new, None))
    assert {change.quantity for change in without.changes} == {"latency"}
    assert any("joules are not compared" in words for words in without.differences)


@pytest.mark.parametrize(
    ("provenance", "changes", "why"),
    [
        ("measured_counter", {"name": "rapl+nvml"}, "different meters"),
        ("measured_counter", {"scope": "package and dram"}, "other parts of the machine"),
        ("estimated_model", {"tdp_watts": 15.0}, "estimated from another TDP"),
        ("measured_counter", {"tdp_watts": 15.0}, ""),  # the counter was read
    ],
)
def test_joules_of_another_meter_are_no_regression(
    provenance: Any, changes: dict[str, Any], why: str
) -> None:
    old, new = (relabelled(scattered(seed, 1 + 0.5 * seed), provenance) for seed in (0, 1))
    new = dataclasses.replace(new, meter_record=dataclasses.replace(new.meter_record, **changes))
    compared = compare_results(old, new)
    assert compared.regression  # of latency, in any case
    quantities = {change.quantity for change in compared.changes}
    assert quantities == ({"latency"} if why else {"latency", "energy"})
    told = [words for words in compared.differences if words.startswith("joules are not compared")]
    assert len(told) == bool(why)
    assert all(why in words for words in told)


def test_an_estimate_is_called_one_and_less_than_the_threshold_nothing() -> None:
    sides = [relabelled(harness.results(factor=f), "estimated_model") for f in (0.5, 0.45)]
    words = make_race(sides[0], sides[1], []).pairs[1].words
    assert words.endswith("energy (ESTIMATE): B takes 10.0% less than A, by the estimate")
    assert "no claim: within 3%, as two runs of the same bundle may differ" in (
        race(0.98).pairs[1].words
    )


def test_a_destination_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("greenprune.harness.bench", never)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "other.csv").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder.json", "other.json", "file/results.json"):
        assert gate(tmp_path, "-o", tmp_path / name) == 2
        assert str(tmp_path / name.split("/")[0].removesuffix(".json")) in capsys.readouterr().err
    check_destination(tmp_path / "new/results.json")
    assert not list((tmp_path / "new").iterdir())


def test_what_was_measured_is_printed_though_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, results: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("greenprune.harness.bench", lambda *a, **options: harness.results())
    monkeypatch.setattr("greenprune.harness.write_results", full)
    assert gate(tmp_path, "-o", tmp_path / "results.json", "--json") == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["bundle"] == "tiny"
    assert "the disk is full" in told.err


def race(factor: float, preset: str = "standard") -> BundleRace:
    """Bundles that share the machine's drift; B's mild takes ``factor`` of A's."""
    first, second = (
        harness.results(preset, factor=0.5),
        harness.results(preset, factor=0.5 * factor),
    )
    return make_race(first, second, ["they replay different images"])


def test_a_race_says_in_words_which_difference_is_real() -> None:
    faster = race(0.9)
    words = {pair.name: pair.words for pair in faster.pairs}
    assert words == {
        "dense on onnxruntime": "latency: no clear difference; "
        "energy (measured): no clear difference",
        "mild on onnxruntime": "latency: B takes 10.0% less than A, and the difference is real; "
        "energy (measured): B takes 10.0% less than A, and the difference is real",
    }
    assert faster.verdict.valid
    assert faster.verdict.notes == ("they replay different images",)
    (pair,) = (pair for pair in faster.pairs if pair.variant == "mild")
    assert pair.latency_ratio.value == pytest.approx(0.9)
    assert faster.table().row_count == 2
    slower = {pair.variant: pair.words for pair in race(1.25).pairs}
    assert "B takes 25.0% more than A, and the difference is real" in slower["mild"]


def test_a_quick_or_invalid_race_claims_nothing() -> None:
    assert "but no claim: preset quick" in race(0.9, "quick").pairs[1].words
    first, second = harness.results(), harness.results(factor=0.4)
    failed = dataclasses.replace(second.verdict, valid=False, failures=("hot",))
    found = make_race(first, dataclasses.replace(second, verdict=failed), [])
    assert not found.verdict.valid
    assert found.verdict.failures == ("B: hot",)
    assert "but no claim: the measurement is not valid" in found.pairs[1].words


def test_csv_of_a_race_tells_whose_a_window_is() -> None:
    rows = list(csv.DictReader(io.StringIO(windows_csv(race(1.0)))))
    assert [row["contestant"] for row in rows] == ["A"] * 20 + ["B"] * 20


def gate(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.bench_main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_gate_answers_by_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, same, slower = (tmp_path / f"{name}.json" for name in ("old", "same", "slower"))
    for path, content in ((old, scattered(0)), (same, scattered(1)), (slower, scattered(2, 1.05))):
        write_results(path, content)
    assert gate("--compare", old, same) == 0
    assert "no regression" in capsys.readouterr().out
    assert gate("--compare", old, slower, "--json") == 1
    assert json.loads(capsys.readouterr().out)["regression"] is True
    assert gate("--compare", old, slower, "--threshold", "0.3") == 0
    same.write_text("{}")
    assert gate("--compare", old, same) == 2
    assert gate("--compare", old, tmp_path / "none.json") == 2
    assert gate("--compare", old, old, "-o", tmp_path / "x.json") == 2
    told = capsys.readouterr().err
    assert "none.json" in told
    write_results(same, invalid(scattered(1)))
    assert gate("--compare", old, same) == 2
    assert "NOT VALID: hot" in capsys.readouterr().err


def test_command_line_of_bench_is_checked_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (("a", "b", "c"), "Got 3 bundles"),
        (("a", "b", "--certify"), "Got 2 bundles, expected 1."),
        (("a", "-o", "results.txt"), "ends in .json"),
        (("--compare", "old.json"), "requires 2 arguments"),
        (("a", "--certify", "-o", "x.json"), "--output: not used with --certify"),
        (("a", "--certify", "--meter", "rapl"), "--meter: not used with --certify"),
        (("a", "--certify", "--preset", "standard"), "--preset: not used with --certify"),
        (("a", "--certify", "--tdp", "15"), "--tdp: not used with --certify"),
        (("--compare", "o", "n", "--preset", "quick"), "--preset: not used with --compare"),
        (("--compare", "o", "n", "--meter", "auto"), "--meter: not used with --compare"),
        (("--compare", "o", "n", "--tdp", "15"), "--tdp: not used with --compare"),
        (("--compare", "o", "n", "-o", "x.json"), "--output: not used with --compare"),
        (("--compare", "o", "n", "a"), "BUNDLE: not used with --compare"),
        (("--compare", "o", "n", "--certify"), "--certify: not used with --compare"),
        (("a", "--threshold", "0.1"), "--threshold: used with --compare only"),
    ):
        assert gate(*arguments) == 2
        assert words in capsys.readouterr().err
