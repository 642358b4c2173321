"""The report in a real browser: on a phone and a desk, light, dark and printed."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import sync_playwright

from greenprune.nncec.factors import find_factor
from greenprune.nncec.life import Embodied, Fleet
from greenprune.nncec.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

SIZES = {"phone": (375, 812), "tablet": (1000, 800), "desk": (1280, 900)}


def neighbour(name: str) -> ModuleType:
    """Another test module: its builders are shared."""
    path = Path(__file__).resolve().parents[1] / "unit" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def crowded() -> tuple[dict[str, Any], Any, Any]:
    """Everything that makes a page wide: four runtimes, 57 layers, long names and long numbers."""
    builders = neighbour("test_report")
    results = builders.measured()
    idle = {"idle_watts_before": 0.4, "idle_watts_after": 0.5}
    runtimes = ("onnxruntime", "openvino", "onnxruntime-int8", "openvino-int8")
    results = dataclasses.replace(
        results,
        candidates=tuple(
            dataclasses.replace(candidate, runtime=runtime, **idle)
            for runtime in runtimes
            for candidate in results.candidates
        ),
    )
    account = builders.accounted(
        results,
        intensity_g_per_kwh=find_factor("POL"),
        device_intensity_g_per_kwh=find_factor("FRA"),
        pue=1.5,
        fleet=Fleet(per_day=5000, years=4, devices=200),
        embodied=Embodied(device_kgco2e=0.002),
    )
    layers = [
        f"layer{group}.{block}.conv{i}" for group in (1, 2, 3) for block in range(9) for i in (1, 2)
    ]
    summary = {
        **builders.SUMMARY,
        "name": "a-name-without-any-break-" * 4,
        "machine": {"cpu": "x" * 300},
        "caveats": ["y" * 400, "a first look"],
        "widths": [
            {"layer": name, "dense": 64, "mild": 48, "aggressive": 16 + i % 16}
            for i, name in enumerate(layers)
        ],
        "layer_macs": [
            {"layer": name, "dense": 2_359_296, "mild": 1_500_000, "aggressive": 400_000}
            for name in layers
        ],
    }
    return summary, results, account


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, *crowded())
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_page_fits_is_silent_and_asks_for_nothing(
    size: str, scheme: str, page_file: Path, browser: Any, tmp_path: Path
) -> None:
    width, height = SIZES[size]
    complaints: list[str] = []
    requests: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    page.locator("summary").first.click()
    assert complaints == []
    assert requests == [page_file.as_uri()]
    for element in ("document.documentElement", "document.body"):
        inner, outer = page.evaluate(f"[{element}.scrollWidth, {element}.clientWidth]")
        assert inner <= outer <= width
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(FAINT) == []
    page.screenshot(path=tmp_path / f"{size}-{scheme}.png", full_page=True)
    page.close()


CLIPPED = """() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const part = text.getBoundingClientRect();
    return part.left < box.left - 2 || part.right > box.right + 2 || part.bottom > box.bottom + 2;
  }).map(text => svg.getAttribute("aria-label") + ": " + text.textContent);
})"""
"""Words of the plots that stick out of their picture."""

FAINT = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const found = new Set();
  for (const element of document.querySelectorAll("p, li, td, th, dt, dd, h1, h2, .note, .warn")) {
    const style = getComputedStyle(element);
    const under = style.backgroundColor === "rgba(0, 0, 0, 0)" ? paper : style.backgroundColor;
    if (ratio(style.color, under) < 4.5) found.add("text " + style.color);
  }
  for (const element of document.querySelectorAll("svg text")) {
    const fill = getComputedStyle(element).fill;
    if (ratio(fill, paper) < 4.5) found.add("text of a plot " + fill);
  }
  for (const element of document.querySelectorAll("svg path, svg use")) {
    if (element.closest("defs")) continue;  // a form, drawn elsewhere in its user's colours
    const style = getComputedStyle(element);
    const colour = style.fill === "none" || style.fillOpacity === "0" ? style.stroke : style.fill;
    if (colour.startsWith("rgb") && ratio(colour, paper) < 3) found.add("shape " + colour);
  }
  return [...found];
}"""
"""Text below WCAG's contrast of 4.5, shapes below 3."""


def test_print_is_black_on_white(page_file: Path, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(FAINT) == []
    made = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert made.startswith(b"%PDF")
    page.close()


def test_page_is_told_without_being_seen(page_file: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    pictures = page.locator("figure svg").all()
    assert len(pictures) == 10
    assert all(picture.get_attribute("role") == "img" for picture in pictures)
    names = [picture.get_attribute("aria-label") for picture in pictures]
    assert len(set(names)) == len(names)
    assert all(names)
    wide = page.locator(".scroll").all()
    assert wide
    assert all(box.get_attribute("tabindex") == "0" for box in wide)
    assert all(box.get_attribute("aria-label") for box in wide)
    page.close()


def test_policy_of_the_page_blocks_what_it_would_ask_for(
    page_file: Path, browser: Any, tmp_path: Path
) -> None:
    text = page_file.read_text(encoding="utf-8")
    changed = tmp_path / "changed.html"
    inserted = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "run"</script></main>'
    changed.write_text(text.replace("</main>", inserted), encoding="utf-8")
    complaints: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(changed.as_uri())
    assert page.title().endswith("greenprune report")
    assert sum("Content Security Policy" in complaint for complaint in complaints) >= 2
    page.close()
