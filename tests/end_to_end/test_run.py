"""``greenprune run`` on the embedded default: what it prints, what it leaves, what it repeats."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from greenprune import bundle
from greenprune.nncec import ledger

STAGES = (
    "train",
    "sparsify",
    "prune",
    "finetune-mild",
    "finetune-aggressive",
    "selector",
    "export",
    "calibrate",
    "compile-x86",
    "race-x86",
    "certify-x86",
    "bundle-x86",
    "bench-x86",
    "account-x86",
    "report-x86",
)
VARIANTS = ("dense", "mild", "aggressive", "pair")


def stage_files(run: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every stage.json."""
    return {
        path.parent.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.glob("*/stage.json")
    }


def test_answer_has_what_the_design_promises(finished: Any) -> None:
    answer = finished.answer
    assert {"run", "bundle", "report", "seconds", "variants", "account"} <= set(answer)
    assert tuple(answer["variants"]) == VARIANTS
    for name, found in answer["variants"].items():
        assert {"accuracy", "macs", "params", "latency_ms", "energy_mj"} <= set(found), name
        assert 0.5 < found["accuracy"] <= 1.0, name  # ten classes: far above chance
        assert "onnxruntime" in found["latency_ms"], name
        for latency in found["latency_ms"].values():
            assert 0 < latency["min"] <= latency["p50"] <= latency["p90"], name
            assert latency.get("p99", latency["p90"]) >= latency["p90"], name
        energy = found["energy_mj"]
        if energy is not None:  # no meter is an answer; zero would not be one
            assert {"value", "low", "high", "provenance"} <= set(energy)
            assert 0 < energy["low"] <= energy["value"] <= energy["high"], name
    dense, mild, aggressive, pair = (answer["variants"][name] for name in VARIANTS)
    assert aggressive["macs"] < mild["macs"] < dense["macs"]
    assert aggressive["params"] < mild["params"] < dense["params"]
    assert mild["macs"] <= 0.6 * dense["macs"]
    assert aggressive["macs"] <= 0.25 * dense["macs"]
    assert 0.0 <= pair["accept_rate"] <= 1.0
    assert 0.0 <= pair["replay_accept_rate"] <= 1.0
    for key in ("run", "bundle", "report"):
        assert (finished.folder.parents[1] / answer[key]).exists(), key


def test_stderr_tells_every_stage_in_order(finished: Any) -> None:
    begun = re.findall(r"^\[(\d+)/15\] (\S+) …$", finished.stderr, re.MULTILINE)
    assert begun == [(str(number), name) for number, name in enumerate(STAGES, start=1)]


def test_every_stage_is_on_disk(finished: Any) -> None:
    keys = {"stage", "inputs_sha256", "seed", "versions", "seconds", "energy", "results"}
    for name in STAGES:
        content = json.loads((finished.folder / name / "stage.json").read_text())
        assert keys <= set(content), name
        assert content["stage"] == name
        assert re.fullmatch("[0-9a-f]{64}", content["inputs_sha256"])
    assert len({c for c, _ in stage_files(finished.folder).values()}) == len(STAGES)
    assert not list(finished.folder.rglob(".partial-*"))
    assert not any((finished.folder / "checkpoints").glob("*")), "left-over checkpoints"
    pickled = {".pt", ".pth", ".th", ".pkl", ".pickle"}
    assert not [path for path in finished.folder.rglob("*") if path.suffix in pickled]


def test_bundle_verifies_and_carries_its_parts(finished: Any) -> None:
    opened = bundle.open_bundle(finished.bundle)
    opened.verify()
    manifest = opened.manifest
    assert set(manifest.variants) == {"dense", "mild", "aggressive"}
    for variant in manifest.variants.values():
        assert set(variant.artifacts) == {"onnxruntime", "openvino"}
    assert [row.max_accuracy_loss for row in manifest.selector.table] == [0.01, 0.02, 0.03, 0.05]
    assert manifest.class_names == tuple("0123456789")
    assert manifest.samples.replay_inputs is not None
    assert opened.read_array(manifest.samples.replay_inputs).shape == (300, 1, 32, 32)


def test_ledger_has_a_row_a_stage(finished: Any) -> None:
    rows = ledger.read(finished.folder / "ledger.jsonl")
    assert [row.stage for row in rows] == list(STAGES)
    assert len({row.identity for row in rows}) == len(rows)
    for row in rows:
        assert row.seconds > 0
        assert (row.joules is None) == (row.provenance is None)


class Resources(HTMLParser):
    """Collects whatever a browser would fetch, and the words of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        fetching = {"src", "srcset", "data", "poster", "background", "action"}
        if tag in ("link", "use", "image"):
            fetching |= {"href", "xlink:href"}
        for name, value in attributes:
            if name in fetching and value:
                self.fetched.append(value)
            if name == "style" and value:
                self._style(value)
        if tag in ("script", "iframe", "object", "embed"):
            self.fetched.append(f"<{tag}>")

    def handle_data(self, data: str) -> None:
        self._style(data)
        self.words.append(data)

    def _style(self, text: str) -> None:
        self.fetched += re.findall(r"""(?:@import\s+|url\(\s*)["']?([^"')]+)""", text)


def test_report_stands_alone_and_says_the_accept_rate(finished: Any) -> None:
    page = finished.folder / "report-x86" / "report.html"
    found = Resources()
    found.feed(page.read_text(encoding="utf-8"))
    elsewhere = [each for each in found.fetched if not each.startswith(("#", "data:"))]
    assert not elsewhere
    words = " ".join(" ".join(found.words).split())
    for variant in VARIANTS:
        assert variant in words.lower()
    assert "accept" in words.lower()
    rate = finished.answer["variants"]["pair"]["accept_rate"]
    shown = {f"{rate:.0%}", f"{rate:.1%}", f"{rate:.2%}"}
    assert any(each in words or each.replace("%", " %") in words for each in shown), shown


def test_second_run_does_nothing_again(
    finished: Any, command: Any, schedule: Any, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "runs")
    before = stage_files(run)
    entered = (run / "ledger.jsonl").read_bytes()
    done = command("greenprune", "run", "--name", "digits", *schedule())
    assert done.returncode == 0, done.stderr
    expected = [f"[{number}/15] {name}: complete" for number, name in enumerate(STAGES, start=1)]
    assert done.stderr.splitlines() == expected
    assert stage_files(run) == before
    assert (run / "ledger.jsonl").read_bytes() == entered
    for word in (*VARIANTS, "accuracy", "MACs", "onnxruntime", "openvino", "accepts"):
        assert word in done.stdout, f"the table does not say '{word}'"
    accuracy = f"{finished.answer['variants']['pair']['accuracy']:.2%}"
    assert accuracy in next(line for line in done.stdout.splitlines() if "pair" in line)


def test_changed_key_runs_what_depends_on_it_and_nothing_else(
    finished: Any, command: Any, schedule: Any, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "runs")
    before = stage_files(run)
    changed = ("--set", "account.inferences=5")
    done = command("greenprune", "run", "--json", "--name", "digits", *schedule(), *changed)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["variants"] == finished.answer["variants"]
    assert answer["account"] != finished.answer["account"]
    after = stage_files(run)
    assert {name for name in STAGES if after[name] != before[name]} == {"account-x86", "report-x86"}
    rows = [row.stage for row in ledger.read(run / "ledger.jsonl")]
    assert rows == [*STAGES, "account-x86", "report-x86"]


def test_leftovers_of_killed_writers_vanish(
    finished: Any, command: Any, schedule: Any, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "runs")
    folder, file = run / ".partial-train-abc", run / "checkpoints" / ".partial-abc"
    for left in (folder / "weights.safetensors", file):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"half")
    done = command("greenprune", "run", "--name", "digits", *schedule())
    assert done.returncode == 0, done.stderr
    assert [left for left in (folder, file) if left.exists()] == []


def test_row_that_a_full_disk_cut_short_does_not_stop_the_run(
    finished: Any, command: Any, schedule: Any, tmp_path: Path
) -> None:
    ledger_file = finished.copy(tmp_path / "runs") / "ledger.jsonl"
    whole = ledger_file.read_bytes()
    ledger_file.write_bytes(whole[:-40])
    done = command("greenprune", "run", "--name", "digits", *schedule())
    assert done.returncode == 0, done.stderr
    assert [row.stage for row in ledger.read(ledger_file)] == list(STAGES)
