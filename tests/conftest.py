"""Fixtures that several tests share: a tiny real bundle, built without torch."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # a worker for each core already; more threads would wait for each other. Before numpy and torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

# what is compiled for this machine is kept per user: not the user's own cache
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="greenprune-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# a busy machine is no defect
settings.register_profile("greenprune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("greenprune")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Several threads only slow the tests' small networks down."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


CLASSES, SIZE, REFERENCE, REPLAY = 4, 16, 8, 64
Array = NDArray[np.float32]


def tiny_images(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey uint8 images [N, 16, 16] and their classes: the bright quadrant, some of them blurred
    into the noise, so that the networks below disagree on a few."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, CLASSES, size=count)
    images = generator.uniform(0, 90, size=(count, SIZE, SIZE))
    contrast = generator.uniform(0, 120, size=count)
    half = SIZE // 2
    for image, target, light in zip(images, targets, contrast, strict=True):
        row, column = divmod(int(target), 2)
        image[row * half : (row + 1) * half, column * half : (column + 1) * half] += light
    return np.clip(images, 0, 255).astype(np.uint8), targets.astype(np.int64)


def tiny_weights(pixels: int, seed: int) -> Array:
    """Linear classifier [256, 4] that reads every ``pixels``-th pixel of each quadrant."""
    weights = np.zeros((SIZE, SIZE, CLASSES), dtype=np.float32)
    half = SIZE // 2
    for target in range(CLASSES):
        row, column = divmod(target, 2)
        quadrant = weights[row * half : (row + 1) * half, column * half : (column + 1) * half]
        quadrant[::pixels, ::pixels, target] = 4.0 / (half / pixels) ** 2
    noise = np.random.default_rng(seed).normal(0, 0.01, size=weights.shape)
    return (weights + noise).reshape(SIZE * SIZE, CLASSES).astype(np.float32)


def write_linear_graph(path: Path, weights: Array, *, score: bool) -> None:
    """ONNX: ``logits = flatten(input) @ weights`` and, on demand, ``score`` = largest softmax."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])]
    constants = [numpy_helper.from_array(weights, "weights")]
    if score:
        nodes += [
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
            helper.make_node("ReduceMax", ["probabilities", "axis"], ["score"], keepdims=0),
        ]
        outputs.append(helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]))
        constants.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "axis"))
    shape = ["batch", 1, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        outputs,
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def build_tiny_bundle(folder: Path, scratch: Path) -> Path:
    """Write a whole bundle into ``folder``; ``scratch`` holds the parts on their way."""
    from greenprune import bundle
    from greenprune.registry import Build, load_target

    x86 = load_target("x86")
    runtimes = ["onnxruntime"]
    if importlib.util.find_spec("openvino"):
        runtimes.append("openvino")
    mean, std = 0.25, 0.25
    prepared = {
        name: ((images[:, None] / 255 - mean) / std).astype(np.float32)
        for name, (images, _) in {
            "reference": tiny_images(REFERENCE, 1),
            "replay": tiny_images(REPLAY, 2),
        }.items()
    }
    files: dict[str, Any] = {
        "samples/reference_input.npy": prepared["reference"],
        "samples/replay_inputs.npy": prepared["replay"],
        "samples/replay_targets.npy": tiny_images(REPLAY, 2)[1],
        "samples/certification_inputs.npy": tiny_images(REPLAY, 2)[0][..., None],
        "samples/certification_targets.npy": tiny_images(REPLAY, 2)[1],
    }
    variants = {}
    for name, pixels in {"dense": 1, "mild": 2, "aggressive": 4}.items():
        weights = tiny_weights(pixels, seed=pixels)
        graph = scratch / f"{name}.onnx"
        write_linear_graph(graph, weights, score=name == "aggressive")
        files[f"graphs/{name}.onnx"] = graph
        artifacts = {}
        for runtime in runtimes:
            made = x86.compile(graph, Build(runtime=runtime), scratch / runtime, name)
            for part in sorted(made.parent.glob(f"{name}.*")):
                files[f"artifacts/{runtime}/{part.name}"] = part
            artifacts[runtime] = f"artifacts/{runtime}/{made.name}"
        logits = prepared["reference"].reshape(REFERENCE, -1) @ weights
        references = {"logits": f"samples/{name}_logits.npy"}
        files[references["logits"]] = logits
        if name == "aggressive":
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            references["score"] = f"samples/{name}_score.npy"
            files[references["score"]] = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
        variants[name] = bundle.Variant(
            graph=f"graphs/{name}.onnx",
            artifacts=artifacts,
            macs=weights.size // pixels**2,
            params=weights.size // pixels**2,
            accuracy=0.9 - 0.05 * pixels,
            reference_outputs=references,
        )
    manifest = bundle.Manifest(
        schema=bundle.SCHEMA_VERSION,
        name="tiny",
        created="2026-01-01T00:00:00Z",
        target="x86",
        runtime="onnxruntime",
        input=bundle.TensorSpec(name="input", shape=(None, 1, SIZE, SIZE), dtype="float32"),
        outputs=(bundle.TensorSpec(name="logits", shape=(None, CLASSES), dtype="float32"),),
        preprocessing=bundle.Preprocessing(channels=1, size=(SIZE, SIZE), mean=(mean,), std=(std,)),
        class_names=("top left", "top right", "bottom left", "bottom right"),
        variants=variants,
        selector=bundle.SelectorRecord(
            kind="msp",
            reason="a fixture",
            reference="dense",
            certified_on="x86, onnxruntime, fp32",
            threshold=0.5,
            table=(
                bundle.DialRow(
                    threshold=0.5,
                    max_accuracy_loss=0.05,
                    certified=True,
                    delta=0.05,
                    n=REPLAY,
                    coverage=0.5,
                    accuracy=0.8,
                    reference_accuracy=0.85,
                ),
            ),
        ),
        samples=bundle.Samples(
            reference_input="samples/reference_input.npy",
            replay_inputs="samples/replay_inputs.npy",
            replay_targets="samples/replay_targets.npy",
        ),
        certification=bundle.CertificationPlan(
            inputs="samples/certification_inputs.npy",
            targets="samples/certification_targets.npy",
            thresholds=(0.9, 0.7, 0.5, 0.3),
            max_accuracy_loss=(0.05, 0.3),
            operating_loss=0.3,
            reference="dense",
            delta=0.05,
            seed=0,
        ),
    )
    bundle.write(folder, manifest, files)
    return folder


@pytest.fixture(scope="session")
def draw_tiny() -> Callable[[int, int], tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Images that the tiny bundle was made for: see :func:`tiny_images`."""
    return tiny_images


@pytest.fixture(scope="session")
def tiny_bundle_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle, built once for the whole session; tests get copies."""
    scratch = tmp_path_factory.mktemp("tiny")
    return build_tiny_bundle(scratch / "bundle", scratch)


@pytest.fixture
def tiny_bundle(tiny_bundle_source: Path, tmp_path: Path) -> Path:
    """A real bundle (dense, mild, aggressive; 1x16x16 in, 4 classes) that a test may damage."""
    import shutil

    return Path(shutil.copytree(tiny_bundle_source, tmp_path / "tiny.bundle"))
