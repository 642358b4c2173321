"""What scoring and CBS cost, on ResNet-56 trained on CIFAR-10.

    python benchmarks/scoring.py --data=DIR --weights=resnet56.th [--threads=2]

- ``ranks``: matrix ranks of the maps behind all 55 convolutions, ours against a loop that calls
  ``torch.linalg.matrix_rank`` on one map after the other, as HRank does; the same maps, in turns,
  and whether every rank is the same.
- ``scoring``: the whole scoring, images added until the order is stable, against HRank's protocol
  (github.com/lmbxmu/HRank: 640 augmented training images in 5 batches, a fresh sweep over them for
  each of the 55 layers, the loop over maps in a hook). Its time is extrapolated from three layers,
  one of each map size, whose sweeps are measured whole. We add its images until the order is
  stable. Its ranks are computed by our function, which ``ranks`` shows to be equal.
- ``cbs``: a training step with CBS over one without, in turns.

A ratio is the median over turns, with a 95 % interval.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from common import write_result
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune import data, models, schema, sparsity
from greenprune.harness.statistics import paired_ratio
from greenprune.pruning.graph import analyse
from greenprune.pruning.ranks import matrix_ranks
from greenprune.pruning.scores import measure, spearman
from greenprune.recipe import load

SEED = 0
HRANK_BATCHES, HRANK_BATCH = 5, 128
LAYERS = 55
MEASURED_LAYERS = {0: 19, 19: 18, 54: 18}
"""A layer, and how many have maps of its size."""
IMAGES_A_TURN = 64
STRENGTH = 1e-4

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=6, help="of the comparison of ranks")
    parser.add_argument("--steps", type=int, default=40, help="of each kind, for CBS")
    arguments = parser.parse_args()

    begin = time.monotonic()
    torch.set_num_threads(arguments.threads)
    network = models.build("greenprune.models:resnet56", {})
    models.load_weights(network, arguments.weights)
    network.eval()
    loaded = load_images(arguments.data, arguments.weights)
    figures: dict[str, Any] = {"threads": arguments.threads}
    figures["ranks"] = compare_ranks(network, loaded, arguments.turns)
    report("ranks", figures["ranks"])
    figures["scoring"] = compare_scoring(network, loaded)
    report("scoring", figures["scoring"])
    figures["cbs"] = {
        name: compare_cbs(factory, shape, arguments.steps * times)
        for name, factory, shape, times in (
            ("resnet56", "greenprune.models:resnet56", (128, 3, 32, 32), 1),
            ("lenet5", "greenprune.models:lenet5", (128, 1, 32, 32), 10),
        )
    }
    report("cbs", figures["cbs"])
    print(write_result("scoring", seed=SEED, seconds=time.monotonic() - begin, figures=figures))


def report(name: str, figures: dict[str, Any]) -> None:
    print(f"{name}: {figures}", flush=True)


def load_images(folder: Path, weights: Path) -> data.Data:
    recipe = load(
        "resnet56-cifar10",
        [f'data.path="{folder.resolve()}"', f'model.weights="{weights.resolve()}"'],
    )
    return data.load(recipe.data, recipe.seed)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came of it."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


@contextmanager
def looking(network: nn.Module, look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, ``look(layer, maps)`` is called with the maps behind each of the 55 convolutions."""
    calls = itertools.count()

    def hook(module: nn.Module, given: tuple[Tensor, ...], maps: Tensor) -> None:
        look(next(calls) % LAYERS, maps)  # a block calls its one ReLU behind both convolutions

    handles = [
        module.register_forward_hook(hook)
        for module in network.modules()
        if isinstance(module, nn.ReLU)
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def loop(maps: Tensor) -> Tensor:
    """HRank's: one call a map."""
    ranks = [torch.linalg.matrix_rank(each) for image in maps for each in image]
    return torch.stack(ranks).reshape(maps.shape[:2])


def compare_ranks(network: nn.Module, loaded: data.Data, turns: int) -> dict[str, Any]:
    images = some_images(loaded, IMAGES_A_TURN * (turns + 1), SEED).split(IMAGES_A_TURN)
    rows = [compare_ranks_once(network, part) for part in images]
    ours, theirs = ([row[key] for row in rows[1:]] for key in ("ours", "loop"))  # one warms up
    return {
        "maps": sum(row["maps"] for row in rows),
        "different": sum(row["different"] for row in rows),
        "ours_us_a_map": 1e6 * float(np.median(ours)) / rows[0]["maps"],
        "loop_us_a_map": 1e6 * float(np.median(theirs)) / rows[0]["maps"],
        "ratio": schema.encode(paired_ratio(theirs, ours)),
    }


def compare_ranks_once(network: nn.Module, images: Tensor) -> dict[str, Any]:
    layers: list[Tensor] = []
    with looking(network, lambda _, maps: layers.append(maps.clone())):
        network(images)
    ours, found = timed(lambda: [matrix_ranks(maps) for maps in layers])
    theirs, expected = timed(lambda: [loop(maps) for maps in layers])
    return {
        "maps": sum(ranks.numel() for ranks in found),
        "different": sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True)),
        "ours": ours,
        "loop": theirs,
    }


def compare_scoring(network: nn.Module, loaded: data.Data) -> dict[str, Any]:
    protocol = augmented_batches(loaded)
    images = torch.cat(protocol)
    analysis = analyse(network, images[:2])
    sweeps = [hrank_sweep(network, protocol, layer) for layer in MEASURED_LAYERS]
    theirs = sum(
        layers * (sweep["rank_seconds"] + sweep["forward_seconds"])
        for layers, sweep in zip(MEASURED_LAYERS.values(), sweeps, strict=True)
    )
    figures: dict[str, Any] = {"hrank_protocol": {"measured": sweeps, "seconds": theirs}}
    for method in ("hrank", "drp"):
        score = partial(measure, network, analysis, images, method=method)
        times, scorings = zip(*(timed(score) for _ in range(3)), strict=True)
        figures[method] = {
            "images": scorings[0].images,
            "stability": float(np.mean(list(scorings[0].stability.values()))),
            "seconds": float(np.median(times)),
            "ratio": theirs / float(np.median(times)),
        }
    used = images[: figures["hrank"]["images"]].split(64)
    figures["spearman"] = agreement(mean_ranks(network, used), mean_ranks(network, protocol))
    return figures


def augmented_batches(loaded: data.Data) -> list[Tensor]:
    """HRank's images: cropped and flipped."""
    order = torch.randperm(len(loaded.train), generator=torch.Generator().manual_seed(SEED + 1))
    generator = torch.Generator().manual_seed(SEED)
    return [
        data.take(loaded.train, part, loaded.preprocessing, generator, loaded.augmentation)[0]
        for part in order[: HRANK_BATCHES * HRANK_BATCH].split(HRANK_BATCH)
    ]


def hrank_sweep(network: nn.Module, batches: list[Tensor], layer: int) -> dict[str, Any]:
    """One layer's sweep over all batches: the loop in a hook."""
    spent: list[float] = []
    sizes: list[int] = []

    def look(index: int, maps: Tensor) -> None:
        if index == layer:
            spent.append(timed(lambda: loop(maps))[0])
            sizes.append(maps.shape[0] * maps.shape[1])

    with looking(network, look):
        whole, _ = timed(lambda: [network(batch) for batch in batches])
    print(f"HRank's sweep for layer {layer}: {whole:.1f} s", flush=True)
    return {
        "layer": layer,
        "maps": sum(sizes),
        "rank_seconds": sum(spent),
        "forward_seconds": whole - sum(spent),
    }


def mean_ranks(network: nn.Module, batches: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """Of each filter of the 55 layers."""
    sums: list[Any] = [0] * LAYERS

    def look(layer: int, maps: Tensor) -> None:
        sums[layer] = sums[layer] + matrix_ranks(maps).sum(dim=0)

    with looking(network, look):
        for batch in batches:
            network(batch)
    count = sum(map(len, batches))
    return [each.double().numpy() / count for each in sums]


def agreement(
    ours: list[NDArray[np.float64]], theirs: list[NDArray[np.float64]]
) -> dict[str, float]:
    by_layer = [spearman(a, b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "all_filters": spearman(np.concatenate(ours), np.concatenate(theirs)),
        "layers_mean": float(np.mean(by_layer)),
        "layers_min": min(by_layer),
    }


def compare_cbs(factory: str, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Steps with and without CBS in turns, on one network."""
    torch.manual_seed(SEED)
    network = models.build(factory, {}).train()
    inputs, targets = torch.randn(shape), torch.randint(10, shape[:1])
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    penalty = sparsity.build(network, inputs[:2], "cbs", STRENGTH)

    def step(with_cbs: bool) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
        if with_cbs:
            penalty.step(optimizer)

    plain, sparse = [], []
    for turn in range(steps + 3):
        order = (False, True) if turn % 2 else (True, False)
        times = {with_cbs: timed(partial(step, with_cbs))[0] for with_cbs in order}
        if turn >= 3:
            plain.append(times[False])
            sparse.append(times[True])
    alone = [timed(lambda: penalty.step(optimizer))[0] for _ in range(100)]
    return {
        "plain_ms": 1e3 * float(np.median(plain)),
        "cbs_step_alone_ms": 1e3 * float(np.median(alone)),
        "alone_over_plain": 1 + float(np.median(alone) / np.median(plain)),
        "ratio": schema.encode(paired_ratio(sparse, plain)),
    }


def some_images(loaded: data.Data, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(loaded.train), generator=torch.Generator().manual_seed(seed))
    return data.normalise(loaded.train.inputs[order[:count]], loaded.preprocessing)


if __name__ == "__main__":
    main()
