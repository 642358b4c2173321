"""``greenprune sweep`` through two real Ray workers: killed, resumed, and one point that fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="a sweep needs the extra 'sweep'")
pytest.importorskip("moocore", reason="a sweep needs the extra 'sweep'")

from greenprune import bundle
from greenprune.nncec import ledger

LIMIT_SECONDS = 300.0
GOOD = ("x86-macs-x0.5", "x86-macs-x0.3")
OUT_OF_REACH = "x86-macs-x0.001"
POINTS = [part for share in ("0.5", "0.3", "0.001") for part in ("--budgets", f"macs x{share}")]
QUICK = {
    "train__epochs": "3",
    "sparsify__epochs": "1",
    "finetune__mild__epochs": "1",
    "finetune__aggressive__epochs": "1",
    "selector__epochs": "20",
    "compile__runtimes": '["onnxruntime"]',
}


@pytest.fixture
def sweep_line(command_line: Any, schedule: Any) -> Iterator[Any]:
    """Arguments of ``subprocess`` for ``greenprune sweep`` and more; Ray's folder is a short path,
    as its sockets' names may not be long."""
    folder = tempfile.mkdtemp(prefix="ray-")

    def build(name: str, *arguments: str) -> Any:
        return command_line("greenprune", name, *arguments, RAY_TMPDIR=folder)

    yield build
    shutil.rmtree(folder, ignore_errors=True)


def files(runs: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every stage.json and point.json."""
    return {
        str(path.relative_to(runs)): (path.read_bytes(), path.stat().st_mtime_ns)
        for name in ("stage.json", "point.json")
        for path in runs.rglob(name)
    }


def kill_after_one_point(line: dict[str, Any], folder: Path) -> None:
    """Start it, and kill it alone, without a chance to clear up, when one good point is done."""
    process = subprocess.Popen(**line, stderr=subprocess.PIPE, start_new_session=True)
    limit = time.monotonic() + LIMIT_SECONDS
    while not list(folder.glob("*/point.json")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < limit, "waited for a point in vain"
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(workers) > 2, "no Ray"
    _, alive = psutil.wait_procs(workers, timeout=LIMIT_SECONDS)
    assert not alive, "Ray outlives the one who started it"


def test_sweep_killed_and_resumed(sweep_line: Any, schedule: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "many"
    options = (*POINTS, "--workers", "2", "--name", "many", *schedule(**QUICK))

    kill_after_one_point(sweep_line("sweep", *options), folder)
    before = files(folder)
    assert sum(f"{name}/point.json" in before for name in GOOD) == 1, "the kill came too late"

    done = subprocess.run(
        **sweep_line("sweep", "--json", *options),
        capture_output=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )

    assert done.returncode == 1, done.stderr  # a point failed
    after = files(folder)
    assert {name: after[name] for name in before} == before, "something was done again"
    answer = json.loads(done.stdout)
    assert answer["failed"] == [OUT_OF_REACH]
    points = {point["name"]: point for point in answer["points"]}
    assert [points[name]["state"] for name in (*GOOD, OUT_OF_REACH)] == ["done", "done", "failed"]
    assert "Traceback" not in done.stderr
    assert "budget" in points[OUT_OF_REACH]["error"] or "macs" in points[OUT_OF_REACH]["error"]
    check_points(folder, points)
    check_front(folder, answer["fronts"]["x86"])

    picked = subprocess.run(
        **sweep_line("pick", "many", "--accuracy", "0.2", "--json", "-o", "best.bundle"),
        capture_output=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert picked.returncode == 0, picked.stderr
    chosen = json.loads(picked.stdout)
    bundle.open_bundle(tmp_path / chosen["bundle"]).verify()
    assert chosen["figures"] == points[chosen["point"]]["measured"]["variants"][chosen["variant"]]


def check_points(folder: Path, points: dict[str, Any]) -> None:
    """Trained once, measured each; every point's own account counts the training."""
    shared = (folder / "base" / "train" / "stage.json").read_bytes()
    for name in GOOD:
        assert (folder / name / "train" / "stage.json").read_bytes() == shared
        rows = [row.stage for row in ledger.read(folder / name / "ledger.jsonl")]
        assert rows[:2] == ["train", "sparsify"]
        assert len(set(rows)) == len(rows)
    variants = {name: points[name]["measured"]["variants"] for name in GOOD}
    loose, tight = (variants[name]["aggressive"] for name in GOOD)
    dense = variants[GOOD[0]]["dense"]
    assert tight["macs"] <= 0.3 * dense["macs"] < loose["macs"] <= 0.5 * dense["macs"]
    assert tight["bytes"] < loose["bytes"] < dense["bytes"]
    for found in variants.values():
        assert found["pair"]["bytes"] == found["mild"]["bytes"] + found["aggressive"]["bytes"]
        for figures in found.values():
            assert figures["latency_ms"]["onnxruntime"]["mean"] > 0
            assert 0 <= figures["development_accuracy"] <= 1


def check_front(folder: Path, found: dict[str, Any]) -> None:
    assert {"accuracy lost", "latency", "bytes"} <= set(found["objectives"])
    assert found["front"]
    page = (folder / "front.html").read_text(encoding="utf-8")
    assert OUT_OF_REACH in page
    for name in found["front"]:
        assert name in page
    assert len((folder / "front.csv").read_text().splitlines()) == 1 + 3 * len(GOOD)
