"""``greenprune-export``: bundles of a finished run, and refusals that change nothing."""

from __future__ import annotations

import json
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenprune import bundle, certification
from greenprune.errors import TargetError
from greenprune.runtime import AdaptiveSession
from greenprune_calibration.qdq_rules import check_tensorrt


@pytest.fixture
def runs(finished: Any, tmp_path: Path) -> Path:
    """``runs`` with the finished run, an older one and one that is not finished."""
    place = tmp_path / "runs"
    newest = finished.copy(place)
    older = newest.rename(place / "older")
    stamp = (older / "finetune-aggressive" / "stage.json").stat().st_mtime
    finished.copy(place)
    for path in older.glob("*/stage.json"):
        os.utime(path, (stamp - 1000, stamp - 1000))
    recipe = json.loads((older / "run.json").read_text())
    recipe["recipe"]["name"] = "older"
    (older / "run.json").write_text(json.dumps(recipe))
    unfinished = place / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((newest / "run.json").read_text())
    return place


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_newest_run_by_default(runs: Path, finished: Any, command: Any, tmp_path: Path) -> None:
    before = snapshot(runs)
    done = command("greenprune-export", "--target", "x86", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["target"] == "x86"
    made = tmp_path / answer["bundle"]
    assert made.parent == tmp_path
    opened = bundle.open_bundle(made)
    opened.verify()
    assert opened.manifest == bundle.open_bundle(finished.bundle).manifest
    assert snapshot(runs) == before, "a bundle that is ready is copied, not made again"


def test_named_run_and_output(runs: Path, command: Any, tmp_path: Path) -> None:
    done = command("greenprune-export", "older", "--target", "x86", "-o", "out/my.bundle")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "out/my.bundle"
    bundle.open_bundle(tmp_path / "out" / "my.bundle").verify()
    again = command("greenprune", "export", runs / "older", "-o", "out/my.bundle")
    assert again.returncode == 0, "an older bundle is replaced: " + again.stderr
    bundle.open_bundle(tmp_path / "out" / "my.bundle").verify()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my.bundle"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "not a run"]),
        (["unfinished"], ["unfinished", "goes on where it stopped"]),
        (["--target", "x68"], ["'x68'", "did you mean 'x86'", "jetson"]),
        (["--target", "x86", "--precision", "fp16"], ["no precision 'fp16'", "fp32, int8"]),
        (["--runs", "elsewhere"], ["elsewhere", "no finished run"]),
        (["-o", "taken"], ["taken", "is not a bundle"]),
    ],
)
def test_refusal_is_one_message_and_changes_nothing(
    runs: Path, command: Any, messages: Any, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("keep me")
    before = snapshot(tmp_path)
    done = command("greenprune-export", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (message,) = messages(done.stderr)
    for word in words:
        assert word in message
    assert snapshot(tmp_path) == before
    assert not list(tmp_path.glob("*.bundle"))


def test_int8_is_judged_raced_and_told(runs: Path, command: Any, tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="pip install 'greenprune[x86]'")
    done = command("greenprune-export", "--precision", "int8", "-o", "int8.bundle")
    assert done.returncode == 0, done.stderr

    opened = bundle.open_bundle(tmp_path / "int8.bundle")
    opened.verify()
    told = opened.manifest.provenance
    assert set(told["int8"]) == {"onnxruntime-int8", "openvino-int8"}
    for networks in told["int8"].values():
        for found in networks.values():
            assert found["float_accuracy"] - found["accuracy"] <= 0.005
    # so small a network may need all of its layers in floating point, and then has no int8 to race
    in_int8 = {
        name
        for name, networks in told["int8"].items()
        if all("int8" in networks[each]["layers"].values() for each in ("mild", "aggressive"))
    }
    assert in_int8
    raced = {racer["runtime"] for racer in told["race"]["race"]["racers"]}
    assert raced == {"onnxruntime", "openvino"} | in_int8
    left_out = set(told["race"]["left_out"])
    assert set(told["int8"]) - in_int8 <= left_out <= set(told["int8"])
    for reason in told["race"]["left_out"].values():
        assert reason in done.stderr
    for variant in opened.manifest.variants.values():
        assert set(variant.artifacts) == raced - left_out
    assert opened.manifest.runtime == told["race"]["runtime"]
    for row in opened.manifest.selector.table:
        assert row.n > 0
    with AdaptiveSession(tmp_path / "int8.bundle", threads=1) as session:
        (logits,) = session.run(None, {"input": opened.read_array("samples/replay_inputs.npy")})
    assert np.isfinite(logits).all()


def test_a_jetson_bundle_builds_itself_on_the_board(
    runs: Path, command: Any, tmp_path: Path
) -> None:
    done = command(
        "greenprune-export", "--target", "jetson", "--precision", "int8", "-o", "jetson.bundle"
    )
    assert done.returncode == 0, done.stderr
    assert "checked by TensorRT-RTX" in done.stderr or "checked by rules alone" in done.stderr

    opened = bundle.open_bundle(tmp_path / "jetson.bundle")
    opened.verify()
    manifest = opened.manifest
    assert (manifest.target, manifest.runtime) == ("jetson-orin-nano", "tensorrt-int8")
    assert manifest.provenance["race"]["race"] is None, "nobody raced on a board that is not here"
    wanted = {"tensorrt": "fp32", "tensorrt-fp16": "fp16", "tensorrt-int8": "int8"}
    for variant in manifest.variants.values():
        assert set(variant.artifacts) == set(wanted)
        for name, precision in wanted.items():
            types = set(check_tensorrt(opened.file(variant.artifacts[name])).values())
            assert precision in types, f"{name}: {types}"
    assert not [name for name in manifest.files if name.endswith((".engine", ".plan"))]
    assert manifest.selector.threshold is None
    assert manifest.certification.inputs is not None
    readme = opened.file("README.md").read_text()
    for words in ("orin-nano", "--system-site-packages", "nvpmodel -m", "| 6.1 | 36.4.0 | 10.3 "):
        assert words in readme
    with pytest.raises(TargetError, match=r"this is no Jetson"):
        AdaptiveSession(tmp_path / "jetson.bundle")


def test_a_pc_without_its_gpu_certifies_nothing_for_cuda(
    runs: Path, command: Any, tmp_path: Path
) -> None:
    """Its processor is one that a CUDA machine may have, and ONNX Runtime stands in."""
    if find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    done = command("greenprune-export", "--target", "cuda", "-o", "cuda.bundle")
    assert done.returncode == 0, done.stderr
    manifest = bundle.open_bundle(tmp_path / "cuda.bundle").manifest
    assert manifest.runtime == "tensorrt"
    assert (manifest.selector.certified_on, manifest.selector.threshold) == ("", None)
    assert not any(row.certified for row in manifest.selector.table)
    assert manifest.certification.inputs is not None, "it is certified on the device"
    refused = command("greenprune-bench", "cuda.bundle", "--certify")
    assert refused.returncode == 2
    assert "on the device" in refused.stderr


def test_the_dial_on_a_simulated_target_has_energies(
    runs: Path, command: Any, tmp_path: Path
) -> None:
    pytest.importorskip("nn_dataflow", reason="pip install 'greenprune[eyeriss]'")
    done = command("greenprune-export", "--target", "eyeriss", "-o", "simulated.bundle")
    assert done.returncode == 0, done.stderr

    opened = bundle.open_bundle(tmp_path / "simulated.bundle")
    opened.verify()
    found = opened.manifest.simulated_energy
    dense, mild, aggressive = (
        found[name]["energy_mac_units"] for name in ("dense", "mild", "aggressive")
    )
    assert dense > mild > aggressive > 0
    assert {each["provenance"] for each in found.values()} == {"simulated_model"}
    assert opened.manifest.energy_mj == {}, "MAC units are no joules"
    for row in opened.manifest.selector.table:
        expected = mild if row.threshold is None else aggressive + (1 - row.coverage) * mild
        assert row.energy_mac_units == pytest.approx(expected)


def test_a_bundle_for_another_device_is_certified_there(
    runs: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arm here, where its graphs run too: from the carried images comes what x86 was promised."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this machine is an Arm device itself")
    done = command("greenprune-export", "--target", "arm", "--json", "-o", "arm.bundle")
    assert done.returncode == 0, done.stderr
    arrived = bundle.open_bundle(tmp_path / "arm.bundle").manifest
    assert arrived.selector.threshold is None
    assert not any(row.certified for row in arrived.selector.table)
    assert "greenprune-bench --certify" in arrived.selector.table[0].reason
    refused = command("greenprune-bench", "arm.bundle", "--certify")
    assert refused.returncode == 2
    assert "aarch64 or arm64 alone" in refused.stderr

    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    record = certification.certify_bundle(tmp_path / "arm.bundle").selector

    assert record.certified_on == "arm, onnxruntime, fp32"
    assert command("greenprune-export", "--target", "x86", "-o", "x86.bundle").returncode == 0
    promised = bundle.open_bundle(tmp_path / "x86.bundle").manifest
    assert record.table == promised.selector.table
    assert promised.certification.inputs is None, "certified already: the images stay at home"
