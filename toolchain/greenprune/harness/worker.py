"""One candidate in a process of its own, which :mod:`greenprune.harness.client` starts.

They talk as :mod:`greenprune.harness.serving` says. Commands are ``open``, which comes first and
once, ``load``, ``idle`` and ``window``.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune import bundle as bundles
from greenprune import schema
from greenprune.errors import MeasurementError
from greenprune.harness.conditions import conditions_since, read_conditions
from greenprune.harness.presets import Preset
from greenprune.harness.serving import Handle, serve
from greenprune.harness.statistics import summarise
from greenprune.meters import Meter, open_meter
from greenprune.registry import Runner, load_target
from greenprune.runtime.runners import check_bundled

Array = NDArray[np.float32]
STEADY_WITHIN = 0.05


class Worker:
    """A loaded candidate: batches of one image, replayed in a circle that windows continue."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.preset = schema.decode(request["preset"], Preset, "preset", MeasurementError)
        self.meter: Meter = open_meter(request["meter"], tdp_watts=request.get("tdp_watts"))
        # the parent measured the period once, so that all windows are of one length
        updates = self.preset.counter_updates * (request.get("period_seconds") or 0.0)
        self.window_seconds = max(self.preset.window_seconds, updates)
        self.idle_seconds = max(self.preset.idle_seconds, updates)
        self.position = 0
        self.infer: Callable[[Array], Any]
        self.answer: Callable[[Array], Array]
        self.routes: Callable[[Array], tuple[Array, str]] | None = None
        runtime, threads = request["runtime"], request["threads"]
        if "artifact" in request:  # of a race, before there is a bundle
            self.inputs = _one_by_one(np.load(request["inputs"], allow_pickle=False))
            self.targets = None
            self.gpu = _has_gpu(request["target"])
            self._open_single(request["target"], Path(request["artifact"]), runtime, threads)
            return
        opened = bundles.open_bundle(Path(request["bundle"]))
        self.gpu = _has_gpu(opened.manifest.target)
        self.inputs, self.targets = _replay(opened)
        if request["variant"] == "pair":
            self._open_pair(opened, runtime, threads)
        else:
            variant = request["variant"]
            artifact = opened.artifact(variant, runtime)
            runner = self._open_single(opened.manifest.target, artifact, runtime, threads)
            check_bundled(opened, variant, runtime, runner)

    def _open_single(self, target: str, artifact: Path, runtime: str, threads: int) -> Runner:
        runner = load_target(target).open(artifact, runtime, threads)
        self.infer = runner.run
        self.answer = lambda image: runner.run(image)["logits"]
        return runner

    def _open_pair(self, opened: bundles.Bundle, runtime: str, threads: int) -> None:
        from greenprune.runtime import AdaptiveSession

        # a few images over and over are no fresh inputs, which is what the drift guard judges
        session = AdaptiveSession(opened.path, runtime=runtime, threads=threads, drift=None)
        name, outputs = opened.manifest.input.name, [opened.manifest.outputs[0].name]

        def routes(image: Array) -> tuple[Array, str]:
            answers, info = session.run_with_info(outputs, {name: image})
            return answers[0], str(info.routes[0])

        self.infer = lambda image: session.run(outputs, {name: image})
        self.answer = lambda image: session.run(outputs, {name: image})[0]
        self.routes = routes

    def open(self) -> dict[str, Any]:
        """Answer one image: how long that takes tells what a limit for the rest must allow."""
        start = time.monotonic()
        self.infer(self.inputs[0])
        return {"images": len(self.inputs), "single_seconds": time.monotonic() - start}

    def load(self) -> dict[str, Any]:
        """Answer every replay image once, then warm up to a steady state."""
        start = time.monotonic()
        right, routed = 0, dict.fromkeys(("aggressive", "mild", "dense"), 0)
        for index, image in enumerate(self.inputs):
            if self.routes is None:
                logits = self.answer(image)
            else:
                logits, route = self.routes(image)
                routed[route] += 1
            if self.targets is not None:
                right += int(np.argmax(logits[0]) == self.targets[index])
        steady, inferences = self._warm_up()
        if "torch" in sys.modules:
            raise MeasurementError("torch was loaded on the device side; this is a defect")
        pair = self.routes is not None
        return {
            "images": len(self.inputs),
            "accuracy": None if self.targets is None else right / len(self.inputs),
            "accept_rate": routed["aggressive"] / len(self.inputs) if pair else None,
            "routed": {route: count for route, count in routed.items() if count},
            "steady": steady,
            "warmup_inferences": inferences + len(self.inputs),
            "warmup_seconds": time.monotonic() - start,
        }

    def _warm_up(self) -> tuple[bool, int]:
        preset, inferences = self.preset, 0
        medians: list[float] = []
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < preset.warmup_cap_seconds:
            latencies = self._time(preset.warmup_slice_seconds, 1)
            medians.append(float(np.median(latencies)))
            inferences += len(latencies)
            last = medians[-3:]
            if (
                elapsed >= preset.warmup_seconds - preset.warmup_slice_seconds
                and inferences >= preset.warmup_inferences
                and len(last) == 3
                and max(last) <= (1 + STEADY_WITHIN) * min(last)
            ):
                return True, inferences
        return False, inferences

    def idle(self) -> dict[str, Any]:
        """Joules while the network is loaded and nothing runs; None, and why, where they fail."""
        try:
            with self.meter.measure() as window:
                time.sleep(self.idle_seconds)
        except MeasurementError as problem:
            return {"energy": None, "problem": str(problem)}
        return {"energy": schema.encode(window.energy), "problem": ""}

    def window(self) -> dict[str, Any]:
        """One measured window: no reading, printing or collecting inside it."""
        seconds, inferences = self.window_seconds, self.preset.window_inferences
        latencies, energy, invalid = None, None, ""
        gc.collect()
        gc.disable()
        reading = read_conditions(gpu=self.gpu)
        try:
            with self.meter.measure() as window:
                start = time.monotonic()
                latencies = self._time(seconds, inferences)
                taken = time.monotonic() - start
            energy = window.energy
        except MeasurementError as problem:
            if latencies is None:
                raise
            invalid = str(problem)
        finally:
            gc.enable()
        conditions = conditions_since(reading, gpu=self.gpu)
        return {
            "seconds": taken,
            "inferences": len(latencies),
            "latency": schema.encode(summarise(latencies)),
            "energy": schema.encode(energy),
            "conditions": schema.encode(conditions),
            "invalid": invalid or conditions.throttled,
        }

    def _time(self, seconds: float, inferences: int) -> NDArray[np.int64]:
        """Latency of each inference, int64 [N] nanoseconds, for so long and so often at least."""
        infer, inputs, position = self.infer, self.inputs, self.position
        clock = time.perf_counter_ns
        latencies: list[int] = []
        end = clock() + int(seconds * 1e9)
        now = 0
        while now < end or len(latencies) < inferences:
            image = inputs[position]
            position = (position + 1) % len(inputs)
            before = clock()
            infer(image)
            now = clock()
            latencies.append(now - before)
        self.position = position
        return np.asarray(latencies, dtype=np.int64)


def _has_gpu(target: str) -> bool:
    """Whether what slows a GPU down slows this target's runtimes."""
    return "nvml" in load_target(target).capabilities.meters


def _replay(opened: bundles.Bundle) -> tuple[list[Array], NDArray[np.int64] | None]:
    """Images of one, each [1, C, H, W], and their classes where the bundle has them."""
    samples = opened.manifest.samples
    images = opened.read_array(samples.replay_inputs or samples.reference_input)
    targets = None
    if samples.replay_inputs and samples.replay_targets:
        targets = opened.read_array(samples.replay_targets)
        if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            targets = None  # not classes: there is no top-1 accuracy
    return _one_by_one(images), targets


def _one_by_one(images: NDArray[Any]) -> list[Array]:
    """Batches of one."""
    return [np.ascontiguousarray(image[None], dtype=np.float32) for image in images]


def handler() -> Handle:
    """Answers to a client's commands, of which ``open`` comes first."""
    worker: Worker | None = None

    def handle(command: str, request: dict[str, Any]) -> Any:
        nonlocal worker
        if command not in ("open", "load", "idle", "window"):
            raise MeasurementError(f"unknown command '{command}'")
        if command == "open":
            worker = Worker(request)
        if worker is None:
            raise MeasurementError(f"'{command}' before 'open'")
        return getattr(worker, command)()

    return handle


def main() -> None:
    """Serve on stdin and stdout."""
    serve(handler())
