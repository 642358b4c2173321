"""Evaluate a committed network again.

    python benchmarks/evaluate.py NAME --data DIR [--json]

NAME is a folder of ``benchmarks/artifacts``; DIR holds the test images as ``test/<class>/*.png``
(and ``train/<class>/*.png``, which the loader wants to see too). For the networks on MNIST add
``--recipe crnn-mnist``; DIR is then the folder that holds ``MNIST/raw``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import ARTIFACTS

from greenprune import data, training
from greenprune.pruning import cost, record
from greenprune.recipe import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a folder of benchmarks/artifacts")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="resnet56-cifar10", help="whose preprocessing to use")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    network, described = record.load_network(ARTIFACTS / arguments.name)
    size = list(described.input_shape[1:])
    overrides = [f'data.path="{arguments.data.resolve()}"', f"data.size={size}"]
    recipe = load(arguments.recipe, overrides)
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
    found = {
        "name": arguments.name,
        "accuracy": float(training.accuracy(outputs, split.targets).mean()),
        "images": len(split.targets),
        "macs": counted.macs,
        "params": counted.params,
    }
    print(json.dumps(found) if arguments.json else found)


if __name__ == "__main__":
    main()
