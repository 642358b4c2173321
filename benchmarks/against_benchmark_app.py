"""Our median latency against others' on the same files: does the harness measure what they do?

    python benchmarks/against_benchmark_app.py --weights=resnet56.th [--rounds 40]

ResNet-56 in fp32, batch 1, a thread a core for all; everything in a process of its own:

- ONNX Runtime: a window of our harness, and a bare loop around `InferenceSession.run` with the same
  settings;
- OpenVINO: our runner, and `benchmark_app -hint latency -api sync` on the same .xml. Both tell the
  latency of the inference request, which is all that benchmark_app tells: the call from Python
  comes on top. A window of our harness, which has it, is set beside them.

In every round each runs once, pair by pair and in an order drawn anew; the ratio is ours over
theirs, paired by round, with a 95% interval by order statistics, which must contain 1 and reach 3%
at most.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result

from greenprune import models, schema
from greenprune.cores import usable_cores
from greenprune.harness import protocol
from greenprune.harness.client import Client
from greenprune.harness.presets import Preset
from greenprune.harness.statistics import paired_ratio
from greenprune.onnx_export import export_onnx
from greenprune.registry import Build, load_target

SEED = 0
SECONDS = 2
PRESET = Preset(
    name="against", windows=1, window_seconds=SECONDS, idle_seconds=0.0, rest_seconds=0.0
)
BARE = """
import sys, time
import numpy as np, onnxruntime
graph, inputs = sys.argv[1], np.load(sys.argv[2])
threads, seconds = int(sys.argv[3]), float(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.inter_op_num_threads = 1
options.add_session_config_entry("session.force_spinning_stop", "1")
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
images = [inputs[i : i + 1] for i in range(len(inputs))]
def loop(seconds):
    found, end, index = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        start = time.perf_counter_ns()
        session.run(None, {"input": images[index % len(images)]})
        found.append(time.perf_counter_ns() - start)
        index += 1
    return found
loop(1.0)
print(np.median(loop(seconds)) / 1e6)
"""
REQUEST = """
import sys, time
from pathlib import Path
import numpy as np
from greenprune.registry import load_target
artifact, inputs = Path(sys.argv[1]), np.load(sys.argv[2])
threads, seconds = int(sys.argv[3]), float(sys.argv[4])
runner = load_target("x86").open(artifact, "openvino", threads)
images = [inputs[i : i + 1] for i in range(len(inputs))]
def loop(seconds):
    found, end, index = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        runner.run(images[index % len(images)])
        ((request, _),) = runner._requests
        found.append(request.latency)
        index += 1
    return found
loop(1.0)
print(np.median(loop(seconds)))
"""
WINDOW, REQUESTS, APP = "openvino, window", "openvino, request", "benchmark_app"
BARE_WINDOW, BARE_LOOP = "onnxruntime, window", "bare loop"
PAIRS = ((REQUESTS, APP), (BARE_WINDOW, BARE_LOOP))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        artifacts, inputs = prepare(arguments.weights, Path(scratch))
        threads = usable_cores()
        windows = ours(stack, artifacts, inputs, threads)
        ways: dict[str, Callable[[], float]] = {
            WINDOW: windows["openvino"],
            REQUESTS: lambda: alone(REQUEST, artifacts["openvino"], inputs, threads),
            APP: lambda: benchmark_app(artifacts["openvino"]),
            BARE_WINDOW: windows["onnxruntime"],
            BARE_LOOP: lambda: alone(BARE, artifacts["onnxruntime"], inputs, threads),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        draw = random.Random(SEED)
        groups = [list(pair) for pair in (*PAIRS, (WINDOW,))]
        for number in range(arguments.rounds):
            for group in draw.sample(groups, len(groups)):
                for name in draw.sample(group, len(group)):
                    found[name].append(ways[name]())
            print(number, {name: round(values[-1], 4) for name, values in found.items()})
    ratios = {
        f"{mine} / {other}": schema.encode(paired_ratio(found[mine], found[other]))
        for mine, other in (*PAIRS, (WINDOW, APP))
    }
    figures = {"threads": threads, "medians_ms": found, "ratios": ratios}
    seconds = time.monotonic() - begin
    print(write_result("against_benchmark_app", seed=SEED, seconds=seconds, figures=figures))
    print(ratios)


def prepare(weights: Path, folder: Path) -> tuple[dict[str, Path], Path]:
    """The artifacts and an .npy file of inputs."""
    torch.manual_seed(SEED)
    network = models.build("greenprune.models:resnet56", {})
    models.load_weights(network, weights)
    images = torch.randn(32, 3, 32, 32)
    np.save(folder / "inputs.npy", images.numpy())
    export_onnx(network.eval(), images[:4], folder / "dense.onnx", ["logits"])
    target = load_target("x86")
    artifacts = {
        runtime: target.compile(
            folder / "dense.onnx", Build(runtime=runtime), folder / runtime, "dense"
        )
        for runtime in ("onnxruntime", "openvino")
    }
    return artifacts, folder / "inputs.npy"


def ours(
    stack: ExitStack, artifacts: dict[str, Path], inputs: Path, threads: int
) -> dict[str, Callable[[], float]]:
    clients = protocol.start_workers(stack, [("dense", runtime) for runtime in artifacts])
    for (_, runtime), client in clients.items():
        request = {
            "target": "x86",
            "artifact": str(artifacts[runtime]),
            "inputs": str(inputs),
            "runtime": runtime,
            "threads": threads,
            "meter": "none",
        }
        protocol.load_candidate(client, PRESET, request)

    def window(client: Client) -> Callable[[], float]:
        return lambda: float(client.ask("window", 600.0)["latency"]["p50_ns"]) / 1e6

    return {runtime: window(client) for (_, runtime), client in clients.items()}


def benchmark_app(model: Path) -> float:
    """Its median in milliseconds."""
    command = shutil.which("benchmark_app", path=sysconfig.get_path("scripts"))
    if command is None:
        sys.exit("benchmark_app is not beside this Python; pip install openvino")
    line: list[Any] = [command, "-m", model, "-d", "CPU", "-hint", "latency", "-api", "sync"]
    line += ["-t", SECONDS, "-infer_precision", "f32"]  # its threads cannot be set with a hint
    line += ["-shape", "[1,3,32,32]"]
    output = subprocess.check_output([str(part) for part in line], text=True)
    median = re.search(r"Median:\s+([\d.]+) ms", output)
    if median is None:
        sys.exit(f"benchmark_app told no median: {output[-500:]}")
    return float(median[1])


def alone(script: str, artifact: Path, inputs: Path, threads: int) -> float:
    """The median in milliseconds that a script tells, in a process of its own."""
    line = [sys.executable, "-c", script, str(artifact), str(inputs), str(threads), str(SECONDS)]
    return float(subprocess.check_output(line, text=True))


if __name__ == "__main__":
    main()
