"""x86-64 processors: ONNX Runtime and OpenVINO, fp32."""

from __future__ import annotations

import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import MissingPackageError
from greenprune.registry import Capabilities, Runner
from greenprune_targets import onnxruntime_cpu
from greenprune_targets.base import BaseTarget, refusal


class X86(BaseTarget):
    """The CPU of a PC, a server or an industrial board."""

    name = "x86"
    description = "x86-64 CPU, by ONNX Runtime or OpenVINO"
    capabilities = Capabilities(
        precisions=("fp32",),
        runtimes=("onnxruntime", "openvino"),
        opset=20,
        width_multiple=8,
        meters=("rapl", "estimate"),
        machines=("x86_64", "AMD64"),
    )

    def compile(self, graph: Path, runtime: str, folder: Path, name: str) -> Path:
        """ONNX Runtime: the graph itself. OpenVINO: its portable IR, ``.xml`` and ``.bin``."""
        self.check_runtime(runtime)
        if runtime == "onnxruntime":
            return onnxruntime_cpu.compile_graph(graph, folder, name)
        openvino = _openvino()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.xml"
        # Not convert_model(): it reads more formats, which we do not need, and reports its use.
        with refusal(graph, runtime):
            openvino.save_model(_core().read_model(graph), path, compress_to_fp16=False)
        return path

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Open for one inference at a time at lowest latency, in full float32."""
        self.check_runtime(runtime)
        if runtime == "onnxruntime":
            return onnxruntime_cpu.open_session(artifact, threads)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        with refusal(artifact, runtime):
            return OpenVinoRunner(_core().compile_model(artifact, "CPU", settings))


class OpenVinoRunner:
    """A compiled OpenVINO model, with as many inference requests as there were calls at once."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: deque[Any] = deque()
        self.input_name: str = compiled.inputs[0].get_any_name()
        self.output_names: tuple[str, ...] = tuple(out.get_any_name() for out in compiled.outputs)

    def run(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Outputs by name, of float32 inputs [N, C, H, W]."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            answers = request.infer([np.ascontiguousarray(inputs)], share_inputs=True)
        finally:
            self._idle.append(request)
        return {name: answers[index] for index, name in enumerate(self.output_names)}

    def close(self) -> None:
        """Drop the model and its requests."""
        self._compiled = None
        self._idle.clear()


@cache
def _openvino() -> Any:
    """The openvino package, kept from reporting its use over the network when it is imported."""
    blocked = "openvino_telemetry" not in sys.modules
    if blocked:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError("openvino", "x86") from error
    finally:
        if blocked:
            del sys.modules["openvino_telemetry"]
    return openvino


@cache
def _core() -> Any:
    """One Core for the process: its networks then share threads and plug-ins."""
    return _openvino().Core()
