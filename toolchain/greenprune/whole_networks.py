"""What whole networks take on this machine, before there is a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune import onnx_export, storage
from greenprune.adaptive.selector import ScoredNetwork
from greenprune.harness.presets import Preset
from greenprune.harness.race import PRESET, Race, race
from greenprune.registry import Build, load_target, split_runtime


def race_networks(
    target: str,
    networks: Mapping[str, nn.Module],
    runtimes: Sequence[str],
    images: Tensor,
    *,
    calibration: NDArray[np.float32] | None = None,
    threads: int = 0,
    seed: int = 0,
    preset: Preset = PRESET,
    joules: bool = False,
) -> Race:
    """Batch-1 latency of networks by each runtime: exported, compiled, raced in alternating blocks.

    Args:
        target: its name.
        networks: by name, in eval mode; with a selector's head where it is to be measured too.
        runtimes: by :func:`greenprune.registry.runtime_name`.
        images: that are replayed, normalised, float32 [N, C, H, W], N >= 2.
        calibration: of int8, float32 [N, C, H, W].
        threads, seed, preset, joules: as :func:`greenprune.harness.race.race`.

    Raises:
        ExportError, TargetError, MeasurementError: one of them cannot be exported, compiled or run.
    """
    device = load_target(target)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        storage.save_array(place / "inputs.npy", images.numpy())
        artifacts: dict[str, dict[str, Path]] = {runtime: {} for runtime in runtimes}
        for name, network in networks.items():
            graph = place / f"{name}.onnx"
            scored = isinstance(network, ScoredNetwork)
            names = ["logits", "score"] if scored else ["logits"]
            onnx_export.export_onnx(network, images, graph, names, opset=device.capabilities.opset)
            for runtime in runtimes:
                base, precision = split_runtime(runtime)
                needed = calibration if precision == "int8" else None
                build = Build(runtime=base, precision=precision, calibration=needed)
                artifacts[runtime][name] = device.compile(graph, build, place / runtime, name)
        return race(
            target,
            artifacts,
            place / "inputs.npy",
            threads=threads,
            seed=seed,
            preset=preset,
            joules=joules,
        )
