"""CIFAR-10 for the benchmarks that start from a trained checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from greenprune import data, training
from greenprune.recipe import load


def load_images(folder: Path, weights: Path | None = None, *, development: int = 0) -> data.Data:
    """As the built-in recipe has it; ``development`` training images are held out."""
    recipe = load(
        "resnet56-cifar10",
        [
            f'data.path="{folder.resolve()}"',
            f"data.development={development}",
            *([f'model.weights="{weights.resolve()}"'] if weights else []),
        ],
    )
    return data.load(recipe.data, recipe.seed)


def some_images(loaded: data.Data, count: int, seed: int) -> Tensor:
    """Training images, normalised."""
    drawn = data.draw(loaded.train, count, seed)
    return data.normalise(loaded.train.inputs[drawn], loaded.preprocessing)


def test_accuracy(network: nn.Module, loaded: data.Data) -> float:
    """On all test images: those that the recipe deals to the selector and the certificate too."""
    return accuracy(network, loaded, loaded.selector, loaded.certification, loaded.test)


def accuracy(network: nn.Module, loaded: data.Data, *splits: data.Split) -> float:
    """On all images of the splits."""
    right = [
        training.accuracy(training.predict(network, split, loaded.preprocessing), split.targets)
        for split in splits
    ]
    return float(torch.cat(right).mean())
