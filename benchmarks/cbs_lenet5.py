"""CBS against plain sparse training: LeNet-5 on MNIST, pruned and not yet fine-tuned.

    python benchmarks/cbs_lenet5.py --data=DIR

DIR holds ``MNIST/raw``. For each seed one network is trained for three epochs; every method then
trains that network on for two, with the same strengths; DRP orders the filters and every group
loses the same rate. What is reported is the accuracy on the 10,000 test images straight after the
cut, as it is and with the removed channels' means folded into the biases; CBS minus the plain
regulariser with a 95% interval (Student's t over seeds). ``cbs`` is to be compared with ``group``,
``cbs_l1`` with ``l1``: the same penalty without the bias. ``none`` trains on without a penalty.

One result a seed, method and strength is kept under ``--runs``: what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep_network, write_result
from scipy import stats
from torch import Tensor, nn

from greenprune import data, models, sparsity, storage, training
from greenprune.pruning import budget, folding, record, surgery
from greenprune.pruning.graph import analyse
from greenprune.pruning.scores import measure
from greenprune.recipe import DataSettings, SparsitySettings, TrainingSettings

SEEDS = (0, 1, 2, 3, 4)
PAIRS = {"cbs": "group", "cbs_l1": "l1"}
STRENGTHS = (2e-4, 1e-3, 5e-3)
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
IMAGES = 1024
SHOWN_RATE = 0.5
FACTORY = "greenprune.models:lenet5"
DENSE = TrainingSettings(epochs=3, batch_size=128, learning_rate=0.05)
SPARSE = SparsitySettings(epochs=2, batch_size=128, learning_rate=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()

    folder = arguments.runs / "cbs_lenet5"
    settings = DataSettings(
        source="mnist",
        path=str(arguments.data),
        size=(32, 32),
        development=0,
        selector=1,
        certification=1,
    )
    loaded = data.load(settings, seed=0)
    rows = [row for seed in SEEDS for row in one_seed(loaded, seed, folder)]
    dense = [row["accuracy"] for row in rows if row["method"] == "dense"]
    rows = [row for row in rows if row["method"] != "dense"]
    figures = {
        "dense_accuracy": dense,
        "epochs": {"dense": DENSE.epochs, "sparse": SPARSE.epochs},
        "before_the_cut": summarise_methods(rows),
        "differences": differences(rows),
        "rows": rows,
    }
    seconds = sum(row.pop("seconds") for row in rows)
    print(write_result("cbs_lenet5", seed=SEEDS[0], seconds=seconds, figures=figures))


def one_seed(loaded: data.Data, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of the dense network and of every method."""
    dense = dense_network(loaded, seed, folder / f"dense-{seed}")
    images = training_images(loaded, seed)
    methods = [("none", 0.0), *itertools.product(sparsity.METHODS, STRENGTHS)]
    rows = [{"seed": seed, "method": "dense", "accuracy": accuracy(dense, loaded)}]
    for method, strength in methods:
        kept = folder / f"{seed}-{method}-{strength}.json"
        if not kept.exists():
            begin = time.monotonic()
            found = one(dense, loaded, images, seed, method, strength)
            found[0]["seconds"] = time.monotonic() - begin
            storage.write_json(kept, found)
        found = json.loads(kept.read_text(encoding="utf-8"))
        rows += [{"seconds": 0.0, **row} for row in found]
        half = next(row for row in found if row["rate"] == SHOWN_RATE)
        print(
            f"seed {seed} {method} {strength}: {half['accuracy']:.4f}, {half['zero_share']:.0%} "
            f"zero, at rate {SHOWN_RATE} {half['cut']:.4f}",
            flush=True,
        )
    return rows


def dense_network(loaded: data.Data, seed: int, folder: Path) -> nn.Module:
    """Trained, or read from ``folder``."""
    if folder.exists():
        return record.load_network(folder)[0]
    torch.manual_seed(seed)
    network = models.build(FACTORY, {})
    training.fit(network, loaded, DENSE, seed=seed, label=f"seed {seed}")
    described = record.NetworkRecord.of(FACTORY, {}, tuple(loaded.train.inputs.shape[1:]))
    record.save_network(folder, network, described)
    return network


def training_images(loaded: data.Data, seed: int) -> Tensor:
    order = torch.randperm(len(loaded.train), generator=torch.Generator().manual_seed(seed))
    return data.normalise(loaded.train.inputs[order[:IMAGES]], loaded.preprocessing)


def one(
    dense: nn.Module, loaded: data.Data, images: Tensor, seed: int, method: str, strength: float
) -> list[dict[str, Any]]:
    """Sparse training from ``dense``, and the network at every rate."""
    network = copy.deepcopy(dense)
    penalty = None
    if method != "none":
        penalty = sparsity.build(network, images[:1], method, strength)
    training.fit(network, loaded, SPARSE, seed=seed + 100, penalty=penalty, label=method)
    shown = {
        "seed": seed,
        "method": method,
        "strength": strength,
        "accuracy": accuracy(network, loaded),
        "zero_share": penalty.zero_share() if penalty else 0.0,
    }
    name = f"cbs_lenet5_{method}" if (seed, strength) == (SEEDS[0], STRENGTHS[0]) else ""
    return [{**shown, **row} for row in cuts(network, loaded, images, name)]


def cuts(network: nn.Module, loaded: data.Data, images: Tensor, name: str) -> list[dict[str, Any]]:
    """The network at every rate; it is kept as the artifact ``name`` at one of them."""
    analysis = analyse(network, images[:2])
    scores = measure(network, analysis, images).scores
    rows = []
    for rate in RATES:
        removed = budget.by_rates(analysis, scores, {g.name: rate for g in analysis.groups})
        compact = surgery.prune_channels(network, images[:2], removed)
        row = {"rate": rate, "cut": accuracy(compact, loaded)}
        if name and rate == SHOWN_RATE:
            described = record.NetworkRecord.of(FACTORY, {}, tuple(images.shape[1:]))
            with tempfile.TemporaryDirectory() as scratch:
                record.save_network(
                    Path(scratch) / name, compact, described.pruned(analysis, removed)
                )
                keep_network(Path(scratch) / name, name)
        folding.fold_means(compact, network, analysis, removed, images)
        rows.append({**row, "folded": accuracy(compact, loaded)})
    return rows


def accuracy(network: nn.Module, loaded: data.Data) -> float:
    """On all 10,000 test images."""
    outputs = training.predict(network, loaded.test, loaded.preprocessing)
    return float(training.accuracy(outputs, loaded.test.targets).mean())


def summarise_methods(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [row for row in rows if row["rate"] == RATES[0]]
    return [
        {
            "method": method,
            "strength": strength,
            "accuracy": float(np.mean(values("accuracy", rows, method, strength))),
            "zero_share": float(np.mean(values("zero_share", rows, method, strength))),
        }
        for method, strength in dict.fromkeys((row["method"], row["strength"]) for row in rows)
    ]


def values(key: str, rows: list[dict[str, Any]], method: str, strength: float) -> list[float]:
    return [r[key] for r in rows if r["method"] == method and r["strength"] == strength]


def differences(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """CBS minus plain at each strength and rate, as cut and folded, paired by seed, in points."""
    table = []
    for cbs, plain in PAIRS.items():
        for strength, rate in itertools.product(STRENGTHS, RATES):
            rows = [row for row in every if row["rate"] == rate]
            entry: dict[str, Any] = {
                "method": cbs,
                "against": plain,
                "strength": strength,
                "rate": rate,
            }
            for way in ("cut", "folded"):
                own = np.array(values(way, rows, cbs, strength))
                other = np.array(values(way, rows, plain, strength))
                entry[way] = interval(100 * (own - other))
                entry[f"{way}_accuracy"] = [float(own.mean()), float(other.mean())]
            table.append(entry)
    return table


def interval(gained: np.ndarray) -> dict[str, float]:
    half = stats.t.ppf(0.975, len(gained) - 1) * gained.std(ddof=1) / np.sqrt(len(gained))
    return {
        "mean": float(gained.mean()),
        "low": float(gained.mean() - half),
        "high": float(gained.mean() + half),
    }


if __name__ == "__main__":
    main()
