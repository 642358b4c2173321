"""What bias folding and BatchNorm re-estimation give back before fine-tuning: ResNet-20, CIFAR-10.

    python benchmarks/corrections.py --data=DIR --weights=resnet20.th

The trained network is trained on for one epoch with CBS, with the plain regulariser (the same
penalty on the BatchNorm scales alone) and with none, then cut by DRP inside its blocks, every
block at the same rate. Accuracies on the 10,000 test images: as cut, with the removed channels'
means folded into biases, with BatchNorm re-estimated, and with both. LeNet-5, which has no
BatchNorm, is in cbs_lenet5.py.

One result a seed and method is kept under ``--runs``: what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from cifar import load_images, some_images, test_accuracy
from common import write_result
from torch import nn

from greenprune import data, models, sparsity, storage, training
from greenprune.pruning import batchnorm, budget, folding, surgery
from greenprune.pruning.graph import analyse
from greenprune.pruning.scores import measure
from greenprune.recipe import SparsitySettings

SEEDS = (0, 1, 2)
METHODS = ("none", "group", "cbs")
RATES = (0.25, 0.5)
WAYS = ("cut", "folded", "batchnorm", "folded, batchnorm")
STRENGTH = 5e-3
IMAGES = 1024
SPARSE = SparsitySettings(
    epochs=1, batch_size=128, learning_rate=0.01, weight_decay=1e-4, precision="bf16"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()

    loaded = load_images(arguments.data, arguments.weights)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        for method in METHODS:
            kept = arguments.runs / "corrections" / f"{method}-{seed}.json"
            if not kept.exists():
                storage.write_json(kept, one(loaded, arguments.weights, method, seed))
            rows += json.loads(kept.read_text(encoding="utf-8"))
            print(rows[-1], flush=True)
    figures = {"strength": STRENGTH, "summary": summarise(rows), "rows": rows}
    seconds = sum(row["seconds"] for row in rows)
    print(write_result("corrections", seed=SEEDS[0], seconds=seconds, figures=figures))


def one(loaded: data.Data, weights: Path, method: str, seed: int) -> list[dict[str, Any]]:
    begin = time.monotonic()
    network = models.build("greenprune.models:resnet20", {})
    models.load_weights(network, weights)
    images = some_images(loaded, IMAGES, seed)
    penalty = None
    if method != "none":
        penalty = sparsity.build(network, images[:1], method, STRENGTH)
    training.fit(network, loaded, SPARSE, seed=seed, penalty=penalty, label=method)
    analysis = analyse(network, images[:2])
    scores = measure(network, analysis, images).scores
    inside = [g.name for g in analysis.groups if len(g.producers) == 1]
    shown = {
        "method": method,
        "seed": seed,
        "accuracy": test_accuracy(network, loaded),
        "zero_share": penalty.zero_share() if penalty else 0.0,
    }
    rows = []
    for rate in RATES:
        removed = budget.by_rates(analysis, scores, dict.fromkeys(inside, rate))
        cut = surgery.prune_channels(network, images[:2], removed)
        folded = copy.deepcopy(cut)
        folding.fold_means(folded, network, analysis, removed, images)
        networks: list[nn.Module] = [
            cut,
            folded,
            batchnorm.reestimated(cut, images),
            batchnorm.reestimated(folded, images),
        ]
        ways = {way: test_accuracy(each, loaded) for way, each in zip(WAYS, networks, strict=True)}
        rows.append({**shown, "rate": rate, **ways, "seconds": 0.0})
    rows[-1]["seconds"] = time.monotonic() - begin
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every method and rate."""
    table = []
    for method in METHODS:
        for rate in RATES:
            own = [row for row in rows if row["method"] == method and row["rate"] == rate]
            entry: dict[str, Any] = {"method": method, "rate": rate}
            for key in ("accuracy", "zero_share", *WAYS):
                values = [row[key] for row in own]
                entry[key] = {
                    "mean": float(np.mean(values)),
                    "deviation": float(np.std(values, ddof=1)),
                }
            table.append(entry)
    return table


if __name__ == "__main__":
    main()
