"""What reading a meter in the background costs the loop that it measures.

    python benchmarks/meter_overhead.py [--blocks 40] [--seconds 2]

Nothing is read for an inference; inside a window only the background thread works: RAPL's counters
once a second, a board's power rails every 10 ms. Blocks of the harness's timing loop with that
thread and without take turns, in an order drawn for each pair, over a tree of files in a temporary
folder (reading a real sensor takes longer, but waits for its bus outside of Python's lock). Two
loops: matrix products, which like a runtime's inference leave Python's lock free, and pure Python,
which holds it. The figure is the paired ratio of the blocks' medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result

from greenprune.harness.statistics import paired_ratio
from greenprune.meters.clock import Clock
from greenprune.meters.device import MeterDevice
from greenprune.meters.ina import open_ina
from greenprune.meters.rapl import open_rapl
from greenprune.progress import progress

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "fakes"))

import meter_trees

SEED = 0
LIMIT = 0.005
METERS: dict[str, Callable[[Path], MeterDevice]] = {
    "rapl": lambda root: open_rapl(root, Clock()),
    "ina": lambda root: open_ina(root, Clock())[0],
}


def trees(root: Path) -> None:
    """A machine of two sockets, and the board with the most rails to read."""
    zones = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1"}
    meter_trees.write_rapl(root, {**zones, "intel-rapl:0:0": "dram", "intel-rapl:1:0": "dram"})
    meter_trees.write_board(root, "agx-xavier")


def matrix_products() -> Callable[[], object]:
    """About a millisecond outside of Python's lock."""
    left = np.random.default_rng(SEED).standard_normal((256, 256)).astype(np.float32)
    out = np.empty_like(left)
    return lambda: [np.matmul(left, left, out=out) for _ in range(2)]


def pure_python() -> Callable[[], object]:
    """About a millisecond inside it."""
    return lambda: sum(range(40_000))


LOOPS = {"matrix products": matrix_products, "pure Python": pure_python}


def block(work: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median and mean of a block's latencies, in nanoseconds."""
    clock = time.perf_counter_ns
    latencies: list[int] = []
    end = clock() + int(seconds * 1e9)
    now = 0
    while now < end:
        before = clock()
        work()
        now = clock()
        latencies.append(now - before)
    return statistics.median(latencies), statistics.fmean(latencies)


def measure(
    loop: str, meter: str, root: Path, options: argparse.Namespace, advance: Callable[[], None]
) -> dict[str, Any]:
    """The ratio of blocks in which a meter is read to blocks without."""
    work, draw = LOOPS[loop](), random.Random(SEED)
    block(work, options.seconds)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(options.blocks):
        for metered in draw.sample([True, False], 2):
            with ExitStack() as stack:
                if metered:
                    stack.enter_context(METERS[meter](root).polled())
                found[metered].append(block(work, options.seconds))
            advance()
    figures: dict[str, Any] = {"median_ns": statistics.median(one for one, _ in found[False])}
    for index, name in enumerate(("median", "mean")):
        ratio = paired_ratio(
            [one[index] for one in found[True]], [one[index] for one in found[False]]
        )
        figures[f"{name}_ratio"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    start = time.monotonic()
    figures: dict[str, Any] = {}
    pairs = [(loop, meter) for loop in LOOPS for meter in METERS]
    with (
        tempfile.TemporaryDirectory() as folder,
        progress("blocks", 2 * options.blocks * len(pairs)) as advance,
    ):
        trees(Path(folder))
        for loop, meter in pairs:
            figures[f"{loop}, {meter}"] = measure(loop, meter, Path(folder), options, advance)
    for name, found in figures.items():
        ratio = found["median_ratio"]
        print(f"{name}: median x {ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]")
    seconds = time.monotonic() - start
    print(write_result("meter_overhead", seed=SEED, seconds=seconds, figures=figures))
    over = [name for name, found in figures.items() if found["median_ratio"]["value"] > 1 + LIMIT]
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
