"""The simulated Eyeriss beside the measured chip, and the ResNets on it.

Run from the folder ``benchmarks``: ``python eyeriss.py``; about a minute of CPU time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import write_result

from greenprune import models, progress
from greenprune.onnx_export import export_onnx
from greenprune_targets.eyeriss import Simulation, simulate
from greenprune_targets.row_stationary import COSTS, LayerShape, layer_energy

BATCH = 4
ALEXNET = {
    # layer: (channels in a group, outputs of a group, output size, filter, stride, groups;
    # published power in mW, processing time in ms and DRAM traffic in MB for 4 images)
    "CONV1": ((3, 96, 55, 11, 4, 1), (332, 16.5, 5.0)),
    "CONV2": ((48, 128, 27, 5, 1, 2), (288, 39.2, 4.0)),
    "CONV3": ((256, 384, 13, 3, 1, 1), (266, 21.8, 3.0)),
    "CONV4": ((192, 192, 13, 3, 1, 2), (235, 16.0, 2.1)),
    "CONV5": ((192, 128, 13, 3, 1, 2), (236, 10.0, 1.3)),
}
"""Chen et al., JSSC 2017: measured on the chip, whose power leaves DRAM out."""
WORD_BYTES = 2


def alexnet() -> dict[str, Any]:
    """Shares of the energy on the chip, and DRAM traffic, for 4 images."""
    rows = {}
    for name, (shape, (milliwatts, milliseconds, dram_mb)) in ALEXNET.items():
        inputs, outputs, size, kernel, stride, groups = shape
        levels = layer_energy(_square(inputs, outputs, size, kernel, stride, BATCH)).times(groups)
        progress.say(f"AlexNet {name}: {levels.total / 1e6:,.0f}M MAC units")
        rows[name] = {
            "measured_uj": milliwatts * milliseconds,
            "simulated_on_chip_mac_units": levels.total - levels.dram,
            "measured_dram_mb": dram_mb,
            "simulated_dram_mb": levels.dram / COSTS["dram"] * WORD_BYTES / 1e6,
        }
    for kind, key in (
        ("measured_share", "measured_uj"),
        ("simulated_share", "simulated_on_chip_mac_units"),
    ):
        total = sum(row[key] for row in rows.values())
        for row in rows.values():
            row[kind] = row[key] / total
    return rows


def half_width_resnet20() -> dict[str, Any]:
    """ResNet-20 with 8, 16 and 32 channels, for one image."""
    layers = [_square(3, 8, 32, 3)]
    inputs = 8
    for channels, size in ((8, 32), (16, 16), (32, 8)):
        layers.append(_square(inputs, channels, size, 3, stride=channels // inputs))
        layers += 5 * [_square(channels, channels, size, 3)]
        inputs = channels
    layers.append(_square(inputs, 10, 1, 1))
    return {
        "energy_mac_units": sum(layer_energy(layer).total for layer in layers),
        "macs": sum(layer.macs for layer in layers),
    }


def _square(
    inputs: int, outputs: int, size: int, kernel: int, stride: int = 1, batch: int = 1
) -> LayerShape:
    return LayerShape(
        in_channels=inputs,
        out_channels=outputs,
        output=(size, size),
        filter=(kernel, kernel),
        stride=(stride, stride),
        batch=batch,
    )


def resnets(folder: Path) -> dict[str, Any]:
    """Dense ResNets, exported: energy, MACs, seconds cold and cached."""
    found: dict[str, Any] = {}
    for name, network in (("resnet20", models.resnet20()), ("resnet56", models.resnet56())):
        graph = folder / f"{name}.onnx"
        export_onnx(network, torch.zeros(2, 3, 32, 32), graph, ["logits"])
        layer_energy.cache_clear()
        simulation, cold = _timed(graph)
        again, kept = _timed(graph)
        assert again == simulation
        progress.say(f"{name}: {simulation.levels.total / 1e6:,.1f}M MAC units")
        found[name] = {
            "energy_mac_units": simulation.energy_mac_units,
            "macs": simulation.macs,
            "levels": vars(simulation.levels),
            "seconds_cold": cold,
            "seconds_cached": kept,
        }
    return found


def _timed(graph: Path) -> tuple[Simulation, dict[str, float]]:
    """A simulation, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    simulation = simulate(graph)
    return simulation, {
        "wall": round(time.perf_counter() - wall, 2),
        "cpu": round(time.process_time() - cpu, 2),
    }


def main() -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            "resnets": resnets(Path(folder)),
            "resnet20_half_width": half_width_resnet20(),
            "alexnet": {"batch": BATCH, "layers": alexnet()},
        }
    dense, half = figures["resnets"]["resnet20"], figures["resnet20_half_width"]
    for key in ("macs", "energy_mac_units"):
        half[f"{key}_over_dense"] = half[key] / dense[key]
    progress.say(
        f"half width: {half['macs_over_dense']:.3f} of the MACs, "
        f"{half['energy_mac_units_over_dense']:.3f} of the energy"
    )
    write_result("eyeriss", seed=0, seconds=time.monotonic() - begin, figures=figures)


if __name__ == "__main__":
    main()
