"""What ResNet-56's networks of ``measured_cost.py`` are worth after 15 epochs of the same training.

    python benchmarks/measured_cost_accuracy.py ARM --data=DIR --weights=FILE [--seed N] [--runs D]

ARM is ``macs``, ``macs_8`` or an arm (d), as ``measured_cost.py`` kept them under --runs, or
``torch_pruning_8``, which is made again. All are taught by the dense network, on all 50,000
training images; the 10,000 test images choose nothing: last epoch. The seed is the training's
alone: the network was chosen once. Killed, it goes on from the last epoch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from cifar import load_images, some_images, test_accuracy
from common import keep_network, write_result
from measured_cost import BUDGETS, make, torch_pruning

from greenprune import models, training
from greenprune.pruning import batchnorm, cost, record
from greenprune.recipe import DistillationSettings

SEED = 0
BATCHNORM_IMAGES = 1024
KEPT = ("macs", "macs_8", *BUDGETS["resnet56"])
SETTINGS = DistillationSettings(
    epochs=15,
    batch_size=128,
    learning_rate=0.05,
    weight_decay=2e-4,
    warmup_epochs=0.5,
    precision="bf16",
    distillation=0.9,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=[*KEPT, "torch_pruning_8"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED, help="of the training")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()

    begin = time.monotonic()
    arm = arguments.arm if arguments.seed == SEED else f"{arguments.arm}_seed{arguments.seed}"
    name = f"resnet56_measured_{arm}"
    folder = arguments.runs / name
    loaded = load_images(arguments.data, arguments.weights)
    dense = models.build("greenprune.models:resnet56", {})
    models.load_weights(dense, arguments.weights)
    described = None
    if arguments.arm in KEPT:
        place = arguments.runs / "resnet56_fp32" / arguments.arm
        network, described = record.load_network(place)
    else:
        network = torch_pruning(make("resnet56", loaded, arguments.weights))
    batchnorm.reestimate(network, some_images(loaded, BATCHNORM_IMAGES, SEED + 1))
    before = test_accuracy(network, loaded)
    print(f"{name}: {before:.4f} with BatchNorm re-estimated", flush=True)
    history = training.fit(
        network,
        loaded,
        SETTINGS,
        seed=arguments.seed,
        teacher=dense.eval(),
        checkpoint=folder / "checkpoint.safetensors",
        label=name,
    )
    counted = cost.count(network, some_images(loaded, 1, SEED))
    figures: dict[str, Any] = {
        "accuracy": test_accuracy(network, loaded),
        "accuracy_before_fine_tuning": before,
        "macs": counted.macs,
        "params": counted.params,
        "loss": history.loss,
        "epoch_seconds": history.seconds,
    }
    if described is not None and arguments.seed == SEED:
        record.save_network(folder / "network", network, described)
        keep_network(folder / "network", name)
    result = write_result(
        f"measured_cost_accuracy/{arm}",
        seed=arguments.seed,
        seconds=time.monotonic() - begin,
        figures=figures,
        script="measured_cost_accuracy",
    )
    print(result, figures["accuracy"])


if __name__ == "__main__":
    main()
