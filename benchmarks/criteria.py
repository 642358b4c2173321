"""Which criterion should be the default? ResNet-20 on CIFAR-10, pruned by each and fine-tuned.

    python benchmarks/criteria.py --data=DIR [--epochs=1] [--scope=uniform]

A network is trained from nothing for 10 epochs on 45,000 training images: published weights have
seen all 50,000, and what they remember of a development image says little about a new one. Every
criterion cuts this network to at most half of its MACs, in the channels inside
the blocks and in the residual stream alike, with widths on multiples of 4; then BatchNorm is
re-estimated and the network fine-tuned for the same epochs, without a teacher. ``--scope=global``
lets the scores say as well which layers lose most, as greenprune does by default;
``--scope=uniform`` cuts every group by the same share, so that only the order within a layer
counts, which is all that HRank and FPGM claim.

The other 5,000 training images choose, as no training sees them: the default stays unless another
criterion is better with 95% confidence. The test images judge once, after the
last epoch, and choose nothing. Seeds draw the calibration images and the order of training. One
result a criterion and seed is kept under ``--runs``: what is there is not run again, and a training
that was killed goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import accuracy, load_images, test_accuracy
from common import write_result
from scipy import stats
from torch import nn

from greenprune import data, models, storage, training
from greenprune.pruning import batchnorm, budget, cost, record, surgery
from greenprune.pruning.graph import analyse
from greenprune.pruning.scores import METHODS, measure
from greenprune.recipe import TrainingSettings

SEEDS = (0, 1, 2)
DEFAULT = "drp"
DEVELOPMENT = 5000
IMAGES = 1024
BATCHNORM_IMAGES = 1024
MACS = 0.5
WIDTH_MULTIPLE = 4
FACTORY = "greenprune.models:resnet20"
DENSE = TrainingSettings(
    epochs=10,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=5e-4,
    warmup_epochs=1,
    precision="bf16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--scope", choices=["global", "uniform"], default="global")
    arguments = parser.parse_args()

    begin = time.monotonic()
    name = "criteria" if arguments.scope == "global" else "criteria_uniform"
    folder = arguments.runs / f"{name}-{arguments.epochs}"
    loaded = load_images(arguments.data, development=DEVELOPMENT)
    dense = dense_network(loaded, arguments.runs / "criteria-dense")
    accuracies = {
        "dense_development": accuracy(dense, loaded, loaded.development),
        "dense_test": test_accuracy(dense, loaded),
    }
    print(accuracies, flush=True)
    rows: list[dict[str, Any]] = []
    todo = [(method, seed) for seed in SEEDS for method in METHODS]
    for number, (method, seed) in enumerate(todo, start=1):
        kept = folder / f"{method}-{seed}.json"
        if not kept.exists():
            row = run(
                method, seed, dense, loaded, arguments, folder / f"{method}-{seed}.safetensors"
            )
            storage.write_json(kept, row)
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
        print(
            f"{number}/{len(todo)} {method} seed {seed}: development "
            f"{rows[-1]['before']:.4f} -> {rows[-1]['development']:.4f}",
            flush=True,
        )
    figures = {
        "epochs": arguments.epochs,
        "scope": arguments.scope,
        "macs_allowed": MACS,
        "width_multiple": WIDTH_MULTIPLE,
        "dense_epochs": DENSE.epochs,
        **accuracies,
        "methods": summarise(rows),
        "rows": rows,
    }
    figures["over_the_default"] = gains(rows)
    better = {
        name: found for name, found in figures["over_the_default"].items() if found["low"] > 0
    }
    figures["chosen"] = max(better, key=lambda name: better[name]["mean"], default=DEFAULT)
    seconds = sum(row["seconds"] for row in rows)
    print(f"chosen: {figures['chosen']} ({time.monotonic() - begin:.0f} s this time)")
    print(write_result(name, seed=SEEDS[0], seconds=seconds, figures=figures, script="criteria"))


def dense_network(loaded: data.Data, folder: Path) -> nn.Module:
    """Trained, or read from ``folder``."""
    if not folder.exists():
        torch.manual_seed(SEEDS[0])
        network = models.build(FACTORY, {})
        checkpoint = folder.with_suffix(".safetensors")
        training.fit(network, loaded, DENSE, seed=SEEDS[0], checkpoint=checkpoint, label="dense")
        described = record.NetworkRecord.of(FACTORY, {}, tuple(loaded.train.inputs.shape[1:]))
        record.save_network(folder, network, described)
    return record.load_network(folder)[0].eval()


def run(
    method: str,
    seed: int,
    dense: nn.Module,
    loaded: data.Data,
    arguments: argparse.Namespace,
    checkpoint: Path,
) -> dict[str, Any]:
    """Score, cut, re-estimate BatchNorm, fine-tune; accuracies after each."""
    begin = time.monotonic()
    chosen = data.draw(loaded.train, BATCHNORM_IMAGES, seed)
    images = data.normalise(loaded.train.inputs[chosen], loaded.preprocessing)
    targets = loaded.train.targets[chosen]
    analysis = analyse(dense, images[:2])
    scoring_begins = time.monotonic()
    scoring = measure(
        dense, analysis, images[:IMAGES], method=method, targets=targets[:IMAGES], seed=seed
    )
    scoring_seconds = time.monotonic() - scoring_begins
    removed = budget.choose(
        analysis,
        scoring.scores,
        macs=MACS,
        width_multiple=WIDTH_MULTIPLE,
        scope=arguments.scope,
    )
    compact = surgery.prune_channels(dense, images[:2], removed)
    before = accuracy(compact, loaded, loaded.development)
    batchnorm.reestimate(compact, images)
    reestimated = accuracy(compact, loaded, loaded.development)
    training.fit(
        compact,
        loaded,
        TrainingSettings(
            epochs=arguments.epochs,
            batch_size=128,
            learning_rate=0.05,
            weight_decay=1e-4,
            warmup_epochs=0.1,
            precision="bf16",
        ),
        seed=seed,
        checkpoint=checkpoint,
        label=f"{method} {seed}",
    )
    counted, whole = cost.count(compact, images[:1]), cost.count(dense, images[:1])
    row = {
        "method": method,
        "seed": seed,
        "before": before,
        "reestimated": reestimated,
        "development": accuracy(compact, loaded, loaded.development),
        "test": test_accuracy(compact, loaded),
        "macs": counted.macs / whole.macs,
        "params": counted.params / whole.params,
        "images": scoring.images,
        "scoring_seconds": scoring_seconds,
        "widths": budget.widths(analysis, removed),
        "seconds": time.monotonic() - begin,
    }
    checkpoint.unlink(missing_ok=True)
    return row


def gains(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Points of development accuracy that each method is ahead of the default, paired by seed, with
    a 95% interval (Student's t)."""
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own, default = (
            np.array([row["development"] for row in rows if row["method"] == name])
            for name in (method, DEFAULT)
        )
        ahead = 100 * (own - default)
        half = stats.t.ppf(0.975, len(ahead) - 1) * ahead.std(ddof=1) / np.sqrt(len(ahead))
        mean = float(ahead.mean())
        found[method] = {"mean": mean, "low": mean - float(half), "high": mean + float(half)}
    return found


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds of each method."""
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        found[method] = {
            key: {
                "mean": float(np.mean([row[key] for row in own])),
                "deviation": float(np.std([row[key] for row in own], ddof=1)),
            }
            for key in ("before", "reestimated", "development", "test", "macs", "params", "images")
        }
    return found


if __name__ == "__main__":
    main()
