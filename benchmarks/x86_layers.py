"""Which layers let less of the MACs' reduction arrive on this x86 processor: OpenVINO's own clock.

    python benchmarks/x86_layers.py --data=DIR --weights=resnet56.th [--threads 2]

ResNet-56 and VGG-16, dense and pruned to half of the MACs by width as in ``x86_latency.py``, fp32
and int8, batch 1. OpenVINO tells each layer's time (``PERF_COUNT``) in every inference; layers are
added up by the size of what they write, the rest stands by itself. Dense and pruned take turns
in blocks of 200 calls, of which the first tenth warms caches; figures are medians over the rest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from cifar import load_images
from common import write_result
from numpy.typing import NDArray
from torch import Tensor, nn
from x86_latency import in_width, make

from greenprune.onnx_export import export_onnx
from greenprune.registry import Build, load_target, runtime_name

SEED = 0
NETWORKS = ("resnet56", "vgg16")
PRECISIONS = ("fp32", "int8")
BLOCKS, CALLS = 10, 200
REST = "all else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    begin = time.monotonic()
    torch.manual_seed(SEED)
    loaded = load_images(arguments.data, arguments.weights)
    found: dict[str, Any] = {}
    for name in NETWORKS:
        dense, images = make(name, loaded, arguments.weights)
        networks = {"dense": dense, "half": in_width(name, dense, images)}
        told = {variant: layers(network, images[:1]) for variant, network in networks.items()}
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as scratch:
                artifacts = compiled(networks, images, precision, Path(scratch))
                times = profiled(artifacts, images[:1].numpy(), arguments.threads)
            found[f"{name}, {precision}"] = {
                size: {variant: row(told[variant], times[variant], size) for variant in networks}
                for size in [*dict.fromkeys(size for size, _, _ in told["dense"]), REST]
            }
            print(name, precision, found[f"{name}, {precision}"], flush=True)
    figures = {"threads": arguments.threads, "calls": BLOCKS * CALLS, "networks": found}
    seconds = time.monotonic() - begin
    print(write_result("x86_layers", seed=SEED, seconds=seconds, figures=figures))


Layer = tuple[str, int, int]
"""Size of what it writes, MACs, weights."""


def layers(network: nn.Module, image: Tensor) -> list[Layer]:
    """Convolutions and linear layers in the order of execution."""
    found: list[Layer] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        positions = int(np.prod(output.shape[2:]))
        size = "x".join(str(each) for each in output.shape[2:]) or "linear"
        weights = int(module.weight.numel())  # type: ignore[operator, union-attr]
        found.append((size, positions * weights, weights))

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return found


def compiled(
    networks: Mapping[str, nn.Module], images: Tensor, precision: str, folder: Path
) -> dict[str, Path]:
    """OpenVINO's artifacts."""
    build = Build(runtime="openvino", precision=precision, calibration=images.numpy())
    key = runtime_name("openvino", precision)
    made = {}
    for variant, network in networks.items():
        graph = folder / f"{variant}.onnx"
        export_onnx(network, images[:4], graph, ["logits"])
        made[variant] = load_target("x86").compile(graph, build, folder / key, variant)
    return made


def profiled(
    artifacts: Mapping[str, Path], image: NDArray[np.float32], threads: int
) -> dict[str, list[float]]:
    """Microseconds of each layer of :func:`layers`, then of all else together."""
    core = openvino.Core()
    requests = {}
    for variant, artifact in artifacts.items():
        model = core.read_model(artifact)
        model.reshape(list(image.shape))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERF_COUNT": True,
        }
        requests[variant] = core.compile_model(model, "CPU", settings).create_infer_request()
    calls: dict[str, list[list[float]]] = {variant: [] for variant in requests}
    for variant, request in [*requests.items()] * BLOCKS:
        for number in range(CALLS):
            request.infer(image, share_inputs=True)
            if number >= CALLS // 10:
                calls[variant].append(by_layer(request.profiling_info))
    return {variant: np.median(each, axis=0).tolist() for variant, each in calls.items()}


def by_layer(told: Any) -> list[float]:
    kinds = ("Convolution", "FullyConnected", "FullyConnectedQuantizedLegacy")
    ran = [(each.node_type, each.real_time.total_seconds() * 1e6) for each in told]
    own = [us for kind, us in ran if kind in kinds]
    return [*own, sum(us for kind, us in ran if kind not in kinds)]


def row(told: list[Layer], times: list[float], size: str) -> dict[str, float]:
    """What layers of one size have together."""
    if len(times) != len(told) + 1:
        raise SystemExit(f"{len(told)} layers, and OpenVINO told the times of {len(times) - 1}")
    if size == REST:
        return {"us": times[-1]}
    own = [at for at, layer in enumerate(told) if layer[0] == size]
    return {
        "us": float(sum(times[at] for at in own)),
        "layers": len(own),
        "macs": sum(told[at][1] for at in own),
        "weights": sum(told[at][2] for at in own),
    }


if __name__ == "__main__":
    main()
