"""A real bundle on real runtimes, and the example app around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenprune.bundle import open_bundle
from greenprune.errors import BundleError, TargetError
from greenprune.registry import load_target
from greenprune.runtime import AdaptiveSession, Policy
from greenprune.runtime.runners import verify_artifact

APP = Path(__file__).resolve().parents[2] / "deploy_examples" / "classify_folder.py"


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


def answers(bundle: Path, runtime: str, variant: str, inputs: Any) -> dict[str, Any]:
    opened = open_bundle(bundle)
    artifact = opened.artifact(variant, runtime)
    return load_target("x86").open(artifact, runtime, 1).run(inputs)


def test_the_pair_is_its_two_networks(tiny_bundle: Path, runtime: str) -> None:
    inputs = open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")
    aggressive = answers(tiny_bundle, runtime, "aggressive", inputs)
    mild = answers(tiny_bundle, runtime, "mild", inputs)["logits"]
    threshold = float(np.sort(aggressive["score"])[20:22].mean())  # between two, not on one
    accepted = aggressive["score"] >= threshold
    expected = np.where(accepted[:, None], aggressive["logits"], mild)
    policy = Policy(threshold=threshold, allow_uncertified=True)
    with AdaptiveSession(tiny_bundle, policy=policy, runtime=runtime, threads=1) as session:
        session.warmup()
        (logits,), info = session.run_with_info(None, {"input": inputs})
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        assert info.routes == tuple("aggressive" if yes else "mild" for yes in accepted)
        np.testing.assert_allclose(info.scores, aggressive["score"], rtol=1e-4)
        for index in range(len(inputs)):
            (alone,) = session.run(["logits"], {"input": inputs[index : index + 1]})
            np.testing.assert_allclose(alone[0], logits[index], rtol=1e-4, atol=1e-5)
        assert session.statistics.routes == {"aggressive": 86, "mild": 42, "dense": 0}


def test_eight_threads_answer_as_one(tiny_bundle: Path, runtime: str) -> None:
    inputs = open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")
    scores = answers(tiny_bundle, runtime, "aggressive", inputs)["score"]
    policy = Policy(threshold=float(np.median(scores)), allow_uncertified=True)
    with AdaptiveSession(tiny_bundle, policy=policy, runtime=runtime, threads=1) as session:
        images = [inputs[index : index + 1] for index in range(len(inputs))]

        def turn(start: int) -> list[Any]:
            order = [(start + 7 * step) % len(images) for step in range(300)]
            return [(i, session.run(None, {"input": images[i]})[0]) for i in order]

        alone = [session.run(None, {"input": image})[0] for image in images]
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(turn, range(8)):
                for index, logits in found:
                    np.testing.assert_array_equal(logits, alone[index])
        found = session.statistics
    assert found.calls == len(images) + 8 * 300
    assert 0.3 < found.routes["aggressive"] / found.calls < 0.7
    assert found.faults == found.failed == 0


def test_asynchronous_answers_are_the_same(tiny_bundle: Path, runtime: str) -> None:
    inputs = open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")
    got: dict[int, Any] = {}
    with AdaptiveSession(tiny_bundle, runtime=runtime, threads=1, max_pending=100) as session:
        expected = [session.run(None, {"input": inputs[i : i + 1]})[0] for i in range(64)]
        for index in range(64):
            feeds = {"input": inputs[index : index + 1]}
            session.run_async(None, feeds, lambda out, i, error: got.setdefault(i, out), index)
    assert sorted(got) == list(range(64))
    for index, outputs in got.items():
        np.testing.assert_array_equal(outputs[0], expected[index])


@pytest.mark.parametrize("variant", ["dense", "mild", "aggressive"])
def test_every_artifact_reproduces_its_network(
    tiny_bundle: Path, runtime: str, variant: str
) -> None:
    opened = open_bundle(tiny_bundle)
    found = verify_artifact(
        load_target("x86"),
        opened.artifact(variant, runtime),
        runtime,
        opened.read_array(opened.manifest.samples.reference_input),
        {
            name: opened.read_array(path)
            for name, path in opened.manifest.variants[variant].reference_outputs.items()
        },
        threads=1,
    )
    assert found.agreement == 1.0


def test_a_damaged_network_never_opens(tiny_bundle: Path, runtime: str) -> None:
    name = open_bundle(tiny_bundle).manifest.variants["aggressive"].artifacts[runtime]
    path = (tiny_bundle / name).with_suffix(".bin" if runtime == "openvino" else ".onnx")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=path.name):
        AdaptiveSession(tiny_bundle, runtime=runtime)


def test_a_target_that_is_not_installed_is_named(tiny_bundle: Path) -> None:
    manifest = tiny_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"target": "x86"', '"target": "x68"'))
    with pytest.raises(TargetError, match=r"'x68' \(did you mean 'x86'\?\)"):
        AdaptiveSession(tiny_bundle)


def test_onnxruntime_reports_nothing_and_leaves_nothing_at_home(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, numpy as np; from greenprune.runtime import AdaptiveSession, Policy; "
        "s = AdaptiveSession(sys.argv[1], policy=Policy(route='mild'), runtime='onnxruntime'); "
        "s.warmup(); s.close()"
    )
    hidden = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    environment = {**kept, "HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(sys.path)}
    line = [sys.executable, "-c", code, str(tiny_bundle)]
    subprocess.run(line, env=environment, check=True)
    left = [path for path in (tmp_path / "home").rglob("*") if "icrosoft" in path.name]
    assert left == []


def run_app(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(APP), *map(str, arguments)],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Bright quadrants: one picture a class, as grey PNG, colour JPEG and of another size."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for target in range(4):
        size = 16 if target != 3 else 48
        pixels = np.full((size, size), 20, dtype=np.uint8)
        half = size // 2
        row, column = divmod(target, 2)
        pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] = 230
        picture = image.fromarray(pixels)
        if target == 2:
            picture.convert("RGB").save(folder / "2.JPG", quality=95)
        else:
            picture.save(folder / f"{target}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_the_example_app_classifies_a_folder(tiny_bundle: Path, pictures: Path) -> None:
    done = run_app(tiny_bundle, pictures, "--json")
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["file"], line["label"]) for line in lines] == [
        ("0.png", "top left"),
        ("1.png", "top right"),
        ("2.JPG", "bottom left"),
        ("3.png", "bottom right"),
    ]
    assert all(line["score"] > 0.5 and line["route"] == "aggressive" for line in lines)
    assert last["summary"]["routes"] == {"aggressive": 4, "mild": 0, "dense": 0}
    done = run_app(tiny_bundle, pictures)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].split("\t")[:3] == ["0.png", "top left", "aggressive"]
    assert "4 images" in done.stderr


def test_the_example_app_says_what_is_wrong(
    tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    done = run_app(tiny_bundle, pictures, "--json")
    assert done.returncode == 1
    assert "broken.png: not readable" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["unreadable"] == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in ((tiny_bundle, empty), (empty, pictures)):
        done = run_app(*arguments)
        assert done.returncode == 2
        assert "expected" in done.stderr
        assert "Traceback" not in done.stderr
