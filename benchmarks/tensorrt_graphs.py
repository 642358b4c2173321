"""What TensorRT-RTX says of the graphs meant for TensorRT: parsed, built, and in which types.

    python benchmarks/tensorrt_graphs.py

ResNet-56, VGG-16 (CIFAR form), MobileNetV3-small and ResNet-18 (both at 224x224), dense, with
random weights, in fp32, fp16 and int8, as `greenprune-export --target jetson-orin-nano` writes
them: each must pass our rules and the parser and builder of TensorRT-RTX. ResNet-56's int8 graph
with one zero point moved must be refused. No GPU is needed and none was there: this says nothing
of a run on NVIDIA hardware.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torchvision
from common import write_result
from torch import Tensor, nn

from greenprune import models
from greenprune.errors import TargetError
from greenprune.onnx_export import export_onnx
from greenprune.pruning.batchnorm import reestimate
from greenprune.registry import Build, load_target
from greenprune_calibration import qdq_rules
from greenprune_targets import tensorrt_check
from greenprune_targets.base import version

SEED = 0
TARGET = "jetson-orin-nano"
IMAGES = 16
SIZES = {"resnet56": 32, "vgg16": 32, "mobilenet_v3_small": 224, "resnet18": 224}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    begin = time.monotonic()
    torch.manual_seed(SEED)
    networks: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in SIZES:
            place = Path(scratch) / name
            place.mkdir()
            graph, images = exported(name, place)
            networks[name] = {
                precision: parsed(graph, images, precision, place)
                for precision in load_target(TARGET).capabilities.precisions
            }
            print(name, networks[name], flush=True)
        asymmetric = refused(Path(scratch) / "resnet56")
    figures = {
        "tensorrt_rtx": version("tensorrt-rtx"),
        "target": TARGET,
        "networks": networks,
        "asymmetric": asymmetric,
    }
    seconds = time.monotonic() - begin
    print(write_result("tensorrt_graphs", seed=SEED, seconds=seconds, figures=figures))


def exported(name: str, place: Path) -> tuple[Path, Tensor]:
    """The network's graph, and images to calibrate with."""
    images = torch.randn(IMAGES, 3, SIZES[name], SIZES[name])
    if SIZES[name] == 32:
        network: nn.Module = models.build(f"greenprune.models:{name}", {})
    else:
        network = getattr(torchvision.models, name)(weights=None)
    reestimate(network, images)
    graph = place / "dense.onnx"
    export_onnx(network.eval(), images, graph, ["logits"])
    return graph, images


def parsed(graph: Path, images: Tensor, precision: str, place: Path) -> dict[str, int]:
    """How many convolutions give which type."""
    build = Build(runtime="tensorrt", precision=precision, calibration=images.numpy())
    made = load_target(TARGET).compile(graph, build, place / precision, "dense")
    return dict(Counter(tensorrt_check.parse(made, precision).values()))


def refused(place: Path) -> dict[str, str]:
    """What our rules and TensorRT-RTX say of ResNet-56's int8 graph with one zero point moved."""
    model = onnx.load(place / "int8" / "dense.onnx")
    rounded = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    zero = next(each for each in model.graph.initializer if each.name == rounded.input[2])
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(3, dtype=np.int8), zero.name))
    graph, told = place / "asymmetric.onnx", {}
    onnx.save(model, graph)
    for judge, check in (("rules", qdq_rules.check_tensorrt), ("parser", tensorrt_check.parse)):
        try:
            check(graph)
        except (ValueError, TargetError) as error:
            told[judge] = str(error).replace(f"{graph.parent}/", "")
        else:
            raise SystemExit(f"{judge}: an asymmetric graph was not refused")
    return told


if __name__ == "__main__":
    main()
