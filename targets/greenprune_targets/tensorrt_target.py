"""What the NVIDIA targets share: graphs that carry their precision, engines built on the device."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from greenprune.errors import TargetError
from greenprune.registry import Build, Runner
from greenprune_calibration import graphs, half, qdq_rules, quantise
from greenprune_targets import onnxruntime_cpu, tensorrt_check, tensorrt_runner
from greenprune_targets.base import BaseTarget, version

BATCH = 1
"""Inputs at once that engines are built for; larger batches run in pieces."""


class TensorRtTarget(BaseTarget):
    """A GPU that TensorRT runs; subclasses give the data."""

    def compile(self, graph: Path, build: Build, folder: Path, name: str) -> Path:
        """The ONNX graph in its precision, checked by TensorRT's rules, and by the parser and
        builder of TensorRT-RTX where that is installed. The engine is built on the device."""
        self.check_build(build)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.onnx"
        try:
            if build.precision == "int8":
                assert build.calibration is not None  # check_build()
                quantise.tensorrt_int8(graph, build.calibration, path, keep_float=build.keep_float)
            elif build.precision == "fp16":
                half.tensorrt_fp16(graph, path)
            else:
                shutil.copyfile(graph, path)
            qdq_rules.check_tensorrt(path)
        except ValueError as error:
            raise TargetError(str(error)) from error
        if find_spec("tensorrt_rtx"):
            tensorrt_check.parse(path, _written(path, build.precision))
        return path

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """The graph's engine, built now if this device has none yet (minutes); ``threads`` does not
        matter."""
        _, precision = self.check_runtime(runtime)
        return tensorrt_runner.open_network(artifact, precision, batch=BATCH)

    def open_on_host(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """On the device as :meth:`open`; elsewhere ONNX Runtime stands in: the same graph, not the
        same kernels."""
        if self.is_here():
            return self.open(artifact, runtime, threads)
        self.check_runtime(runtime)
        # optimised, it would round where a TensorRT graph does not ask for it
        return onnxruntime_cpu.open_session(artifact, threads, optimise=False)

    def is_here(self) -> bool:
        """Whether this machine can build and run engines: a PC's processor alone is no GPU."""
        return super().is_here() and find_spec("tensorrt") is not None

    def how_to_install(self, runtime: str) -> str:
        """TensorRT by pip, with what its runner needs beside it."""
        return "pip install 'greenprune[cuda]'"

    def layer_precisions(self, artifact: Path, runtime: str) -> dict[str, str]:
        """By the types in the graph: a strongly typed builder keeps to them."""
        try:
            return qdq_rules.check_tensorrt(artifact)
        except ValueError as error:
            raise TargetError(str(error)) from error

    def probe(self) -> dict[str, Any]:
        """As every target's, and what checks its graphs on this machine."""
        found = version("tensorrt-rtx")
        checked = "rules alone; pip install 'greenprune[check]' adds TensorRT-RTX's parser"
        return super().probe() | {"checked_by": f"TensorRT-RTX {found}" if found else checked}


def _written(graph: Path, asked: str) -> str:
    """The precision to check ``graph`` for: int8 that was kept in float everywhere is fp16."""
    if asked != "int8":
        return asked
    nodes = graphs.load(graph).graph.node
    return "int8" if any(node.op_type == "QuantizeLinear" for node in nodes) else "fp16"
