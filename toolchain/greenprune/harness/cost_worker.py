"""The process that measures chains; :mod:`greenprune.harness.cost_probe` starts it.

Requests and answers are lines of JSON, as those of :mod:`greenprune.harness.worker`: ``open``,
which comes first and once, and ``window`` for each chain.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import GreenpruneError, MeasurementError
from greenprune.harness.client import Client
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


START = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from greenprune.harness.cost_worker import main; main()"
)
"""Without the current folder, as :data:`greenprune.harness.client.START`."""


def window_seconds(period_seconds: float) -> float:
    """How long a window is at least, by the period of the meter's updates; 0 without a meter."""
    return max(WINDOW_SECONDS, COUNTER_UPDATES * period_seconds)


class CostClient(Client):
    """The parent's side: a client whose process is this module's."""

    def __init__(self, name: str) -> None:
        super().__init__(name, START)


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


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until they end."""
    worker: CostWorker | None = None
    for line in requests:
        request = json.loads(line)
        command = request.pop("command")
        try:
            if command == "open":
                worker = CostWorker(**request)
                answer: dict[str, Any] = {}
            elif command == "window" and worker is not None:
                answer = worker.window(**request)
            else:
                raise MeasurementError(f"expected 'open' and then 'window', got '{command}'")
            reply: dict[str, Any] = {"answer": answer}
        except GreenpruneError as error:
            reply = {"error": str(error), "kind": type(error).__name__}
        answers.write(json.dumps(reply, allow_nan=False) + "\n")
        answers.flush()


def main() -> None:
    """Serve on the real stdin and stdout, kept apart from what libraries print."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing stdin
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)
