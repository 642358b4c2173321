"""64-bit Arm processors: ONNX Runtime, fp32."""

from __future__ import annotations

from pathlib import Path

from greenprune.registry import Build, Capabilities, Runner
from greenprune_targets import onnxruntime_cpu
from greenprune_targets.base import BaseTarget


class Arm(BaseTarget):
    """The CPU of a phone-class board: Raspberry Pi, a Jetson's Arm cores."""

    name = "arm"
    description = "64-bit Arm CPU, by ONNX Runtime"
    capabilities = Capabilities(
        precisions=("fp32",),
        runtimes=("onnxruntime",),
        opset=20,
        width_multiple=8,
        meters=("estimate",),
        machines=("aarch64", "arm64"),
        status="ready, but never yet run on Arm hardware, only emulated; width_multiple is taken "
        "over from x86, not measured",
    )

    def compile(self, graph: Path, build: Build, folder: Path, name: str) -> Path:
        """The graph itself: every machine optimises it when it is opened."""
        self.check_build(build)
        return onnxruntime_cpu.compile_graph(graph, build, folder, name)

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Open on this machine's CPU, whatever it is: the graph is the same."""
        self.check_runtime(runtime)
        return onnxruntime_cpu.open_session(artifact, threads)
