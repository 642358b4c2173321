"""Our median latency against others' on the same files: does the harness measure what they do?

    python benchmarks/against_benchmark_app.py --weights=resnet56.th [--rounds 15]

ResNet-56 in fp32, batch 1, a thread a core for all; everything in a process of its own:

- ONNX Runtime: a window of our harness, and a bare loop around `InferenceSession.run` with the same
  settings;
- OpenVINO: the request of our runner, and `benchmark_app -hint latency -api sync` on the same .xml.
  Both tell the latency of the inference request, which is all that benchmark_app tells: the call
  from Python comes on top. A window of our harness, which has it, is set beside them.

The two of a pair take turns every 0.2 s, one stopped by SIGSTOP while the other works: on a virtual
machine whose speed changes by the second both then meet the same. The ratio is ours over theirs,
paired by round, with a 95% interval by order statistics; of the first two pairs it must contain 1
and reach 3% at most.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
SECONDS = 10
"""Of which each works for half."""
TURN_SECONDS = 0.2
PAIRS = (
    ("openvino, request", "benchmark_app"),
    ("onnxruntime, window", "bare loop"),
    ("openvino, window", "benchmark_app"),
)
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
print("ready", flush=True)
sys.stdin.readline()
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
print("ready", flush=True)
sys.stdin.readline()
print(np.median(loop(seconds)))
"""


@dataclass(frozen=True)
class Contender:
    """A process that is ready to measure, and stopped; ``finish`` waits for its median, in ms."""

    process: psutil.Process
    finish: Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        artifacts, inputs = prepare(arguments.weights, Path(scratch))
        threads = usable_cores()
        windows = workers(stack, artifacts, inputs, threads)
        ways: dict[str, Callable[[], Contender]] = {
            "openvino, window": windows["openvino"],
            "openvino, request": lambda: scripted(REQUEST, artifacts["openvino"], inputs, threads),
            "onnxruntime, window": windows["onnxruntime"],
            "benchmark_app": lambda: benchmark_app(artifacts["openvino"]),
            "bare loop": lambda: scripted(BARE, artifacts["onnxruntime"], inputs, threads),
        }
        found: dict[str, list[list[float]]] = {" / ".join(pair): [] for pair in PAIRS}
        for number in range(arguments.rounds):
            for pair in PAIRS:
                medians = in_turns(*(ways[name]() for name in pair))
                found[" / ".join(pair)].append(medians)
            print(number, {names: each[-1] for names, each in found.items()}, flush=True)
    ratios = {
        names: schema.encode(paired_ratio([mine for mine, _ in each], [other for _, other in each]))
        for names, each in found.items()
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


def in_turns(first: Contender, second: Contender) -> list[float]:
    """Both medians; the processes take turns until one has finished."""
    with ThreadPoolExecutor(2) as pool:
        told = [pool.submit(each.finish) for each in (first, second)]
        try:
            for each in itertools.cycle((first, second)):
                each.process.resume()
                time.sleep(TURN_SECONDS)
                if any(median.done() for median in told):
                    break
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    each.process.suspend()
        finally:
            for each in (first, second):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.process.resume()
        return [median.result() for median in told]


def workers(
    stack: ExitStack, artifacts: dict[str, Path], inputs: Path, threads: int
) -> dict[str, Callable[[], Contender]]:
    """Of our harness; each is asked for a window when its turn comes."""
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

    def ready(client: Client) -> Contender:
        process = psutil.Process(client.pid)
        process.suspend()
        client.send("window")
        return Contender(process, lambda: float(client.receive(600.0)["latency"]["p50_ns"]) / 1e6)

    return {runtime: partial(ready, client) for (_, runtime), client in clients.items()}


def benchmark_app(model: Path) -> Contender:
    command = shutil.which("benchmark_app", path=sysconfig.get_path("scripts"))
    if command is None:
        sys.exit("benchmark_app is not beside this Python; pip install openvino")
    line: list[Any] = [command, "-m", model, "-d", "CPU", "-hint", "latency", "-api", "sync"]
    line += ["-t", SECONDS, "-infer_precision", "f32"]  # its threads cannot be set with a hint
    line += ["-shape", "[1,3,32,32]"]
    return started(line, "Measuring performance", r"Median:\s+([\d.]+) ms")


def scripted(script: str, artifact: Path, inputs: Path, threads: int) -> Contender:
    line = [sys.executable, "-c", script, artifact, inputs, threads, SECONDS]
    return started(line, "ready", r"^([\d.]+)$")


def started(line: list[Any], ready: str, median: str) -> Contender:
    """A command that says when it begins to measure, and its median in milliseconds in the end."""
    process = subprocess.Popen(
        [str(part) for part in line],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for said in process.stdout:
        if ready in said:
            break
    else:
        sys.exit(f"{line[0]} ended with status {process.wait()} before it said '{ready}'")
    stopped = psutil.Process(process.pid)
    stopped.suspend()
    process.stdin.write("go\n")
    process.stdin.flush()

    def finish() -> float:
        output, _ = process.communicate()
        told = re.search(median, output, re.MULTILINE)
        if told is None:
            sys.exit(f"{line[0]} told no median: {output[-500:]}")
        return float(told[1])

    return Contender(stopped, finish)


if __name__ == "__main__":
    main()
