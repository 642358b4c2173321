"""What runs on the device, where torch is not installed: exporting is done, measuring begins."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenprune import bundle

HOST_PACKAGES = (
    *("torch", "torchvision", "lightning_fabric", "onnx", "onnxscript", "safetensors"),
    *("sklearn", "jinja2", "matplotlib", "openvino"),
)
HIDE = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {HOST_PACKAGES} else find(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""
"""Makes Python find these packages nowhere, as in the base install."""

BUDGETS = {
    # the MACs bind: a timing is never what a test rests on
    "mild": ["latency_ms <= 1000", "macs x0.6"],
    "aggressive": ["latency_ms <= 1000", "macs x0.3"],
}


@pytest.fixture
def base_install(tmp_path: Path) -> dict[str, str]:
    """Environment variables under which only the base install's packages exist."""
    import os

    folder = tmp_path / "hide"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_base_install_has_no_torch(command_line: Any, base_install: dict[str, str]) -> None:
    line = command_line("greenprune", **base_install)
    line["args"] = [
        sys.executable,
        "-c",
        "import importlib.util as u\n"
        f"assert not [name for name in {HOST_PACKAGES} if u.find_spec(name)]\n"
        "import greenprune.runtime, greenprune.harness, greenprune.cli, sys\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    import torch\nexcept ModuleNotFoundError:\n    print('absent')",
    ]
    done = subprocess.run(**line, capture_output=True, check=False)
    assert done.stdout.strip() == "absent", done.stderr


def test_bench_without_torch(
    finished: Any, command: Any, base_install: dict[str, str], tmp_path: Path
) -> None:
    moved = shutil.copytree(finished.bundle, tmp_path / "on the device.bundle")
    options = ("--preset", "quick", "--threads", "1", "--json", "-o", "results.json")
    done = command("greenprune-bench", moved, *options, **base_install)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert answer["verdict"]["valid"] == (done.returncode == 0)
    assert "Traceback" not in done.stderr
    measured = {(found["variant"], found["runtime"]) for found in answer["candidates"]}
    variants = ("dense", "mild", "aggressive", "pair")
    assert measured == {(variant, "onnxruntime") for variant in variants}
    for found in answer["candidates"]:
        assert found["latency_ms"]["p50"]["value"] > 0
    pair = next(found for found in answer["candidates"] if found["variant"] == "pair")
    expected = finished.answer["variants"]["pair"]["replay_accept_rate"]
    assert pair["accept_rate"] == pytest.approx(expected)
    assert json.loads((tmp_path / "results.json").read_text()) == answer


def test_session_without_torch(
    finished: Any, command_line: Any, base_install: dict[str, str]
) -> None:
    opened = bundle.open_bundle(finished.bundle)
    inputs = finished.bundle / str(opened.manifest.samples.replay_inputs)
    line = command_line("greenprune", **base_install)
    line["args"] = [
        sys.executable,
        "-c",
        "import sys, json, numpy as np\n"
        "from greenprune.runtime import AdaptiveSession\n"
        f"inputs = np.load({str(inputs)!r})\n"
        # which runtime won the race is the machine's affair; this one comes with the base install
        f"with AdaptiveSession({str(finished.bundle)!r}, runtime='onnxruntime') as session:\n"
        "    (plain,) = session.run(None, {'input': inputs})\n"
        "    (logits,), info = session.run_with_info(None, {'input': inputs})\n"
        "assert np.array_equal(plain, logits) and 'torch' not in sys.modules\n"
        "print(json.dumps({'answers': logits.argmax(1).tolist(), 'routes': info.routes}))",
    ]
    done = subprocess.run(**line, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    targets = opened.read_array(str(opened.manifest.samples.replay_targets))
    accuracy = np.mean(np.array(answer["answers"]) == targets)
    # the 300 replayed images are all of the digits' test images
    assert accuracy == pytest.approx(finished.answer["variants"]["pair"]["accuracy"])
    accepted = np.mean([route == "aggressive" for route in answer["routes"]])
    assert accepted == pytest.approx(finished.answer["variants"]["pair"]["accept_rate"])


@pytest.mark.parametrize("arguments", [["run"], ["prune"], ["export"]])
def test_host_command_names_what_to_install(
    command: Any, base_install: dict[str, str], arguments: list[str]
) -> None:
    done = command("greenprune", *arguments, **base_install)
    assert done.returncode == 2
    if arguments != ["export"]:  # that one finds no run first
        assert "pip install 'greenprune[host]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def asked(schedule: Any, table: str = "table.json", **more: str) -> list[str]:
    budgets = {f"prune__{name}__budget": json.dumps(given) for name, given in BUDGETS.items()}
    return schedule(prune__cost_table=table, **budgets, **more)  # type: ignore[no-any-return]


@pytest.fixture
def carried(command: Any, base_install: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """``table.json`` in the test's folder, by the base install alone from the host's graphs."""
    coarse = ("--set", "prune.width_multiple=32")  # a grid of few points
    written = command("greenprune", "cost-table", *coarse, "-o", "probe")
    assert written.returncode == 0, written.stderr
    assert "greenprune-bench --cost-table probe" in written.stdout
    options = ("--cost-table", "probe", "-o", "table.json", "--threads", "1", "--meter", "none")
    done = command("greenprune-bench", *options, **base_install)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    table: dict[str, Any] = json.loads((tmp_path / "table.json").read_text())
    return table


def test_a_carried_table_prices_the_budgets_of_a_run(
    carried: dict[str, Any], command: Any, schedule: Any, tmp_path: Path
) -> None:
    done = command("greenprune", "prune", "--name", "priced", *asked(schedule))

    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "priced"
    kept = json.loads((folder / "price" / "table.json").read_text())
    assert kept["costs"] == carried["costs"]
    variants = json.loads((folder / "prune" / "stage.json").read_text())["results"]
    for name, share in (("mild", 0.6), ("aggressive", 0.3)):
        (step,) = variants[name]["budget"]
        quantities = step["quantities"]
        macs, latency = quantities["macs"], quantities["latency_ms"]
        assert macs["predicted"] <= share * macs["dense"]
        assert 0 < latency["predicted"] < latency["dense"] <= latency["goal"]

    other = command("greenprune", "prune", "--name", "other", *asked(schedule, threads="2"))
    assert other.returncode == 2, other.stderr
    assert "table.json" in other.stderr
    assert "threads" in other.stderr
