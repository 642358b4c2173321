"""ResNet-56 on CIFAR-10, pruned from a trained checkpoint and fine-tuned for 15 epochs.

    python benchmarks/resnet56_points.py POINT METHOD --data=DIR --weights=resnet56.th

POINT is ``half`` (at most 52.55% of the MACs and 57.65% of the parameters stay, as in the paper) or
``quarter`` (at most 26% of the MACs). METHOD is ``drp`` (greenprune's defaults) or ``taylor``:
torch-pruning 1.6.1 with its Taylor importance, global, in small steps, on the channels inside the
blocks, then the same training without a teacher, as its users have it; ``taylor_distilled`` gives
it our teacher as well. ``pip install torch-pruning==1.6.1`` for these two.

All 50,000 training images; the 10,000 test images choose nothing: accuracies are before
fine-tuning and after the last epoch. Killed, it goes on from the last epoch.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar import load_images, some_images, test_accuracy
from common import keep_network, write_result
from torch import Tensor, nn

from greenprune import data, models, training
from greenprune.pruning import batchnorm, budget, cost, record, surgery
from greenprune.pruning.graph import analyse
from greenprune.pruning.scores import measure
from greenprune.recipe import DistillationSettings, TrainingSettings

SEED = 0
IMAGES = 256
BATCHNORM_IMAGES = 1024
EPOCHS = 15


@dataclass(frozen=True, kw_only=True)
class Point:
    """What may stay, and the schedule."""

    macs: float
    params: float = 1.0
    width_multiple: int = 4
    keep_at_least: float = 0.1
    learning_rate: float = 0.05
    features: float = 0.0
    """As ``finetune.*.features``, for what is distilled."""


POINTS = {
    "half": Point(macs=1 - 0.4745, params=1 - 0.4235),
    "quarter": Point(macs=0.26, features=50.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("point", choices=POINTS)
    parser.add_argument("method", choices=["drp", "taylor", "taylor_distilled"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()

    begin = time.monotonic()
    point = POINTS[arguments.point]
    name = f"resnet56_{arguments.point}_{arguments.method}_{arguments.seed}"
    folder = arguments.runs / name
    loaded = load_images(arguments.data, arguments.weights)
    dense = models.build("greenprune.models:resnet56", {})
    models.load_weights(dense, arguments.weights)
    dense.eval()
    images = some_images(loaded, IMAGES, arguments.seed)
    if arguments.method == "drp":
        compact, described = prune(dense, images, point)
    else:
        compact, described = prune_with_taylor(dense, loaded, point, arguments.seed), None
    before = test_accuracy(compact, loaded)
    batchnorm.reestimate(compact, some_images(loaded, BATCHNORM_IMAGES, arguments.seed + 1))
    reestimated = test_accuracy(compact, loaded)
    print(f"{name}: {before:.4f}, BatchNorm re-estimated {reestimated:.4f}", flush=True)
    settings = schedule(point, distilled=arguments.method != "taylor")
    history = training.fit(
        compact,
        loaded,
        settings,
        seed=arguments.seed,
        teacher=None if arguments.method == "taylor" else copy.deepcopy(dense),
        checkpoint=folder / "checkpoint.safetensors",
        label=name,
    )
    counted, whole = cost.count(compact, images[:1]), cost.count(dense, images[:1])
    figures: dict[str, Any] = {
        "accuracy": test_accuracy(compact, loaded),
        "accuracy_before_fine_tuning": before,
        "accuracy_with_batchnorm_reestimated": reestimated,
        "macs": counted.macs,
        "params": counted.params,
        "macs_removed": 1 - counted.macs / whole.macs,
        "params_removed": 1 - counted.params / whole.params,
        "epochs": EPOCHS,
        "loss": history.loss,
        "epoch_seconds": history.seconds,
        "widths": {
            key: module.out_channels
            for key, module in compact.named_modules()
            if isinstance(module, nn.Conv2d)
        },
    }
    if described is not None:
        record.save_network(folder / "network", compact, described)
        keep_network(folder / "network", name)
    print(
        write_result(
            f"resnet56_points/{name}",
            seed=arguments.seed,
            seconds=time.monotonic() - begin,
            figures=figures,
            script="resnet56_points",
        )
    )


def schedule(point: Point, *, distilled: bool) -> TrainingSettings:
    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch_size": 128,
        "learning_rate": point.learning_rate,
        "weight_decay": 2e-4,
        "warmup_epochs": 0.5,
        "precision": "bf16",
    }
    if distilled:
        return DistillationSettings(
            distillation=0.9, temperature=4.0, features=point.features, **settings
        )
    return TrainingSettings(**settings)


def prune(dense: nn.Module, images: Tensor, point: Point) -> tuple[nn.Module, record.NetworkRecord]:
    analysis = analyse(dense, images)
    removed = budget.choose(
        analysis,
        measure(dense, analysis, images).scores,
        macs=point.macs,
        params=point.params,
        width_multiple=point.width_multiple,
        keep_at_least=point.keep_at_least,
    )
    compact = surgery.prune_channels(dense, images, removed)
    described = record.NetworkRecord.of("greenprune.models:resnet56", {}, tuple(images.shape[1:]))
    return compact, described.pruned(analysis, removed)


def prune_with_taylor(dense: nn.Module, loaded: data.Data, point: Point, seed: int) -> nn.Module:
    """torch-pruning's way: gradients of the loss on 256 training images before each step."""
    import torch_pruning as tp

    network = copy.deepcopy(dense)
    example = some_images(loaded, 1, seed)
    kept = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and not (name.endswith("conv1") and "layer" in name))
    ]
    pruner = tp.pruner.MagnitudePruner(
        network,
        example,
        importance=tp.importance.TaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.9,
        iterative_steps=20 * 2,
        ignored_layers=kept,
    )
    order = data.draw(loaded.train, IMAGES, seed)
    inputs = data.normalise(loaded.train.inputs[order], loaded.preprocessing)
    targets = loaded.train.targets[order]
    whole = cost.count(dense, example)
    while cost.count(network, example).macs > point.macs * whole.macs:
        network.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        pruner.step()
    network.zero_grad()
    return network


if __name__ == "__main__":
    main()
