"""Another package's target: installed by pip, found by its entry point, exported for, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exporting needs the extra 'host'")

MODULE = """
from greenprune.registry import Capabilities
from greenprune_targets import onnxruntime_cpu
from greenprune_targets.base import BaseTarget


class Toaster(BaseTarget):
    name = "toaster"
    description = "A toaster with a processor in it"
    capabilities = Capabilities(
        precisions=("fp32",),
        runtimes=("onnxruntime",),
        opset=19,
        width_multiple=4,
        meters=("estimate",),
        machines=("x86_64", "AMD64", "aarch64", "arm64"),
        status="ready, if the bread is out",
    )

    def compile(self, graph, build, folder, name):
        self.check_build(build)
        return onnxruntime_cpu.compile_graph(graph, build, folder, name)

    def open(self, artifact, runtime, threads):
        self.check_runtime(runtime)
        return onnxruntime_cpu.open_session(artifact, threads)


class Unfinished(BaseTarget):
    name = "unfinished"
"""
ENTRY_POINTS = """\
[greenprune.targets]
toaster = toasters:Toaster
unfinished = toasters:Unfinished
forgotten = toasters:Forgotten
unbuilt = toasters_unbuilt:Unbuilt
"""
BROKEN = {
    "unfinished": "toasters:Unfinished cannot be loaded: Can't instantiate abstract class",
    "forgotten": "toasters:Forgotten cannot be loaded: module 'toasters' has no attribute",
    "unbuilt": "toasters_unbuilt:Unbuilt cannot be loaded: No module named 'toasters_unbuilt'",
}
SHORT = ("train", "sparsify", "finetune.mild", "finetune.aggressive")

Run = Any


def write_wheel(folder: Path) -> Path:
    """A wheel as any build backend writes it: the module, and what pip must know."""
    path = folder / "toasters-1.0-py3-none-any.whl"
    info = "toasters-1.0.dist-info"
    files = {
        "toasters.py": MODULE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: toasters\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": ENTRY_POINTS,
    }
    listed = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in (files | {f"{info}/RECORD": listed}).items():
            wheel.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def greenprune(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``greenprune(command, ...)`` runs it where the package is installed, in a folder of its
    own."""
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("third_party")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    line = [*install, "--target", place / "site", write_wheel(place)]
    subprocess.run([str(part) for part in line], check=True)
    (place / "tmp").mkdir()
    paths = [str(place / "site"), *filter(None, sys.path)]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(place / "tmp")}
    entries = {"greenprune": "main", "greenprune-export": "export_main"}
    entries |= {"greenprune-bench": "bench_main"}

    def run(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        code = f"from greenprune import cli; cli.{entries[command]}()"
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=place,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    return run


def test_it_is_listed_and_broken_ones_do_not_hide_it(greenprune: Run) -> None:
    done = greenprune("greenprune", "targets", "--json")

    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["toaster"]["description"] == "A toaster with a processor in it"
    assert listed["toaster"]["runtimes_here"] == ["onnxruntime"]
    assert {"x86", "arm", "jetson-orin-nano"} <= set(listed)
    assert not set(BROKEN) & set(listed)
    complaints = done.stderr.splitlines()
    assert len(complaints) == len(BROKEN)
    for name, reason in BROKEN.items():
        assert any(f"target '{name}': {reason}" in line for line in complaints), complaints


def test_the_doctor_tells_of_broken_ones(greenprune: Run) -> None:
    done = greenprune("greenprune", "doctor", "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["targets"]
    assert found["toaster"]["status"] == "ready, if the bread is out"
    for name, reason in BROKEN.items():
        assert reason in found[name]["status"]


def test_export_and_bench(greenprune: Run, tmp_path: Path) -> None:
    """Its graphs are of the opset that it wants."""
    onnx = pytest.importorskip("onnx")
    epochs = [part for name in SHORT for part in ("--set", f"{name}.epochs=1")]
    pruned = greenprune("greenprune", "prune", "--name", "digits", "--set", "threads=1", *epochs)
    assert pruned.returncode == 0, pruned.stderr

    refused = greenprune("greenprune-export", "--target", "unfinished", "-o", "no.bundle")
    assert refused.returncode == 2
    assert BROKEN["unfinished"] in refused.stderr
    made_at = tmp_path / "toast.bundle"
    made = greenprune("greenprune-export", "--target", "toaster", "-o", made_at, "--json")
    assert made.returncode == 0, made.stderr
    bundle = json.loads(made.stdout)["bundle"]
    opsets = onnx.load(f"{bundle}/graphs/dense.onnx").opset_import
    assert {each.domain: each.version for each in opsets}[""] == 19
    options = ("--preset", "quick", "--threads", "1", "--json")
    done = greenprune("greenprune-bench", bundle, *options)

    # 1: measured, and this machine is too noisy for the figures to be valid
    assert done.returncode in (0, 1), done.stderr
    measured = {(row["variant"], row["runtime"]) for row in json.loads(done.stdout)["candidates"]}
    variants = ("dense", "mild", "aggressive", "pair")
    assert measured == {(variant, "onnxruntime") for variant in variants}
