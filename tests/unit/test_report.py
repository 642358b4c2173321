"""The report: one file, nothing fetched, labels and caveats on the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from greenprune.errors import MissingPackageError
from greenprune.harness.results import Candidate, Results
from greenprune.meters import Energy
from greenprune.nncec.account import Account, account
from greenprune.nncec.ledger import stage_row
from greenprune.nncec.report import headline, write_report


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


def accounted(results: Results) -> Account:
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
        )
        for stage in ("train", "prune", "bench-x86")
    ]
    return account(rows, results)


SUMMARY: dict[str, Any] = {
    "name": "digits <script>alert(1)</script>",
    "seed": 0,
    "machine": {"cpu": "Fast One", "governor": None, "versions": {"numpy": "2.0"}},
    "stages": [],
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
    "widths": [{"layer": "conv$1_2", "dense": 16, "mild": 8, "aggressive": 8}],
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
    assert not re.search(r"url\((?!#)|@import", page)


def test_drawings_refer_only_to_their_own_parts(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    wanted = {reference[1:] for reference in parsed.references}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(parsed.ids)
    assert parsed.tags.count("svg") == 6


def test_page_tells_preset_provenance_and_caveats(page: str) -> None:
    assert "every joule here is an ESTIMATE" in page
    assert "(ESTIMATE)" in page  # in a plot's axis
    assert "preset quick" in page
    assert "a first look" in page
    assert "our reading; NNCEC" in page
    assert "not included" in page
    assert "currentColor" in page
    assert "conv$1_2" in page  # drawn as it is
    assert "mathdefault" not in page
    assert "prefers-color-scheme: dark" in page


def test_user_text_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert "digits &lt;script&gt;" in page


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
