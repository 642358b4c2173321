"""What AdaptiveSession costs beside the networks that it runs, and whether it stays sound for long.

    python benchmarks/session.py BUNDLE [--runs 1000000]

The bundle's own networks and replay images. Every latency comes from a process of its own; these
take turns in short blocks, and ratios and differences are paired by block. Inputs of batch 1.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import write_result

from greenprune import schema
from greenprune.bundle import open_bundle
from greenprune.harness.statistics import order_interval, paired_ratio
from greenprune.progress import progress
from greenprune.registry import load_target
from greenprune.runtime import AdaptiveSession, Policy

SETTLE_SECONDS = 0.05
"""How long idle threads of ONNX Runtime and OpenVINO may still spin."""
Call = Callable[[Any], Any]
SEED = 0
CREATION = """
import json, sys, time
import onnxruntime
start = time.perf_counter()
import greenprune.runtime
imported = time.perf_counter() - start
from greenprune.runtime import AdaptiveSession, Policy
policy = Policy(threshold=0.5, allow_uncertified=True)
path, threads, *graphs = sys.argv[1:]
sessions, bare = [], []
for _ in range(4):
    start = time.perf_counter()
    session = AdaptiveSession(path, policy=policy, runtime="onnxruntime", threads=int(threads))
    sessions.append(time.perf_counter() - start)
    session.close()
    start = time.perf_counter()
    kept = []
    for graph in graphs:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        options.inter_op_num_threads = 1
        kept.append(onnxruntime.InferenceSession(graph, options))
    bare.append(time.perf_counter() - start)
    kept.clear()  # their threads would spin beside the next session
print(json.dumps([imported, sessions, bare]))
"""


def accepting(threshold: float) -> Policy:
    return Policy(threshold=threshold, allow_uncertified=True)


def bare_network(path: Path, runtime: str, threads: int, variant: str, setting: str) -> Call:
    """A network by its runtime alone; ``setting`` is that of ONNX Runtime's threads."""
    opened = open_bundle(path)
    artifact = opened.artifact(variant, runtime)
    if runtime != "onnxruntime":
        return load_target(opened.manifest.target).open(artifact, runtime, threads).run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if setting == "spinning stops":
        options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"input": image})


def serve(connection: Connection, path: Path, runtime: str, threads: int, what: list[str]) -> None:
    """In a process of its own: for each number of seconds received, the median latencies, in us, of
    one block, by whether the input is one that the pair escalates."""
    images = read_images(path)
    scores = read_scores(path, runtime)
    threshold = float(np.median(scores))
    if what[0] == "bare":
        call = bare_network(path, runtime, threads, *what[1:])
    else:
        accepted = threshold if what[0] == "half" else -1e30
        session = AdaptiveSession(
            path, policy=accepting(accepted), runtime=runtime, threads=threads
        )
        call = lambda image: session.run(None, {"input": image})  # noqa: E731
    generator = np.random.default_rng(SEED)
    connection.send("ready")
    while seconds := connection.recv():
        found: dict[bool, list[float]] = {True: [], False: []}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            index = int(generator.integers(len(images)))
            start = time.perf_counter()
            call(images[index])
            found[bool(scores[index] < threshold)].append(time.perf_counter() - start)
        connection.send([_median_us(found[hard]) for hard in (False, True)])


def _median_us(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e6 if seconds else math.nan


def read_images(path: Path) -> list[Any]:
    opened = open_bundle(path)
    images = opened.read_array(str(opened.manifest.samples.replay_inputs))[:256]
    return [np.ascontiguousarray(images[index : index + 1]) for index in range(len(images))]


def read_scores(path: Path, runtime: str) -> Any:
    session = AdaptiveSession(path, policy=accepting(-1e30), runtime=runtime, threads=1)
    with session:
        found = [session.run_with_info(None, {"input": one})[1] for one in read_images(path)]
    return np.concatenate([info.scores for info in found])


@contextmanager
def process(*arguments: Any) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
    child.start()
    ours.recv()
    yield ours
    ours.send(0)
    child.join()


def take_turns(
    options: argparse.Namespace, runtime: str, kinds: dict[str, list[str]]
) -> dict[str, list[list[float]]]:
    """Medians of every block of each kind, [accepted, escalated], in us; the processes take turns
    in short blocks, in both orders, and what one leaves spinning has ended before the next."""
    found: dict[str, list[list[float]]] = {name: [] for name in kinds}
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(process(options.bundle, runtime, options.threads, what))
            for name, what in kinds.items()
        }
        for child in children.values():  # warms up
            child.send(options.seconds)
            child.recv()
        label = f"{runtime}: {', '.join(kinds)}"
        with progress(label, total=options.blocks * len(kinds)) as advance:
            for block in range(options.blocks):
                for name in sorted(children, reverse=bool(block % 2)):
                    time.sleep(SETTLE_SECONDS)
                    children[name].send(options.seconds / 4)
                    found[name].append(children[name].recv())
                    advance(1)
    return found


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Every input accepted, beside a bare run of the same graph and settings; paired by block."""
    bare = ["bare", "aggressive", "spinning stops"]
    found = take_turns(options, "onnxruntime", {"bare": bare, "session": ["all"]})
    means = {name: [statistics.mean(block) for block in blocks] for name, blocks in found.items()}
    bare_us = statistics.median(means["bare"])
    pairs = zip(means["session"], means["bare"], strict=True)
    added = order_interval([session - alone for session, alone in pairs])
    allowed_us = 0.03 * bare_us + 20
    return {
        "session_us": statistics.median(means["session"]),
        "bare_us": bare_us,
        "added_us": schema.encode(added),
        "allowed_us": allowed_us,
        "within": added.value <= allowed_us,
    }


def in_turn(options: argparse.Namespace, runtime: str) -> dict[str, Any]:
    """Half of the inputs escalated, beside each network alone at its fastest setting: ratios paired
    by block."""
    settings = ["default", "spinning stops"] if runtime == "onnxruntime" else ["default"]
    kinds = {
        f"{variant}, {setting}": ["bare", variant, setting]
        for variant in ("aggressive", "mild")
        for setting in settings
    }
    found = take_turns(options, runtime, {**kinds, "session": ["half"]})
    means = {name: [statistics.mean(block) for block in found[name]] for name in kinds}
    fastest = {
        variant: min(
            (means[f"{variant}, {setting}"] for setting in settings), key=statistics.median
        )
        for variant in ("aggressive", "mild")
    }
    both = zip(*fastest.values(), strict=True)
    return {
        "medians_us": {
            name: [round(statistics.median(block[hard] for block in blocks), 1) for hard in (0, 1)]
            for name, blocks in found.items()
        },
        "accepted_over_alone": schema.encode(
            paired_ratio([accepted for accepted, _ in found["session"]], fastest["aggressive"])
        ),
        "escalated_over_sum": schema.encode(
            paired_ratio(
                [escalated for _, escalated in found["session"]], [sum(pair) for pair in both]
            )
        ),
        "allowed": 1.2,
    }


def creation(options: argparse.Namespace) -> dict[str, Any]:
    """Import and opening, in fresh processes: the first of each and the later ones."""
    opened = open_bundle(options.bundle)
    graphs = [str(opened.artifact(name, "onnxruntime")) for name in ("aggressive", "mild")]
    imports, first, later, bare_first, bare_later = [], [], [], [], []
    for _ in range(options.rounds):
        line = [sys.executable, "-c", CREATION, options.bundle, str(options.threads), *graphs]
        imported, sessions, bare = json.loads(subprocess.check_output(line, text=True))
        imports.append(imported)
        first.append(sessions[0])
        bare_first.append(bare[0])
        later.append(statistics.median(sessions[1:]))
        bare_later.append(statistics.median(bare[1:]))
    ms = {
        "import_beyond_onnxruntime_ms": imports,
        "first_session_ms": first,
        "first_two_bare_ms": bare_first,
        "later_session_ms": later,
        "later_two_bare_ms": bare_later,
    }
    found = {name: statistics.median(values) * 1e3 for name, values in ms.items()}
    ratio = found["later_session_ms"] / found["later_two_bare_ms"]
    return {**found, "later_ratio": ratio, "allowed_ratio": 1.2, "allowed_import_ms": 50}


def endurance(options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory over many runs, half of them escalated."""
    images, this = read_images(options.bundle), psutil.Process()
    policy = accepting(float(np.median(read_scores(options.bundle, "onnxruntime"))))
    parts, sizes = 20, []
    with AdaptiveSession(options.bundle, policy=policy, threads=options.threads) as session:
        for part in range(parts):  # a progress bar would grow too
            for run in range(options.runs // parts):
                session.run(None, {"input": images[(part + run) % len(images)]})
            sizes.append(this.memory_info().rss)
        told = session.statistics
    return {
        "runs": told.calls,
        "routes": told.routes,
        "resident_mb": [round(size / 1e6, 2) for size in sizes],
        "growth": sizes[-1] / sizes[0] - 1,  # the first twentieth warms up
        "allowed": 0.01,
    }


def threads(options: argparse.Namespace) -> dict[str, Any]:
    """Eight threads on one session against one, a tenth of the runs."""
    images, each = read_images(options.bundle), max(options.runs // 10 // 8, 1)
    policy = accepting(float(np.median(read_scores(options.bundle, "onnxruntime"))))
    with AdaptiveSession(options.bundle, policy=policy, threads=1) as session:
        alone = [session.run(None, {"input": image})[0] for image in images]

        def work(start: int) -> int:
            indices = ((start + 7 * step) % len(images) for step in range(each))
            return sum(
                not np.array_equal(session.run(None, {"input": images[index]})[0], alone[index])
                for index in indices
            )

        with ThreadPoolExecutor(8) as pool:
            different = sum(pool.map(work, range(8)))
        return {"runs": 8 * each, "different": different, "faults": session.statistics.faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=1_000_000, help="for the memory")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of warming up; a block is a quarter"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of opening")
    parser.add_argument("--blocks", type=int, default=60, help="of each process")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    options = parser.parse_args()
    start = time.monotonic()
    runtimes = open_bundle(options.bundle).manifest.variants["mild"].artifacts
    figures: dict[str, Any] = {"bundle": open_bundle(options.bundle).manifest.name}
    figures["accepted_call"] = overhead(options)
    figures["in_turn"] = {runtime: in_turn(options, runtime) for runtime in runtimes}
    figures["creation"] = creation(options)
    figures["memory"] = endurance(options)
    figures["threads"] = threads(options)
    print(json.dumps(figures, indent=1))
    name = f"session_{figures['bundle'].replace('-', '_')}"
    seconds = time.monotonic() - start
    print(write_result(name, seed=SEED, seconds=seconds, figures=figures, script="session"))


if __name__ == "__main__":
    main()
