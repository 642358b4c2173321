"""Pruning by MACs against pruning by what the device pays: milliseconds of each.

    python benchmarks/measured_cost.py --data=DIR --weights=resnet56.th [--precision int8]

ResNet-56 with the given weights, and VGG-16 (CIFAR form) and MobileNetV3-small (224x224) with
random ones, as latency does not depend on them:

(a) ``papers``: the rates that papers publish, where they do;
(b) ``macs``: DRP, half of the MACs, widths as they come;
(c) ``macs_8``: the same with widths on multiples of 8; ``torch_pruning_8``: torch-pruning 1.6.1,
    its global magnitude pruning with ``round_to=8`` (``pip install torch-pruning==1.6.1``);
(d) ``latency``: DRP within half of the dense latency, by the cost table of the runtime that the
    dense network is fastest on; ``latency_blocks``: whole residual blocks may go too;
    ``latency_blocks_65``, of ResNet-56: within 0.65 of the latency, as a network is to be compared
    with (c) that is as accurate.

In the end all networks of one kind are measured in alternating blocks, each in a process of its
own, on every runtime. The networks of ResNet-56 are kept under --runs, where
``measured_cost_accuracy.py`` finds them; so is what was found of each network, and the same command
goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from cifar import load_images, some_images
from common import write_result
from operating_points import resnet56_rates, vgg16_rates
from torch import Tensor, nn

from greenprune import cost_tables, data, models, schema, storage
from greenprune.errors import ProofError, PruningError
from greenprune.harness import race
from greenprune.harness.statistics import paired_ratio
from greenprune.models.resnet import BasicBlock, PaddedShortcut
from greenprune.pruning import budget, limits, optimise, record, removal, surgery, within
from greenprune.pruning.batchnorm import reestimate
from greenprune.pruning.cost import count
from greenprune.pruning.graph import Analysis
from greenprune.pruning.layer_shapes import shapes_of
from greenprune.pruning.predictor import Predictor
from greenprune.pruning.scores import Scores, measure
from greenprune.registry import load_target, runtime_name
from greenprune.whole_networks import race_networks

SEED = 0
IMAGES = 64
CALIBRATION = 200
KEEP_AT_LEAST = 0.1
NETWORKS = ("resnet56", "vgg16", "mobilenet_v3_small")
SHARE = 0.5
HALF = {"latency": (SHARE, False), "latency_blocks": (SHARE, True)}
BUDGETS = dict.fromkeys(NETWORKS, HALF) | {
    "resnet56": HALF | {"latency_blocks_65": (0.65, True)},
}
"""The arms (d) of each network: the share of the dense latency, and whether blocks may go."""
USUAL = load_target("x86").capabilities.width_multiple
RATES = {"resnet56": resnet56_rates, "vgg16": vgg16_rates}
PRESET = replace(
    race.PRESET, windows=31, window_seconds=0.3, warmup_seconds=1.0, warmup_cap_seconds=10.0
)
"""Short windows: what are compared stand near each other in time."""


@dataclass(frozen=True)
class Subject:
    """A dense network, and what is known of it."""

    name: str
    network: nn.Module
    images: Tensor
    analysis: Analysis
    scores: Scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()

    begin = time.monotonic()
    torch.manual_seed(SEED)
    loaded = load_images(arguments.data, arguments.weights)
    runtimes = [runtime_name(name, arguments.precision) for name in ("onnxruntime", "openvino")]
    networks = {}
    for name in arguments.networks:
        kept = arguments.runs / f"{name}_{arguments.precision}"
        found = kept / "figures.json"
        if not found.exists():
            subject = make(name, loaded, arguments.weights)
            storage.write_json(found, one(subject, runtimes, arguments.threads, kept))
        networks[name] = json.loads(found.read_text())
        print(name, networks[name], flush=True)
    name = "measured_cost" if arguments.precision == "fp32" else "measured_cost_int8"
    figures = {"threads": arguments.threads, "share": SHARE, "networks": networks}
    seconds = time.monotonic() - begin
    print(write_result(name, seed=SEED, seconds=seconds, figures=figures, script="measured_cost"))


def make(name: str, loaded: data.Data, weights: Path) -> Subject:
    """The dense network, and its scores."""
    if name == "resnet56":
        network: nn.Module = models.build("greenprune.models:resnet56", {})
        models.load_weights(network, weights)
        images = some_images(loaded, CALIBRATION, SEED)
    elif name == "vgg16":
        network, images = models.vgg16(), some_images(loaded, CALIBRATION, SEED)
        reestimate(network, images[:IMAGES])
    else:
        network, images = torchvision.models.mobilenet_v3_small(), torch.randn(IMAGES, 3, 224, 224)
        reestimate(network, images)
    network.eval()
    analysis = surgery.analyse_and_try(network, images[:2])
    scores = measure(network, analysis, images[:IMAGES]).scores
    return Subject(name, network, images, analysis, scores)


def one(subject: Subject, runtimes: list[str], threads: int, kept: Path) -> dict[str, Any]:
    """All arms of one network; what is greenprune's is kept."""
    fastest = raced({"dense": subject.network}, runtimes, subject.images, threads).order[0]
    layers = shapes_of(subject.network, subject.images[:2], subject.analysis)
    table_begin = time.monotonic()
    table = cost_tables.table_for(
        layers,
        target="x86",
        runtime=fastest,
        threads=threads,
        network=subject.name,
    )
    table_seconds = time.monotonic() - table_begin

    def milliseconds(networks: Mapping[str, nn.Module]) -> dict[str, float]:
        found = raced(networks, [fastest], subject.images, threads).racers[0].latency_ms
        return {name: each.value for name, each in found.items()}

    table = cost_tables.taught(
        table,
        subject.network,
        subject.analysis,
        layers,
        width_multiple=min(table.block_width, USUAL),
        keep_at_least=KEEP_AT_LEAST,
        measure=lambda networks: {name: (ms, None) for name, ms in milliseconds(networks).items()},
    )

    def price(network: nn.Module, analysis: Analysis) -> Mapping[str, optimise.Prices]:
        return Predictor(shapes_of(network, subject.images[:2], analysis), table).prices()

    def side_by_side(dense: nn.Module, pruned: nn.Module) -> dict[str, tuple[float, float]]:
        both = {"dense": dense, "pruned": pruned}
        found = milliseconds(both)
        return {"latency_ms": (found["dense"], found["pruned"])}

    settled: dict[str, within.Decision] = {}
    refused: dict[str, str] = {}
    for name, (share, blocks) in BUDGETS[subject.name].items():
        terms = within.Terms(
            limits=limits.parse_all([f"latency x{share}"]),
            width_multiple=min(table.block_width, USUAL),
            keep_at_least=KEEP_AT_LEAST,
            blocks=blocks,
        )
        try:
            settled[name] = within.decide(
                terms,
                subject.network,
                subject.network,
                subject.analysis,
                subject.scores,
                subject.images[:2],
                price,
                side_by_side,
            )
        except ProofError:
            raise
        except PruningError as error:  # out of reach, which is a result too
            refused[name] = str(error)
    cuts = by_macs(subject) | {
        name: found.apply(subject.network, subject.analysis, subject.images[:2])
        for name, found in settled.items()
    }
    if subject.name == "resnet56":
        gone = {name: found.choice.removed_blocks for name, found in settled.items()}
        keep(cuts, gone, subject, kept)
    arms = {
        "dense": subject.network,
        **{name: cut.network for name, cut in cuts.items()},
        "torch_pruning_8": torch_pruning(subject),
    }
    return {
        "priced": fastest,
        "table_seconds": table.seconds,
        "table_seconds_here": table_seconds,
        "block_width": table.block_width,
        "settled": {name: within.described(found) for name, found in settled.items()},
        "refused": refused,
        "arms": described(arms, subject.images),
        "runtimes": {
            racer.runtime: rows(racer)
            for racer in raced(arms, runtimes, subject.images, threads, PRESET).racers
        },
    }


def by_macs(subject: Subject) -> dict[str, removal.Cut]:
    """What papers do, and what MACs lead to."""
    removed = {
        name: budget.choose(
            subject.analysis,
            subject.scores,
            macs=SHARE,
            width_multiple=multiple,
            keep_at_least=KEEP_AT_LEAST,
        )
        for name, multiple in (("macs", 1), ("macs_8", 8))
    }
    if subject.name in RATES:
        rates = RATES[subject.name]()
        removed["papers"] = budget.by_rates(subject.analysis, subject.scores, rates)
    return {
        name: removal.cut(subject.network, subject.images[:2], subject.analysis.groups, gone)
        for name, gone in removed.items()
    }


def keep(
    cuts: Mapping[str, removal.Cut],
    blocks: Mapping[str, tuple[str, ...]],
    subject: Subject,
    folder: Path,
) -> None:
    """Save the networks, as cut, of which these blocks are gone."""
    shape = tuple(subject.images.shape[1:])
    for name, cut in cuts.items():
        described = record.NetworkRecord.of("greenprune.models:resnet56", {}, shape)
        if blocks.get(name):
            described = described.without_blocks(*blocks[name])
        described = described.pruned(cut.analysis, cut.removed)
        record.save_network(folder / name, cut.network, described)


def torch_pruning(subject: Subject) -> nn.Module:
    """Global magnitude pruning in small steps until the MACs are halved; never of the classifier.

    Of a network with padded shortcuts, which it does not follow (the sums no longer fit), the first
    layer of each block alone is pruned.
    """
    import torch_pruning as tp

    network = copy.deepcopy(subject.network)
    example = subject.images[:1]
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    whole: list[nn.Module] = linear[-1:]
    if any(isinstance(module, PaddedShortcut) for module in network.modules()):
        inside = {block.conv1 for block in network.modules() if isinstance(block, BasicBlock)}
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        whole += [layer for layer in convolutions if layer not in inside]
    pruner = tp.pruner.MagnitudePruner(
        network,
        example,
        importance=tp.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1 - KEEP_AT_LEAST,
        max_pruning_ratio=1 - KEEP_AT_LEAST,
        iterative_steps=100,
        round_to=8,
        ignored_layers=whole,
    )
    aim = SHARE * count(network, example).macs
    for _ in range(100):
        if count(network, example).macs <= aim:
            break
        pruner.step()
    return network.eval()


def raced(
    networks: Mapping[str, nn.Module],
    runtimes: list[str],
    images: Tensor,
    threads: int,
    preset: race.Preset = race.PRESET,
) -> race.Race:
    calibration = images[:CALIBRATION].numpy()
    return race_networks(
        "x86",
        networks,
        runtimes,
        images[:16],
        calibration=calibration,
        threads=threads,
        preset=preset,
    )


def described(arms: Mapping[str, nn.Module], images: Tensor) -> dict[str, Any]:
    found = {name: count(network, images[:1]) for name, network in arms.items()}
    return {
        name: {
            "macs": cost.macs,
            "macs_share": cost.macs / found["dense"].macs,
            "params": cost.params,
            "widths": {
                layer: module.out_channels
                for layer, module in arms[name].named_modules()
                if isinstance(module, nn.Conv2d)
            },
        }
        for name, cost in found.items()
    }


def rows(racer: race.Racer) -> dict[str, Any]:
    """Milliseconds of each arm, as shares of the dense network's, and how many times as fast the
    arms (d) are; ratios paired by block."""
    dense = racer.blocks_ms["dense"]
    ours = [name for name in racer.blocks_ms if name.startswith("latency")]
    return {
        name: {
            "latency_ms": schema.encode(racer.latency_ms[name]),
            "of_dense": schema.encode(paired_ratio(blocks, dense)),
            "over": {
                own: schema.encode(paired_ratio(blocks, racer.blocks_ms[own])) for own in ours
            },
        }
        for name, blocks in racer.blocks_ms.items()
    }


if __name__ == "__main__":
    main()
