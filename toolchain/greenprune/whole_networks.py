"""What whole networks take on this machine, before there is a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from greenprune import compilation, onnx_export, storage
from greenprune import stage_parts as parts
from greenprune.harness.race import Race, race
from greenprune.pipeline import Job
from greenprune.registry import Build, load_target, split_runtime

IMAGES = 16
"""That a race replays."""


def race_networks(job: Job, networks: Mapping[str, nn.Module], runtimes: Sequence[str]) -> Race:
    """Batch-1 latency of networks by each runtime, in alternating blocks.

    Args:
        job: its data are the inputs, and int8 is calibrated with its training images.
        networks: by name, in eval mode.
        runtimes: by :func:`greenprune.registry.runtime_name`, of the job's target.

    Raises:
        ExportError, TargetError, MeasurementError: one of them cannot be exported, compiled or run.
    """
    target = load_target(job.recipe.compile.target)
    images = parts.training_images(job, IMAGES, seed=job.recipe.seed + 4)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        storage.save_array(place / "inputs.npy", images.numpy())
        artifacts: dict[str, dict[str, Path]] = {runtime: {} for runtime in runtimes}
        for name, network in networks.items():
            graph = place / f"{name}.onnx"
            onnx_export.export_onnx(network, images, graph, ["logits"])
            for runtime in runtimes:
                made = target.compile(graph, _build(job, runtime), place / runtime, name)
                artifacts[runtime][name] = made
        return race(
            target.name,
            artifacts,
            place / "inputs.npy",
            threads=job.recipe.threads,
            seed=job.recipe.seed,
        )


def _build(job: Job, runtime: str) -> Build:
    base, precision = split_runtime(runtime)
    if precision != "int8":
        return Build(runtime=base, precision=precision)
    calibration = compilation.calibration_images(job)
    return Build(runtime=base, precision=precision, calibration=calibration)
