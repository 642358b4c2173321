"""The Eyeriss accelerator, by simulation: relative energy of each layer, the graph's answers.

Only the energy is simulated. Answers come from ONNX Runtime on this machine, which computes the
same function in float32; time is not simulated at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenprune import schema, storage
from greenprune.bundle import Provenance
from greenprune.errors import TargetError
from greenprune.progress import progress
from greenprune.registry import Build, Capabilities, Runner
from greenprune_targets import onnxruntime_cpu
from greenprune_targets.base import BaseTarget, version
from greenprune_targets.graph_layers import GraphLayer, read_layers
from greenprune_targets.row_stationary import LayerShape, LevelEnergy, layer_energy


@dataclass(frozen=True, kw_only=True)
class SimulatedLayer:
    """One layer, its repeats included."""

    name: str
    operation: str
    shape: LayerShape
    repeats: int
    macs: int
    energy_mac_units: float
    levels: LevelEnergy


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A graph on Eyeriss. Energies are for the whole batch, in MAC units: relative, not joules."""

    batch: int
    energy_mac_units: float | None
    """None where a layer could not be mapped."""
    macs: int
    """Of the mapped layers."""
    levels: LevelEnergy
    layers: tuple[SimulatedLayer, ...]
    not_mapped: dict[str, str]
    """Layer to the reason."""
    provenance: Provenance = "simulated_model"
    nn_dataflow: str | None


def simulate(graph: Path, batch: int = 1) -> Simulation:
    """Relative energy of every convolution and matrix product of an ONNX graph on Eyeriss.

    Raises:
        MissingPackageError: onnx or nn-dataflow is not installed.
        TargetError: the file is no valid ONNX graph, not one for this batch, or has no layer.
    """
    read = read_layers(graph, batch)
    if not read.layers and not read.not_mapped:
        raise TargetError(
            f"{graph}: expected a graph with convolutions or matrix products; it has none, so "
            "there is nothing to simulate"
        )
    not_mapped = dict(read.not_mapped)
    layers = []
    with progress(f"simulating {graph.stem}", len(read.layers)) as advance:
        for layer in read.layers:
            try:
                layers.append(_simulate_layer(layer))
            except TargetError as error:
                not_mapped[layer.name] = f"{layer.operation}: {error}"
            advance()
    levels = LevelEnergy.sum(layer.levels for layer in layers)
    return Simulation(
        batch=batch,
        energy_mac_units=None if not_mapped else levels.total,
        macs=sum(layer.macs for layer in layers),
        levels=levels,
        layers=tuple(layers),
        not_mapped=not_mapped,
        nn_dataflow=version("nn-dataflow"),
    )


def _simulate_layer(layer: GraphLayer) -> SimulatedLayer:
    levels = layer_energy(layer.shape).times(layer.repeats)
    return SimulatedLayer(
        name=layer.name,
        operation=layer.operation,
        shape=layer.shape,
        repeats=layer.repeats,
        macs=layer.repeats * layer.shape.macs,
        energy_mac_units=levels.total,
        levels=levels,
    )


class Eyeriss(BaseTarget):
    """A row-stationary accelerator of 12 x 14 processing elements, in relative energy."""

    name = "eyeriss"
    description = "Eyeriss accelerator, simulated: relative energy, no latency"
    capabilities = Capabilities(
        precisions=("fp32",),
        runtimes=("onnxruntime",),
        opset=20,
        width_multiple=1,
        meters=("simulated",),
        # wherever the graph is run: the answers, and so a certificate, do not depend on it
        machines=("x86_64", "AMD64", "aarch64", "arm64"),
        status="ready, simulated: energy by nn-dataflow (pip install 'greenprune[eyeriss]'), "
        "relative and in MAC units; answers by ONNX Runtime in float32",
    )

    def compile(self, graph: Path, build: Build, folder: Path, name: str) -> Path:
        """A copy of the graph, ``<name>.onnx``, and its simulation for one input, ``<name>.json``.

        Raises:
            MissingPackageError: onnx or nn-dataflow is not installed.
            TargetError: as :func:`simulate`; or some layer has no mapping.
        """
        self.check_build(build)
        simulation = simulate(graph)
        if simulation.not_mapped:
            reasons = "; ".join(f"{key}: {why}" for key, why in simulation.not_mapped.items())
            raise TargetError(
                f"{graph}: expected layers that Eyeriss can map; "
                f"{len(simulation.not_mapped)} of them cannot be, so that the network's energy is "
                f"not known: {reasons}"
            )
        artifact = onnxruntime_cpu.compile_graph(graph, build, folder, name)
        storage.write_json(artifact.with_suffix(".json"), schema.encode(simulation))
        return artifact

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Run the graph on this machine's CPU: the same function, not the same speed."""
        self.check_runtime(runtime)
        return onnxruntime_cpu.open_session(artifact, threads)

    def probe(self) -> dict[str, Any]:
        """As every target's, with the simulator's version (None: absent)."""
        return super().probe() | {"simulator": {"nn-dataflow": version("nn-dataflow")}}

    def simulated_energy(self, artifact: Path) -> dict[str, Any]:
        """``{energy_mac_units, provenance}`` of one inference."""
        found = self.simulation(artifact)
        return {
            "energy_mac_units": found.energy_mac_units,
            "provenance": found.provenance,
        }

    def simulation(self, artifact: Path) -> Simulation:
        """The simulation that :meth:`compile` wrote beside ``artifact``.

        Raises:
            TargetError: it is missing or damaged.
        """
        path = artifact.with_suffix(".json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TargetError(
                f"{path}: expected the simulation of {artifact.name}: {error}; export it again"
            ) from error
        return schema.decode(content, Simulation, str(path), TargetError)
