"""The built-in recipes that take long, tried for a few steps on a few made-up images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from greenprune import api
from greenprune.pruning.record import load_network

SHORT = (
    "threads=1",
    *(f"{stage}.epochs=1" for stage in ("train", "sparsify", "finetune.mild")),
    "finetune.aggressive.epochs=1",
    *(f"data.{split}=2" for split in ("development", "selector", "certification")),
    "prune.images=8",
    "bench.meter=none",
)


def few(count: int) -> list[str]:
    """The schedule of seconds: batches of ``count`` images."""
    stages = ("train", "sparsify", "finetune.mild", "finetune.aggressive")
    return [*SHORT, *(f"{stage}.batch_size={count}" for stage in stages)]


def write_images(root: Path, classes: int, each: int) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", each), ("test", 1)):
        for label in range(classes):
            place = root / part / f"{label:03}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


def write_mnist(root: Path) -> None:
    """MNIST's four files, of 28x28 noise with a bar that says the class."""
    generator = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 400), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = generator.integers(0, 80, size=(count, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[:, 2 * label + 4 : 2 * label + 6] = 250
        header = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([0x801, count], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


@pytest.mark.parametrize(
    ("recipe", "classes", "each"),
    [
        ("vgg16-cifar10", 10, 2),
        ("googlenet-cifar10", 10, 2),
        ("densenet40-cifar10", 10, 2),
        ("resnet56-cifar100", 100, 1),
    ],
)
def test_a_long_recipe_trains_prunes_and_fine_tunes(
    tmp_path: Path, recipe: str, classes: int, each: int
) -> None:
    write_images(tmp_path / "images", classes, each)
    overrides = [*few(8), f"data.path={tmp_path / 'images'}"]
    answer = api.prune(recipe, overrides=overrides, runs=tmp_path / "runs")
    macs = {name: found["macs"] for name, found in answer["variants"].items()}
    settings = api.open_job(recipe, overrides=overrides, runs=tmp_path / "runs").recipe.prune
    assert macs["mild"] <= settings.mild.macs * macs["dense"]
    assert macs["aggressive"] <= settings.aggressive.macs * macs["dense"]
    rebuilt, _ = load_network(Path(answer["variants"]["aggressive"]["network"]))
    assert rebuilt(torch.zeros(1, 3, 32, 32)).shape == (1, classes)


def test_the_crnn_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenprune.harness.protocol.LOCK", tmp_path / "lock")
    write_mnist(tmp_path)
    overrides = [
        *few(32),
        f"data.path={tmp_path}",
        'compile.runtimes=["onnxruntime"]',
        "data.selector=40",
        "data.certification=60",
    ]
    answer: dict[str, Any] = api.run("crnn-mnist", overrides=overrides, runs=tmp_path / "runs")
    assert Path(answer["bundle"]).is_dir()
    assert set(answer["variants"]) == {"dense", "mild", "aggressive", "pair"}
    job = api.open_job("crnn-mnist", overrides=overrides, runs=tmp_path / "runs")
    dense, aggressive = (
        load_network(job.place(stage) / "network")[0] for stage in ("train", "finetune-aggressive")
    )
    assert aggressive.recurrent.hidden_size < dense.recurrent.hidden_size == 64
    assert aggressive.features[4].out_channels < dense.features[4].out_channels
    assert answer["variants"]["aggressive"]["macs"] <= 0.2 * answer["variants"]["dense"]["macs"]
