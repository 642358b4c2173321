"""What our export costs beside the bare exporter: graph, compile and parity, ResNet-56.

    python benchmarks/export_cost.py [--rounds 15]

Bare: `torch.onnx.export`, then opening the graph, with ONNX Runtime (`InferenceSession`) or
OpenVINO (`read_model`, `compile_model`), and one answer. Ours: `export_onnx` (the same exporter,
the checker, the comparison with the network), the target's `compile` and `verify_artifact`, which
opens the artifact and compares its answers. All in one process, warm, with random weights; every
round does each way once, in an order drawn anew; the ratio is ours over bare, paired by round: its
median with a 95% interval by order statistics. OpenVINO's kept compilations are thrown away before
each. The goal: at most 1.3.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from common import write_result
from torch import Tensor, nn

from greenprune import models, onnx_export, schema
from greenprune.harness.statistics import order_interval, paired_ratio
from greenprune.registry import Build, load_target
from greenprune.runtime.runners import verify_artifact

SEED = 0
GOAL = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    begin = time.monotonic()
    torch.manual_seed(SEED)
    network = models.build("greenprune.models:resnet56", {}).eval()
    example = torch.randn(4, 3, 32, 32)
    ways: dict[str, Callable[[Path], None]] = {
        "bare onnxruntime": lambda folder: bare_onnxruntime(network, example, folder),
        "bare openvino": lambda folder: bare_openvino(network, example, folder),
        "our onnxruntime": lambda folder: ours(network, example, folder, "onnxruntime"),
        "our openvino": lambda folder: ours(network, example, folder, "openvino"),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    draw = random.Random(SEED)
    for number in range(arguments.rounds + 1):
        took = {name: timed(ways[name]) for name in draw.sample(list(ways), len(ways))}
        print(number, {name: round(seconds, 2) for name, seconds in took.items()}, flush=True)
        if number:  # the first imports and warms up
            for name, seconds in took.items():
                found[name].append(seconds)
    figures: dict[str, Any] = {
        "goal": GOAL,
        "seconds": {name: schema.encode(order_interval(took)) for name, took in found.items()},
        "ratios": {
            runtime: schema.encode(paired_ratio(found[f"our {runtime}"], found[f"bare {runtime}"]))
            for runtime in ("onnxruntime", "openvino")
        },
    }
    seconds = time.monotonic() - begin
    print(write_result("export_cost", seed=SEED, seconds=seconds, figures=figures))
    print(figures["ratios"])


def timed(way: Callable[[Path], None]) -> float:
    """Seconds of one way, in an empty folder and with an empty cache of compiled networks."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        start = time.perf_counter()
        way(Path(scratch))
        return time.perf_counter() - start


def bare_graph(network: nn.Module, example: Tensor, path: Path) -> None:
    with torch.no_grad(), onnx_export._quiet():  # what it prints costs no time worth comparing
        torch.onnx.export(
            network,
            (example[:2],),
            path,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=onnx_export.OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def bare_onnxruntime(network: nn.Module, example: Tensor, folder: Path) -> None:
    bare_graph(network, example, folder / "bare.onnx")
    session = onnxruntime.InferenceSession(folder / "bare.onnx", providers=["CPUExecutionProvider"])
    session.run(None, {"input": example.numpy()})


def bare_openvino(network: nn.Module, example: Tensor, folder: Path) -> None:
    bare_graph(network, example, folder / "bare.onnx")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(folder / "bare.onnx"), "CPU")
    compiled(np.ascontiguousarray(example.numpy()))


def ours(network: nn.Module, example: Tensor, folder: Path, runtime: str) -> None:
    graph, target = folder / "ours.onnx", load_target("x86")
    references = onnx_export.export_onnx(network, example, graph, ["logits"])
    made = target.compile(graph, Build(runtime=runtime), folder / runtime, "ours")
    verify_artifact(target, made, runtime, example.numpy(), references)


if __name__ == "__main__":
    main()
