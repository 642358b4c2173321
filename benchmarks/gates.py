"""One training with gates beside DRP and fine-tuning, for the same epochs: 50% of the MACs stay.

    python benchmarks/gates.py resnet20 --data=DIR --weights=resnet20.th --epochs=10
    python benchmarks/gates.py lenet5 --data=DIR --epochs=6

``resnet20``, CIFAR-10, from trained weights:

- ``gates``: the given epochs with :func:`greenprune.pruning.gates.train`, half of them with gates;
- ``drp``: scored by DRP, cut, BatchNorm re-estimated, fine-tuned for the given epochs.

``lenet5``, MNIST, from nothing: ``gates`` the same; ``drp`` trains the dense network for the first
half of the epochs, cuts it, and fine-tunes for the second.

Both may keep 50% of the MACs, with widths on multiples of ``--width-multiple``; neither has a
teacher. The test images judge once, after the last epoch. Besides: what a training step with gates
costs, over a plain one of the dense network, the two in turns. One result a network, method and
seed is kept under ``--runs``: what is there is not run again, and a training that was killed goes
on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import torch
from cifar import some_images, test_accuracy
from common import keep_network, write_result
from torch import Tensor, nn

from greenprune import data, models, storage, training
from greenprune.models.lenet import LeNet5
from greenprune.pruning import batchnorm, budget, cost, gates, record, surgery
from greenprune.pruning.gates import GateSettings
from greenprune.pruning.graph import analyse
from greenprune.pruning.scores import measure
from greenprune.recipe import TrainingSettings, load

MACS = 0.5
KEEP_AT_LEAST = 0.1
IMAGES = 256
BATCHNORM_IMAGES = 1024
STEP_PAIRS = 20
METHODS = ("gates", "drp")
LEARNING_RATE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=["resnet20", "lenet5"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of resnet20")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--width-multiple", type=int, default=4)
    parser.add_argument("--images", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    if (arguments.weights is None) == (arguments.network == "resnet20"):
        parser.error("--weights belongs to resnet20")
    if arguments.epochs < 2:
        parser.error("--epochs: expected 2 or more")

    loaded = load_images(arguments)
    settings = schedule(arguments)
    label = f"{arguments.epochs}-{arguments.width_multiple}-{len(loaded.train)}"
    folder = arguments.runs / f"gates-{arguments.network}-{label}"
    todo = [(method, seed) for seed in range(arguments.seeds) for method in METHODS]
    rows: list[dict[str, Any]] = []
    for number, (method, seed) in enumerate(todo, start=1):
        name = f"{method}-{seed}"
        kept = folder / f"{name}.json"
        if not kept.exists():
            begin = time.monotonic()
            run = with_gates if method == "gates" else with_drp
            row = {"method": method, "seed": seed}
            found, compact, described = run(
                dense(arguments, seed), loaded, settings, seed, folder / name
            )
            record.save_network(folder / "networks" / name, compact, described)
            if seed == 0:
                keep_network(folder / "networks" / name, f"gates_{arguments.network}_{method}")
            row |= found
            storage.write_json(kept, row | {"seconds": time.monotonic() - begin})
            shutil.rmtree(folder / name, ignore_errors=True)
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
        print(
            f"{number}/{len(todo)} {name}: test {rows[-1]['test']:.4f} at "
            f"{rows[-1]['macs']:.1%} of the MACs, {rows[-1]['seconds']:.0f} s",
            flush=True,
        )
    figures = {
        "network": arguments.network,
        "epochs": arguments.epochs,
        "macs_allowed": MACS,
        "width_multiple": arguments.width_multiple,
        "training_images": len(loaded.train),
        "dense_test": test_accuracy(dense(arguments, 0), loaded) if arguments.weights else None,
        "step_cost": step_cost(dense(arguments, 0), loaded, settings),
        "methods": summarise(rows),
        "rows": rows,
    }
    print(json.dumps({key: figures[key] for key in ("dense_test", "step_cost", "methods")}))
    seconds = sum(row["seconds"] for row in rows)
    name = f"gates_{arguments.network}"
    print(write_result(name, seed=0, seconds=seconds, figures=figures, script="gates"))


def load_images(arguments: argparse.Namespace) -> data.Data:
    """As the built-in recipes have them, with all training images trained on."""
    if arguments.network == "resnet20":
        loaded = cifar.load_images(arguments.data, arguments.weights)
    else:
        place = f'data.path="{arguments.data.resolve()}"'
        changes = ['data.source="mnist"', "data.size=[32,32]", 'data.held_out_from="test"']
        recipe = load("lenet5-digits", [place, *changes, "data.development=0"])
        loaded = data.load(recipe.data, recipe.seed)
    if not arguments.images:
        return loaded
    some = data.Split(
        inputs=loaded.train.inputs[: arguments.images],
        targets=loaded.train.targets[: arguments.images],
    )
    return replace(loaded, train=some, fingerprint=f"{loaded.fingerprint} {len(some)}")


def schedule(arguments: argparse.Namespace) -> GateSettings:
    return GateSettings(
        epochs=arguments.epochs,
        gated_epochs=math.ceil(arguments.epochs / 2),
        batch_size=128,
        learning_rate=LEARNING_RATE,
        weight_decay=1e-4,
        warmup_epochs=0.1,
        precision="bf16",
        macs=MACS,
        width_multiple=arguments.width_multiple,
    )


def plain(settings: GateSettings, epochs: int) -> TrainingSettings:
    """The same schedule without gates."""
    return TrainingSettings(
        epochs=epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        precision=settings.precision,
    )


def dense(arguments: argparse.Namespace, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = models.build(f"greenprune.models:{arguments.network}", {})
    if arguments.weights:
        models.load_weights(network, arguments.weights)
    return network.eval()


def with_gates(
    network: nn.Module, loaded: data.Data, settings: GateSettings, seed: int, checkpoints: Path
) -> tuple[dict[str, Any], nn.Module, record.NetworkRecord]:
    """Figures, the compact network, and how it is rebuilt."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    example = some_images(loaded, 1, seed)
    whole = cost.count(network, example)
    outcome = gates.train(
        network, loaded, settings, seed=seed, checkpoint=checkpoints / "gates.safetensors"
    )
    figures = figures_of(outcome.network, loaded, whole, example) | {
        "gated_test": test_accuracy(network, loaded),
        "gated_macs": outcome.gated_macs,
        "moved": outcome.moved,
        "polarization": outcome.polarization,
        "removed_blocks": outcome.removed_blocks,
        "loss": [*outcome.history.loss, *outcome.settled_history.loss],
    }
    return figures, outcome.network, outcome.record(described(network, example))


def with_drp(
    network: nn.Module, loaded: data.Data, settings: GateSettings, seed: int, checkpoints: Path
) -> tuple[dict[str, Any], nn.Module, record.NetworkRecord]:
    """Figures, the compact network, and how it is rebuilt."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    images = some_images(loaded, BATCHNORM_IMAGES, seed)
    epochs, losses = settings.epochs, []
    if isinstance(network, LeNet5):
        first = settings.gated_epochs
        history = training.fit(
            network,
            loaded,
            plain(settings, first),
            seed=seed,
            checkpoint=checkpoints / "dense.safetensors",
            label="dense",
        )
        epochs, losses = epochs - first, [*history.loss]
    whole = cost.count(network, images[:1])
    analysis = analyse(network, images[:2])
    removed = budget.choose(
        analysis,
        measure(network, analysis, images[:IMAGES], method="drp", seed=seed).scores,
        macs=MACS,
        width_multiple=settings.width_multiple,
        keep_at_least=KEEP_AT_LEAST,
    )
    compact = surgery.prune_channels(network, images[:2], removed)
    batchnorm.reestimate(compact, images)
    history = training.fit(
        compact,
        loaded,
        plain(settings, epochs),
        seed=seed + 1,
        checkpoint=checkpoints / "compact.safetensors",
        label="fine-tune",
    )
    figures = figures_of(compact, loaded, whole, images[:1])
    figures["loss"] = [*losses, *history.loss]
    return figures, compact, described(network, images).pruned(analysis, removed)


def described(network: nn.Module, images: Tensor) -> record.NetworkRecord:
    """The dense network, by the factory that made it."""
    name = "lenet5" if isinstance(network, LeNet5) else "resnet20"
    return record.NetworkRecord.of(f"greenprune.models:{name}", {}, tuple(images.shape[1:]))


def figures_of(
    compact: nn.Module, loaded: data.Data, whole: cost.Cost, example: Tensor
) -> dict[str, Any]:
    counted = cost.count(compact, example)
    return {
        "test": test_accuracy(compact, loaded),
        "macs": counted.macs / whole.macs,
        "params": counted.params / whole.params,
        "widths": {
            name: module.weight.shape[0]
            for name, module in compact.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        },
    }


def step_cost(network: nn.Module, loaded: data.Data, settings: GateSettings) -> dict[str, float]:
    """Milliseconds of a training step, forward to update, plain and with gates in turns."""
    inputs = some_images(loaded, settings.batch_size, 0).contiguous(
        memory_format=torch.channels_last
    )
    targets = loaded.train.targets[: len(inputs)]
    gated = gates.build(network, inputs, settings)
    gated.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    loss = gates.objective(gated, loaded, settings, training.cross_entropy)
    steps = {
        "plain_ms": (network, training.cross_entropy),
        "gated_ms": (gated, loss),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEP_PAIRS + 2):
        for name, (module, objective) in steps.items():
            optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9, nesterov=True)
            begin = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = module(inputs)
            objective(outputs.float(), targets).backward()
            optimizer.step()
            seconds[name].append(time.perf_counter() - begin)
    found = {name: 1000 * float(np.median(values[2:])) for name, values in seconds.items()}
    pairs = zip(seconds["gated_ms"][2:], seconds["plain_ms"][2:], strict=True)
    return found | {"ratio": float(np.median([gated / plain for gated, plain in pairs]))}


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds of each method."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        found[method] = {
            key: {
                "mean": float(np.mean([row[key] for row in own])),
                "deviation": float(np.std([row[key] for row in own], ddof=1))
                if len(own) > 1
                else None,
            }
            for key in ("test", "macs", "params", "seconds")
        }
    return found


if __name__ == "__main__":
    main()
