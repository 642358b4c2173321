"""The process that measures chains; :mod:`greenprune.harness.cost_probe` starts it.

They talk as :mod:`greenprune.harness.serving` says. Commands are ``open``, which comes first and
once, and ``window`` for each chain.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import MeasurementError
from greenprune.harness.serving import Handle, serve
from greenprune.meters import open_meter
from greenprune.registry import Runner, load_target

WARM_UP_SECONDS, WARM_UP_INFERENCES = 0.02, 3
WINDOW_SECONDS, WINDOW_INFERENCES = 0.08, 20
COUNTER_UPDATES = 100
"""Of the meter in a window, at least."""
QUANTILE = 0.25
"""Of a window's latencies: what else runs only adds to them. Beside a training on both cores, the
slopes of chains of 3x3 convolutions on ONNX Runtime differed from round to round by 0 to 2% by the
25th percentile, by 1 to 6% by the median; the smallest values say no more than it does."""


def window_seconds(period_seconds: float) -> float:
    """How long a window is at least, by the period of the meter's updates; 0 without a meter."""
    return max(WINDOW_SECONDS, COUNTER_UPDATES * period_seconds)


class CostWorker:
    """Opens a folder's chains in turn; two open at once would slow each other."""

    def __init__(
        self,
        *,
        folder: str,
        target: str,
        runtime: str,
        threads: int,
        meter: str,
        period_seconds: float,
    ) -> None:
        self.folder, self.target = Path(folder), load_target(target)
        self.runtime, self.threads = runtime, threads
        self.meter = open_meter(meter)
        self.seconds = window_seconds(period_seconds)

    def window(self, *, artifact: str, input_shape: list[int]) -> dict[str, Any]:
        """Microseconds and microjoules of one inference; None where no joules can be told."""
        runner = self.target.open(self.folder / artifact, self.runtime, self.threads)
        try:
            return self._measure(runner, input_shape)
        finally:
            runner.close()

    def _measure(self, runner: Runner, input_shape: list[int]) -> dict[str, Any]:
        inputs = np.random.default_rng(0).standard_normal(input_shape, dtype=np.float32)
        _time(runner, inputs, WARM_UP_SECONDS, WARM_UP_INFERENCES)
        latencies, energy = None, None
        gc.collect()
        gc.disable()
        try:
            with self.meter.measure() as measured:
                latencies = _time(runner, inputs, self.seconds, WINDOW_INFERENCES)
            energy = measured.energy
        except MeasurementError:
            if latencies is None:
                raise
        finally:
            gc.enable()
        if "torch" in sys.modules:
            raise MeasurementError("torch was loaded on the device side; this is a defect")
        return {
            "latency_us": float(np.quantile(latencies, QUANTILE)) / 1e3,
            "energy_uj": None if energy is None else 1e6 * energy.value / len(latencies),
        }


def _time(
    runner: Runner, inputs: NDArray[np.float32], seconds: float, inferences: int
) -> NDArray[np.int64]:
    """Latency of each inference, int64 [N] nanoseconds, for so long and so often at least."""
    clock, run = time.perf_counter_ns, runner.run
    latencies: list[int] = []
    end = clock() + int(seconds * 1e9)
    now = 0
    while now < end or len(latencies) < inferences:
        before = clock()
        run(inputs)
        now = clock()
        latencies.append(now - before)
    return np.asarray(latencies, dtype=np.int64)


def handler() -> Handle:
    """Answers to a client's commands, of which ``open`` comes first."""
    worker: CostWorker | None = None

    def handle(command: str, request: dict[str, Any]) -> dict[str, Any]:
        nonlocal worker
        if command == "open":
            worker = CostWorker(**request)
            return {}
        if command == "window" and worker is not None:
            return worker.window(**request)
        raise MeasurementError(f"expected 'open' and then 'window', got '{command}'")

    return handle


def main() -> None:
    """Serve on stdin and stdout."""
    serve(handler())
