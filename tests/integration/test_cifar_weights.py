"""Trained networks of others, on real images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from greenprune import models, training
from greenprune.bundle import Preprocessing
from greenprune.data import Split

SHARED = Path(
    os.environ.get("GREENPRUNE_SHARED", Path(__file__).resolve().parents[2].parent / "shared")
)
PREPROCESSING = Preprocessing(
    channels=3, size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


@pytest.fixture(scope="module")
def test_images() -> Split:
    """The first 1,000 of the shuffled CIFAR-10 test images."""
    folder = SHARED / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    tiles = np.asarray(Image.open(folder / "test_00.webp").convert("RGB"))
    images = tiles.reshape(40, 32, 25, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)
    labels = np.load(folder / "test_labels.npy", allow_pickle=False)[:1000].astype(np.int64)
    return Split(inputs=torch.from_numpy(images.copy()), targets=torch.from_numpy(labels))


@pytest.mark.parametrize(
    ("name", "file", "accuracy"),
    [
        ("resnet20", "resnet20-12fca82f.th", 0.9173),
        ("resnet56", "resnet56-4bfd9763.th", 0.9339),
    ],
)
def test_trained_resnets_keep_their_accuracy(
    test_images: Split, name: str, file: str, accuracy: float
) -> None:
    path = SHARED / "weights" / file
    if not path.is_file():
        pytest.skip(f"needs {path}")
    model = models.build(f"greenprune.models:{name}")
    models.load_weights(model, path)
    outputs = training.predict(model, test_images, PREPROCESSING)
    found = float(training.evaluate(outputs, test_images.targets).mean())
    # the accuracy is that of 10,000 images; 0.02 is about 2.5 standard errors of 1,000
    assert found == pytest.approx(accuracy, abs=0.02)
