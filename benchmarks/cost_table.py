"""How well a cost table predicts whole networks on this x86 processor, by both runtimes, batch 1.

    python benchmarks/cost_table.py [--choices 30] [--threads 2] [--work DIR]

ResNet-56 (CIFAR form, 32x32) and torchvision's MobileNetV2 (224x224), with random weights, since
latency does not depend on them. For each network and runtime: its table is measured; random widths
are drawn, each group between a fifth of its channels and all of them, on multiples of the target's
block; the pruned networks are measured, a few at a time beside the dense one, each in a process of
its own, in alternating blocks: as shares of the dense network's latency, by block, so that races
hours apart can be compared. A race in which the dense network took over 15% longer than in the
fastest one fell into a spell in which others had part of the processor, which moves these shares
too: it is run again, at most twice. Errors are told of the sum of the table alone, and after the
correction that whole networks teach, cross-validated: each network is predicted by a correction
that was learned from the networks of the other folds.

What was measured is kept in DIR (default: greenprune-cost-table in the folder for temporary
files), and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from common import write_result
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from greenprune import cost_tables, models, storage
from greenprune.harness import race
from greenprune.harness.statistics import paired_ratio
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.layer_shapes import shapes_of
from greenprune.pruning.predictor import Predictor, learn
from greenprune.pruning.surgery import compact
from greenprune.registry import load_target
from greenprune.whole_networks import race_networks

SEED = 0
TARGET = "x86"
RUNTIMES = ("onnxruntime", "openvino")
NETWORKS = {"resnet56": 32, "mobilenet_v2": 224}
"""And the height and width of their input."""
DENSE = "dense"
TOGETHER = 6
"""Networks in one race: more processes would only wait for each other."""
DISTURBED = 1.15
"""A race whose dense network took this times as long as the fastest one's is run again, ..."""
AGAIN = 2
"""... so often at most."""
FOLDS = 5
KEEP_AT_LEAST = 0.2
WORK = Path(tempfile.gettempdir()) / "greenprune-cost-table"
PRESET = replace(race.PRESET, windows=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choices", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()

    begin = time.monotonic()
    figures: dict[str, Any] = {"threads": arguments.threads, "networks": {}}
    for name in arguments.networks:
        network, example = make(name)
        analysis = analyse(network, example)
        found = figures["networks"][name] = {"input_size": NETWORKS[name]}
        for runtime in arguments.runtimes:
            table = cost_tables.table_for(
                layers := shapes_of(network, example, analysis),
                target=TARGET,
                runtime=runtime,
                threads=arguments.threads,
                network=name,
                cache=arguments.work / "tables",
            )
            predictor = Predictor(layers, table)
            lost = draw(analysis, arguments.choices, table.block_width)
            kept = arguments.work / f"{name}-{runtime}-{arguments.threads}.json"
            measured = measure(network, example, analysis, lost, runtime, arguments.threads, kept)
            found[runtime] = {
                "table_seconds": table.seconds,
                "points": sum(len(each.points) for each in table.costs),
                "block_width": table.block_width,
                **compare(predictor.summed_ms(lost), measured),
            }
            print(name, runtime, found[runtime], flush=True)
    seconds = time.monotonic() - begin
    print(write_result("cost_table", seed=SEED, seconds=seconds, figures=figures))


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode, and an input of two images."""
    torch.manual_seed(SEED)
    size = NETWORKS[name]
    if name == "resnet56":
        network = models.build("greenprune.models:resnet56", {})
    else:
        network = torchvision.models.mobilenet_v2()
    return network.eval(), torch.randn(2, 3, size, size)


def draw(analysis: Analysis, choices: int, block_width: int) -> dict[str, NDArray[np.int64]]:
    """Channels that each group loses, int64 [choices]; the first choice is the dense network."""
    block = min(block_width, load_target(TARGET).capabilities.width_multiple)
    full = np.array([group.channels for group in analysis.groups])
    least = np.ceil(KEEP_AT_LEAST * full / block).astype(np.int64)
    widths = np.array(
        [
            # a generator for each: with more choices the first ones stay
            block * np.random.default_rng((SEED, place)).integers(least, full // block + 1)
            for place in range(choices)
        ]
    )
    widths[0] = full
    counts = full - np.minimum(widths, full)
    return {group.name: counts[:, place] for place, group in enumerate(analysis.groups)}


def measure(
    network: nn.Module,
    example: Tensor,
    analysis: Analysis,
    lost: dict[str, NDArray[np.int64]],
    runtime: str,
    threads: int,
    kept: Path,
) -> NDArray[np.float64]:
    """Milliseconds of each choice, float64 [choices]; those in the file ``kept`` are not repeated.

    Choices are known there by what they lose, with their share of the dense network's latency and
    what that was in their race; the median of these makes all shares milliseconds.
    """
    choices = [
        {name: int(counts[place]) for name, counts in lost.items()}
        for place in range(len(next(iter(lost.values()))))
    ]
    keys = [storage.sha256_of(choice)[:16] for choice in choices]
    known: dict[str, tuple[float, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for _ in range(1 + AGAIN):
        usual_ms = min((dense_ms for _, dense_ms in known.values()), default=0.0)
        todo = [
            place
            for place, key in enumerate(keys)
            if key not in known or known[key][1] > DISTURBED * usual_ms
        ]
        for at in range(0, len(todo), TOGETHER):
            batch = todo[at : at + TOGETHER]
            networks = {
                keys[place]: compact(
                    network, analysis, {name: range(n) for name, n in choices[place].items() if n}
                )
                for place in batch
            } | {DENSE: network}
            found = race_networks(
                TARGET, networks, [runtime], example, threads=threads, seed=SEED, preset=PRESET
            )
            blocks, latency = found.racers[0].blocks_ms, found.racers[0].latency_ms
            known |= {
                keys[place]: (
                    paired_ratio(blocks[keys[place]], blocks[DENSE]).value,
                    latency[DENSE].value,
                )
                for place in batch
            }
            storage.write_json(kept, known)
            print(
                f"{kept.stem}: {min(at + TOGETHER, len(todo))} of {len(todo)} measured", flush=True
            )
    shares, dense_ms = np.array([known[key] for key in keys]).T
    return np.asarray(shares * np.median(dense_ms))


def compare(summed: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, Any]:
    """Errors before the correction, and after it, cross-validated."""
    folds = np.arange(len(measured)) % FOLDS
    after = np.empty_like(measured)
    for fold in range(FOLDS) if len(measured) >= 2 * FOLDS else ():
        others = folds != fold
        found = learn(summed[others], measured[others])
        after[~others] = found["intercept_us"] / 1000 + found["slope"] * summed[~others]
    enough = len(measured) >= 2 * FOLDS
    return {
        "choices": len(measured),
        "measured_ms": measured.tolist(),
        "summed_ms": summed.tolist(),
        "before": errors(summed, measured),
        "after": errors(after, measured) if enough else None,
        "correction": learn(summed, measured) if len(measured) > 1 else None,
    }


def errors(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float]:
    relative = np.abs(predicted - measured) / measured
    return {
        "median_error": float(np.median(relative)),
        "p90_error": float(np.percentile(relative, 90)),
        "spearman": float(spearmanr(predicted, measured).statistic),
    }


if __name__ == "__main__":
    main()
