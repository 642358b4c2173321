"""The report: one file, nothing fetched, labels and caveats on the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from greenprune import api, cli
from greenprune.errors import MissingPackageError, StorageError
from greenprune.harness.results import Candidate, Results
from greenprune.meters import Energy
from greenprune.nncec import account_plots, plots
from greenprune.nncec.account import Account, account
from greenprune.nncec.factors import find_factor
from greenprune.nncec.ledger import stage_row
from greenprune.nncec.life import Embodied, Fleet
from greenprune.nncec.plots import dial_points, latency_share
from greenprune.nncec.report import headline, write_report
from greenprune.nncec.words import break_evens, life_table


def neighbour(name: str) -> ModuleType:
    """Another test module: its builders are shared."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured() -> Results:
    """Four candidates with estimated joules, preset quick."""
    found: Results = neighbour("test_harness").results("quick")

    def estimated(candidate: Candidate, variant: str, accept_rate: float | None) -> Candidate:
        assert candidate.energy_mj is not None
        energy = dataclasses.replace(candidate.energy_mj, provenance="estimated_model")
        return dataclasses.replace(
            candidate, variant=variant, accept_rate=accept_rate, energy_mj=energy
        )

    dense, mild = found.candidates
    return dataclasses.replace(
        found,
        meter="estimate",
        candidates=(
            estimated(dense, "dense", None),
            estimated(mild, "mild", None),
            estimated(mild, "aggressive", None),
            estimated(mild, "pair", 0.8),
        ),
    )


def accounted(
    results: Results, notes: Mapping[str, str] = MappingProxyType({}), **terms: Any
) -> Account:
    energy = Energy(
        value=100.0,
        low=50.0,
        high=150.0,
        provenance="estimated_model",
        scope="a test",
        meter="estimate",
        seconds=10.0,
    )
    rows = [
        stage_row(
            identity=stage,
            stage=stage,
            seconds=10.0,
            energy=energy,
            intensity_g_per_kwh=445.0,
            pue=1.0,
            note=notes.get(stage, ""),
        )
        for stage in ("train", "prune", "finetune-mild", "compile-x86", "bench-x86")
    ]
    return account(rows, results, **terms)


SUMMARY: dict[str, Any] = {
    "name": "digits <script>alert(1)</script>",
    "seed": 0,
    "machine": {"cpu": "Fast One", "governor": None, "versions": {"numpy": "2.0"}},
    "variants": {
        name: {"accuracy": accuracy, "macs": 1000, "params": 2000}
        for name, accuracy in (
            ("dense", 0.95),
            ("mild", 0.94),
            ("aggressive", 0.9),
            ("pair", 0.945),
        )
    },
    "selector": {"kind": "head", "reason": "ranks better", "table": [{"a": 1}]},
    "dial": {
        "runtime": "onnxruntime",
        "reference": "dense",
        "table": [
            {
                "threshold": threshold,
                "coverage": coverage,
                "accuracy": accuracy,
                "reference_accuracy": 0.94,
                "certified": certified,
            }
            for threshold, coverage, accuracy, certified in (
                (None, 0.0, 0.938, True),
                (0.9, 0.4, 0.93, True),
                (0.5, 0.9, 0.9, False),
            )
        ],
    },
    "widths": [{"layer": "conv$1_2", "dense": 16, "mild": 8, "aggressive": 8}],
    "layer_macs": [{"layer": "conv$1_2", "dense": 1600, "mild": 800, "aggressive": 0}],
    "budgets": [
        {
            "variant": "aggressive",
            "step": 1,
            "quantity": quantity,
            "dense": dense,
            "allowed": dense / 2,
            "predicted": predicted,
            "predicted_dense": 0.9 * dense,
            "measured": measured,
            "importance_kept": 0.875,
            "removed_blocks": ["layer1.2"],
        }
        for quantity, dense, predicted, measured in (
            ("latency, ms", 3.32, 1.58, 1.61),
            ("parameters", 853018.0, 404321.0, None),
        )
    ],
    "caveats": ["a first look"],
}


class Page(HTMLParser):
    """Open tags and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
                self.references.append(value or "")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    results = measured()
    write_report(path, SUMMARY, results, accounted(results))
    return path.read_text(encoding="utf-8")


def test_page_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert all(reference.startswith("#") for reference in parsed.references)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)|@import", page)


def test_drawings_refer_only_to_their_own_parts(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    wanted = {reference[1:] for reference in parsed.references}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(parsed.ids)
    # accuracy twice, latency, windows; ledger, life, break-even twice; widths, MACs
    assert parsed.tags.count("svg") == 10


def test_page_tells_preset_provenance_and_caveats(page: str) -> None:
    assert "every joule here is an ESTIMATE" in page
    drawn = re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)
    for figure in drawn:
        about_joules = re.search(r"[Ee]nergy|[Jj]oules|[Cc]arbon", figure)
        assert not about_joules or "(ESTIMATE)</figcaption>" in figure
        assert not about_joules or "(ESTIMATE)</text>" in figure  # on an axis
    assert "preset quick" in page
    assert "a first look" in page
    assert "our reading; NNCEC" in page
    assert "not included" in page
    assert "currentColor" in page
    assert "conv$1_2" in page  # drawn as it is
    assert "mathdefault" not in page
    assert "prefers-color-scheme: dark" in page


def test_page_shows_allowed_predicted_and_measured_side_by_side(page: str) -> None:
    rows = [" ".join(re.findall(r">([^<>]+)<", row)) for row in re.findall(r"<tr>.*?</tr>", page)]
    assert "aggressive, step 1 latency, ms 3.32 1.66 1.58 of 2.99 1.61 87.5% 1" in rows
    assert "aggressive, step 1 parameters 853,018 426,509 404,321 of 767,716 - 87.5% 1" in rows


def test_user_text_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert "digits &lt;script&gt;" in page


def test_dial_points_are_costed_and_placed() -> None:
    results = measured()
    costs = {c.variant: c.energy_mj.value for c in results.candidates if c.energy_mj}
    points = dial_points(results, SUMMARY, "mJ")
    assert [holds for _, _, holds in points] == [True, True, False]
    mild, middle, loose = points
    assert mild[0] == costs["mild"]
    assert middle[0] == pytest.approx(costs["aggressive"] + 0.6 * costs["mild"])
    assert loose[0] < middle[0]
    assert middle[1] == pytest.approx(95 - 1)  # dense's on the test images, less the loss
    assert dial_points(results, {}, "mJ") == []


def test_summary_for_pull_requests_is_beside_the_page(tmp_path: Path) -> None:
    results = measured()
    summary = {**SUMMARY, "caveats": ["a | b <i>c</i>"]}
    made = write_report(tmp_path / "page.html", summary, results, accounted(results))
    assert made == tmp_path / "page.md"
    text = made.read_text(encoding="utf-8")
    assert "digits &lt;script&gt;" in text
    assert "a \\| b &lt;i&gt;c&lt;/i&gt;" in text
    assert "ESTIMATE" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1
    with pytest.raises(StorageError, match=r"such as report\.html"):
        write_report(tmp_path / "page.md", summary, results, None)


def test_page_shows_the_fleet_and_a_damaged_ledger(tmp_path: Path) -> None:
    results = measured()
    found = accounted(
        results,
        fleet=Fleet(per_day=5000, years=4, devices=200),
        embodied=Embodied(device_kgco2e=25.0),
        device_intensity_g_per_kwh=find_factor("FRA"),
        unreadable=["ledger.jsonl, line 7: expected a row as JSON"],
    )
    write_report(tmp_path / "report.html", SUMMARY, results, found)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1,460,000,000 inferences: 5,000 a day over 4 years on 200 devices" in text
    assert "4\u00a0t of CO2e" in text
    assert "France, 2024" in text
    assert "line 7" in text
    assert "lower bounds" in text
    assert "Making the devices, 4\u00a0t, is the same for all and not drawn" in text


def test_stages_measured_in_part_are_named_with_the_reason(tmp_path: Path) -> None:
    found = accounted(measured(), notes={"prune": "a lower bound: killed once"})
    write_report(tmp_path / "report.html", SUMMARY, measured(), found)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "their joules are lower bounds: prune;" in text
    assert "ESTIMATE: a lower bound: killed once" in text


def test_headline_claims_only_what_is_shown() -> None:
    results = measured()
    text = headline(SUMMARY, results)
    assert "94.5%" in text
    assert "-0.5 points" in text
    assert "2.00 times" in text
    assert "50% of its energy (ESTIMATE)" in text
    assert "preset quick" in text
    *others, pair = results.candidates
    same = dataclasses.replace(pair.speedup, low=0.9, high=1.1, value=1.0)
    changed = dataclasses.replace(
        results, candidates=(*others, dataclasses.replace(pair, speedup=same))
    )
    assert "no clear difference" in headline(SUMMARY, changed)


def test_page_of_an_invalid_measurement_says_so_beside_its_claims(tmp_path: Path) -> None:
    results = measured()
    failed = dataclasses.replace(results.verdict, valid=False, failures=("hot",))
    results = dataclasses.replace(results, verdict=failed)
    text = headline(SUMMARY, results)
    assert "2.00 times" in text  # figures stay
    assert text.endswith("preset quick; the measurement is NOT VALID.")
    assert "VALID" not in headline(SUMMARY, measured())
    found = accounted(results)
    (paid,) = {told.rpartition(", ")[2] for told in break_evens(found).values()}
    assert paid == "by a measurement that is NOT VALID"
    plot = account_plots.break_even_curve(found, "J")
    assert plot is not None
    assert "by a measurement that is NOT VALID" in plot.note
    assert "NOT VALID" in str(life_table(found).title)
    assert "VALID" not in str(break_evens(accounted(measured())))


def on(runtime: str, candidate: Candidate, **changes: Any) -> Candidate:
    return dataclasses.replace(candidate, runtime=runtime, **changes)


def test_headline_takes_the_runs_runtime_and_claims_nothing_of_few_windows() -> None:
    results = measured()
    pair = results.candidates[-1]
    assert pair.energy_ratio is not None
    few = {
        name: dataclasses.replace(getattr(pair, name), confidence=0.9375)
        for name in ("speedup", "energy_ratio")
    }
    both = dataclasses.replace(results, candidates=(on("openvino", pair), on("x", pair, **few)))
    chosen = {**SUMMARY, "dial": {**SUMMARY["dial"], "runtime": "x"}}
    text = headline(chosen, both)
    assert "no clear difference in speed on x (too few windows)" in text
    assert "no clear difference in energy (too few windows) (ESTIMATE)" in text
    assert "2.00 times" not in text
    assert "50%" not in text
    elsewhere = {**SUMMARY, "dial": {**SUMMARY["dial"], "runtime": "gone"}}
    assert "on openvino" in headline(elsewhere, both)
    without = dataclasses.replace(results, candidates=results.candidates[:2])
    assert "the pair was not measured" in headline(SUMMARY, without)
    wide = dataclasses.replace(pair.energy_ratio, low=0.4, high=1.1)
    unsure = dataclasses.replace(results, candidates=(on("o", pair, energy_ratio=wide),))
    assert "with no clear difference in energy (ESTIMATE)" in headline(SUMMARY, unsure)


def test_latencies_count_by_the_inferences_of_their_window() -> None:
    dense = measured().candidates[0]
    one, two = dense.windows[:2]

    def window(found: Any, inferences: int, milliseconds: float) -> Any:
        latency = dataclasses.replace(found.latency, quantiles_ns=(1e6 * milliseconds,) * 101)
        return dataclasses.replace(found, inferences=inferences, latency=latency)

    unequal = (window(one, 900, 1.0), window(two, 100, 5.0))
    latencies, share = latency_share(dataclasses.replace(dense, windows=unequal))
    assert share[latencies <= 1.0].max() == pytest.approx(90.0)
    assert share[-1] == pytest.approx(100.0)


def test_no_plot_of_what_is_not_known() -> None:
    results = measured()
    nothing = account([], results)
    assert account_plots.stages_bar(nothing) is None
    assert account_plots.break_even_curve(nothing, "J") is None
    gone = accounted(results, absent=["export"])
    assert account_plots.break_even_curve(gone, "gCO2e") is None
    zero = Energy(
        value=0.0,
        low=0.0,
        high=0.0,
        provenance="measured_counter",
        scope="a test",
        meter="rapl",
        seconds=1.0,
    )
    terms: dict[str, Any] = {"seconds": 1.0, "intensity_g_per_kwh": 445.0, "pue": 1.0}
    rows = [
        stage_row(identity=stage, stage=stage, energy=zero, **terms) for stage in ("train", "prune")
    ]
    idle = account(rows, results)
    assert account_plots.stages_bar(idle) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an axis without a width
        assert account_plots.break_even_curve(idle, "J") is not None


def test_interval_that_leaves_the_plot_is_an_arrow() -> None:
    found = accounted(measured())
    mild = found.variants["mild"]
    assert mild.break_even.inferences is not None

    def drawn(high: float) -> str:
        reached = dataclasses.replace(mild.break_even.inferences, high=high)  # type: ignore[type-var]
        paid = dataclasses.replace(mild.break_even, inferences=reached)
        variants = {**found.variants, "mild": dataclasses.replace(mild, break_even=paid)}
        plot = account_plots.break_even_curve(dataclasses.replace(found, variants=variants), "J")
        assert plot is not None
        return plot.svg

    value = mild.break_even.inferences.value
    assert drawn(100 * value).count("<path") != drawn(1.1 * value).count("<path")


def test_windows_far_apart_are_drawn_on_a_logarithmic_axis(monkeypatch: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(plots, "logarithmic", asked.append)
    results = measured()
    plots.energy_windows(results)
    assert asked == []
    dense, *others = results.candidates
    large = tuple(dataclasses.replace(w, inferences=w.inferences // 20) for w in dense.windows)
    dense = dataclasses.replace(dense, windows=large)
    plots.energy_windows(dataclasses.replace(results, candidates=(dense, *others)))
    assert len(asked) == 1


def test_page_says_why_a_stage_was_not_measured(tmp_path: Path) -> None:
    results = measured()
    row = stage_row(
        identity="prune 1",
        stage="prune",
        seconds=1.0,
        energy=None,
        intensity_g_per_kwh=445.0,
        pue=1.0,
        note="the counter did not move",
    )
    write_report(tmp_path / "report.html", SUMMARY, results, account([row], results))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not measured: the counter did not move" in text
    assert "Spent so far: not measured" in text
    assert "not known" in text


def test_report_without_measurements(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", SUMMARY, None, None)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nothing was measured" in text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package_names_its_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"'{package}'.*greenprune\[host\]"):
        write_report(tmp_path / "report.html", SUMMARY, measured(), None)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``greenprune report`` asked the library for; there it finds a made-up run."""
    given: dict[str, Any] = {"unreadable": []}

    def carbon(run: Path | None, *, runs: Path, **terms: Any) -> Account:
        given.update(terms)
        renamed = {
            "intensity": "intensity_g_per_kwh",
            "device_intensity": "device_intensity_g_per_kwh",
        }
        wanted = {renamed.get(k, k): v for k, v in terms.items() if v is not None}
        return accounted(measured(), unreadable=given["unreadable"], **wanted)

    def report(run: Path | None, *, output: Path | None, account: Account, **_: Any) -> Path:
        given["account"] = account
        return output or tmp_path / "report.html"

    monkeypatch.setattr(api, "carbon", carbon)
    monkeypatch.setattr(api, "report", report)
    return given


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *arguments])
    return int(ended.value.code or 0)


def test_command_prints_the_life_of_a_fleet(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--carbon --per-day 5000 --years 4 --devices 200 --intensity FRA:2023 --pue 1.4"
    more = "--device-intensity 600 --embodied 25 --lifetime 8"
    assert run_command(*options.split(), *more.split()) == 0
    assert asked["fleet"] == Fleet(per_day=5000, years=4, devices=200)
    assert asked["embodied"] == Embodied(device_kgco2e=25, lifetime_years=8)
    assert asked["intensity"] == find_factor("FRA:2023")
    text = capsys.readouterr().out
    for words in ("1,460,000,000 inferences", "France, 2023", "PUE 1.4", "600 gCO2e/kWh"):
        assert words in text
    assert text.rstrip().endswith("report.html")


def test_command_answers_machines(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("--carbon", "--json", "--devices", "3") == 0
    assert asked["results"] is None
    answer = json.loads(capsys.readouterr().out)
    assert answer["account"]["fleet"] == {"per_day": 1000.0, "years": 3.0, "devices": 3}
    assert answer["account"]["variants"]["mild"]["break_even_co2"]["inferences"]["value"] > 0
    assert run_command("--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"report"}
    assert asked["fleet"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--devices 0", "devices = 0: expected 1 or more"),
        (f"--devices {'9' * 400}", "and at most 1,000,000,000,000"),
        ("--per-day -5", "inferences a day = -5: expected above 0"),
        ("--years 500", "years = 500: expected above 0 and at most 100"),
        ("--intensity -1", "above 0 and at most 2,000"),
        ("--intensity 445000", "above 0 and at most 2,000"),
        ("--device-intensity Frnce", "did you mean 'France'"),
        ("--device-intensity FRA:1901", "the table has 2023 and 2024"),
        ("--embodied -3", "embodied carbon of a device"),
        ("--embodied 3 --lifetime 0", "lifetime of a device"),
        ("--lifetime 4", "give --embodied too"),
        ("--pue 0.5", "pue = 0.5: expected 1.0 or more"),
    ],
)
def test_command_refuses_what_cannot_be(
    arguments: str, message: str, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*arguments.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_command_names_a_damaged_line_and_counts_the_others(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked["unreadable"] = ["ledger.jsonl, line 3: expected a row as JSON"]
    assert run_command("--carbon") == 2
    captured = capsys.readouterr()
    assert "finetune-mild" in captured.out
    assert "line 3" in captured.err
    assert "the other rows were counted" in captured.err
