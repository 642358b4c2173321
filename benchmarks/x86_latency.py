"""Milliseconds on this x86 processor: dense and pruned, fp32 and int8, both runtimes, batch 1.

    python benchmarks/x86_latency.py --data=DIR --weights=resnet56.th [--threads 2] [--depth]

ResNet-56 with the given weights, and VGG-16 (CIFAR form), MobileNetV3-small and ResNet-18 (both at
224x224) with random ones, as latency does not depend on them: each dense, and pruned by DRP to at
most half of its MACs, widths on multiples of 16 or, where half cannot be reached with these, of 8.
Every candidate has a process of its own; candidates take turns in blocks, in an order drawn anew
for each. *Real speed-up* is dense over pruned, paired by block; divided by the MACs' reduction it
says how much of that arrives.

With --depth ResNet-56 alone, where whole residual blocks go too and widths are on multiples of 16.

For ResNet-56 the int8 accuracy on the 10,000 test images is told, before and after.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from cifar import load_images, some_images
from common import write_result
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune import api, data, models, schema
from greenprune.harness import race
from greenprune.harness.statistics import paired_ratio
from greenprune.onnx_export import export_onnx
from greenprune.pruning import limits, optimise, removal, surgery
from greenprune.pruning.batchnorm import reestimate
from greenprune.pruning.cost import count
from greenprune.pruning.scores import measure
from greenprune.registry import Build, Runner, load_target, runtime_name

SEED = 0
IMAGES = 64
CALIBRATION = 200
MULTIPLES = {"resnet56": 8, "vgg16": 16, "mobilenet_v3_small": 8, "resnet18": 16}
"""Kernels have blocks of 16 with AVX-512 and of 8 with AVX2. In blocks of 16 ResNet-56 keeps 57% of
its MACs at least."""
RUNTIMES = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "int8")
PRESET = replace(
    race.PRESET, windows=45, window_seconds=0.3, warmup_seconds=1.0, warmup_cap_seconds=10.0
)
"""Short windows: what are compared stand near each other in time, on a machine whose speed changes
by the second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", action="store_true")
    arguments = parser.parse_args()

    begin = time.monotonic()
    torch.manual_seed(SEED)
    loaded = load_images(arguments.data, arguments.weights)
    networks: dict[str, Any] = {}
    for name in ("resnet56",) if arguments.depth else MULTIPLES:
        dense, images = make(name, loaded, arguments.weights)
        with tempfile.TemporaryDirectory() as scratch:
            half = in_depth(dense, images) if arguments.depth else in_width(name, dense, images)
            networks[name] = {
                "width_multiple": 16 if arguments.depth else MULTIPLES[name],
                **one(dense, half, images, Path(scratch), arguments.threads),
            }
            if name == "resnet56":
                networks[name]["test_accuracy"] = accuracies(Path(scratch), loaded)
        print(name, networks[name], flush=True)
    figures = {"threads": arguments.threads, "networks": networks}
    seconds = time.monotonic() - begin
    name = "x86_latency_depth" if arguments.depth else "x86_latency"
    print(write_result(name, seed=SEED, seconds=seconds, figures=figures, script="x86_latency"))


def make(name: str, loaded: data.Data, weights: Path) -> tuple[nn.Module, Tensor]:
    """The dense network and images to score, calibrate and measure with."""
    if name == "resnet56":
        network = models.build("greenprune.models:resnet56", {})
        models.load_weights(network, weights)
        return network.eval(), some_images(loaded, CALIBRATION, SEED)
    if name == "vgg16":
        network, images = models.vgg16(), some_images(loaded, CALIBRATION, SEED)
    else:
        network = getattr(torchvision.models, name)(weights=None)
        images = torch.randn(IMAGES, 3, 224, 224)
    reestimate(network, images[:IMAGES])
    return network.eval(), images


def in_width(name: str, dense: nn.Module, images: Tensor) -> nn.Module:
    """Half of the MACs, by width alone."""
    return api.prune_network(dense, images[:IMAGES], macs=0.5, width_multiple=MULTIPLES[name])


def in_depth(dense: nn.Module, images: Tensor) -> nn.Module:
    """Half of the MACs, by whole blocks and by width."""
    analysis = surgery.analyse_and_try(dense, images[:2])
    choice = optimise.choose(
        analysis,
        measure(dense, analysis, images[:IMAGES]).scores,
        limits.parse_all(["macs x0.5"]),
        width_multiple=16,
        blocks=surgery.removable_blocks(dense, images[:2]),
    )
    return removal.cut(
        dense, images[:2], analysis.groups, choice.removed, choice.removed_blocks
    ).network


def one(
    dense: nn.Module, half: nn.Module, images: Tensor, folder: Path, threads: int
) -> dict[str, Any]:
    """Build, race and judge one network."""
    costs = {"dense": count(dense, images[:1]).macs, "half": count(half, images[:1]).macs}
    target = load_target("x86")
    artifacts: dict[str, dict[str, Path]] = {}
    for variant, network in (("dense", dense), ("half", half)):
        graph = folder / f"{variant}.onnx"
        export_onnx(network, images[:4], graph, ["logits"])
        for precision in PRECISIONS:
            for runtime in RUNTIMES:
                build = Build(runtime=runtime, precision=precision, calibration=images.numpy())
                key = runtime_name(runtime, precision)
                made = target.compile(graph, build, folder / key, variant)
                artifacts.setdefault(key, {})[variant] = made
    np.save(folder / "inputs.npy", images[:IMAGES].numpy())
    found = race.race("x86", artifacts, folder / "inputs.npy", threads=threads, preset=PRESET)
    reduction = costs["dense"] / costs["half"]
    return {
        "macs": costs,
        "mac_reduction": reduction,
        "runtimes": {racer.runtime: rows(racer, reduction) for racer in found.racers},
        "chosen": fastest(found),
        "int8_layers": {
            key: integer_share(target.layer_precisions(artifacts[key]["half"], key))
            for key in artifacts
            if key.endswith("int8")
        },
    }


def rows(racer: race.Racer, reduction: float) -> dict[str, Any]:
    speedup = paired_ratio(racer.blocks_ms["dense"], racer.blocks_ms["half"])
    return {
        "latency_ms": schema.encode(racer.latency_ms),
        "speedup": schema.encode(speedup),
        "speedup_over_mac_reduction": speedup.value / reduction,
    }


def fastest(found: race.Race) -> str:
    """The runtime on which the pruned network is fastest."""
    return min(found.racers, key=lambda racer: racer.latency_ms["half"].value).runtime


def integer_share(layers: dict[str, str]) -> str:
    return f"{sum(each == 'int8' for each in layers.values())} of {len(layers)}"


def accuracies(folder: Path, loaded: data.Data) -> dict[str, float]:
    """Of the dense ResNet-56 by each artifact, on all test images."""
    target, found = load_target("x86"), {}
    for precision in PRECISIONS:
        for runtime in RUNTIMES:
            key = runtime_name(runtime, precision)
            suffix = "onnx" if runtime == "onnxruntime" else "xml"
            runner = target.open(folder / key / f"dense.{suffix}", key, 0)
            found[key] = accuracy(runner, loaded)
            runner.close()
    return found


def accuracy(runner: Runner, loaded: data.Data) -> float:
    right: list[NDArray[np.bool_]] = []
    for split in (loaded.selector, loaded.certification, loaded.test):
        for start in range(0, len(split), 100):
            part = slice(start, start + 100)
            inputs = data.normalise(split.inputs[part], loaded.preprocessing).numpy()
            answers = runner.run(inputs)["logits"].argmax(axis=1)
            right.append(answers == split.targets[part].numpy())
    return float(np.concatenate(right).mean())


if __name__ == "__main__":
    main()
