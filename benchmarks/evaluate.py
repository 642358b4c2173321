"""Evaluate a committed network or bundle again.

    python benchmarks/evaluate.py NAME --data DIR [--json]

NAME is a folder of ``benchmarks/artifacts``; DIR holds the test images as ``test/<class>/*.png``
(and ``train/<class>/*.png``, which the loader wants to see too), or, for the networks on MNIST, it
is the folder that holds ``MNIST/raw``. Of a bundle, the whole table of its dial is made again
(``pip install 'greenprune[eyeriss]'`` for the energy).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import dial
import torch
from common import ARTIFACTS

from greenprune import bundle, data, schema, training
from greenprune.errors import BundleError
from greenprune.pruning import cost, record
from greenprune.recipe import DataSettings, Recipe, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a folder of benchmarks/artifacts")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    place = ARTIFACTS / arguments.name
    evaluated = bundle_again if (place / bundle.MANIFEST).exists() else network_again
    found = {"name": arguments.name, **evaluated(place, arguments)}
    print(json.dumps(found) if arguments.json else found)


def bundle_again(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The table of the dial, on the splits that the bundle was made with."""
    made_by = bundle.open_bundle(place).manifest.provenance["recipe"]
    content = {**made_by["data"], "path": str(arguments.data.resolve())}
    settings = schema.decode(content, DataSettings, str(place), BundleError)
    return dial.table(place, data.load(settings, made_by["seed"]))


def network_again(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on all test images, and cost."""
    network, described = record.load_network(place)
    recipe = recipe_of(arguments.data, list(described.input_shape[1:]))
    loaded = data.load(recipe.data, recipe.seed)
    parts = [loaded.test]
    if recipe.data.held_out_from == "test":
        parts += [loaded.selector, loaded.certification]
    split = data.Split(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
    )
    outputs = training.predict(network, split, loaded.preprocessing)
    counted = cost.count(network, torch.zeros(1, *described.input_shape))
    return {
        "accuracy": float(training.accuracy(outputs, split.targets).mean()),
        "images": len(split.targets),
        "macs": counted.macs,
        "params": counted.params,
    }


def recipe_of(place: Path, size: list[int]) -> Recipe:
    """A built-in recipe, for its preprocessing."""
    name = "crnn-mnist" if (place / "MNIST").is_dir() else "resnet56-cifar10"
    return load(name, [f'data.path="{place.resolve()}"', f"data.size={size}"])


if __name__ == "__main__":
    main()
