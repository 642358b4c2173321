"""x86-64 processors: ONNX Runtime and OpenVINO, fp32 and int8."""

from __future__ import annotations

import sys
from collections import deque
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.cores import session_threads
from greenprune.errors import MissingPackageError
from greenprune.registry import Build, Capabilities, Runner
from greenprune_targets import onnxruntime_cpu, openvino_cache
from greenprune_targets.base import BaseTarget, refusal

OPENVINO_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
OPENVINO_PRECISIONS = {"f32": "fp32", "f16": "fp16", "u8": "int8", "i8": "int8"}


class X86(BaseTarget):
    """The CPU of a PC, a server or an industrial board."""

    name = "x86"
    description = "x86-64 CPU, by ONNX Runtime or OpenVINO"
    capabilities = Capabilities(
        precisions=("fp32", "int8"),
        runtimes=("onnxruntime", "openvino"),
        opset=20,
        width_multiple=8,
        meters=("rapl", "estimate"),
        machines=("x86_64", "AMD64"),
    )

    def compile(self, graph: Path, build: Build, folder: Path, name: str) -> Path:
        """ONNX Runtime: the graph itself, with Q/DQ for int8. OpenVINO: its portable IR, ``.xml``
        and ``.bin``, quantised by NNCF for int8."""
        self.check_build(build)
        if build.runtime == "onnxruntime":
            return onnxruntime_cpu.compile_graph(graph, build, folder, name)
        openvino = _openvino()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.xml"
        # Not convert_model(): it reads more formats, which we do not need, and reports its use.
        with refusal(graph, build.runtime):
            model = _core().read_model(graph)
            if build.precision == "int8":
                model = _quantise(model, build)
            openvino.save_model(model, path, compress_to_fp16=False)
        return path

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Open for one inference at a time at lowest latency; nothing is narrowed silently."""
        base, _ = self.check_runtime(runtime)
        if base == "onnxruntime":
            return onnxruntime_cpu.open_session(artifact, threads)
        with refusal(artifact, base):
            return OpenVinoRunner(_compile_model(artifact, threads))

    def layer_precisions(self, artifact: Path, runtime: str) -> dict[str, str]:
        """From the graph that the runtime makes of the artifact on this machine."""
        base, _ = self.check_runtime(runtime)
        if base == "onnxruntime":
            return onnxruntime_cpu.layer_precisions(artifact)
        with refusal(artifact, base):
            layers = _compile_model(artifact, 0).get_runtime_model().get_ops()
        told = {layer.get_friendly_name(): layer.get_rt_info() for layer in layers}
        return {
            name: OPENVINO_PRECISIONS.get(str(info["runtimePrecision"].value), "other")
            for name, info in told.items()
            if str(info["layerType"].value) in OPENVINO_LAYERS
        }


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


def _compile_model(artifact: Path, threads: int) -> Any:
    # ENABLE_CPU_PINNING stays as OpenVINO sets it: within this process's affinity mask.
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": session_threads(threads),
    }
    version = _openvino().get_version()
    return openvino_cache.compile_model(_core(), version, artifact, settings)


def _quantise(model: Any, build: Build) -> Any:
    """NNCF's post-training quantisation, with its defaults: those of OpenVINO's int8 kernels."""
    nncf = _without_telemetry("nncf")
    assert build.calibration is not None  # BaseTarget.check_build()
    # the front end appends this to the name of an ONNX node that becomes several operations
    kept = [name + end for name in build.keep_float for end in ("", "/WithoutBiases")]
    return nncf.quantize(
        model,
        nncf.Dataset(list(build.calibration[:, None])),
        subset_size=len(build.calibration),
        ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
    )


@cache
def _openvino() -> Any:
    return _without_telemetry("openvino")


def _without_telemetry(package: str) -> Any:
    """A package of the OpenVINO family, kept from reporting its use over the network."""
    blocked = "openvino_telemetry" not in sys.modules
    if blocked:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingPackageError(package, "x86") from error
    finally:
        if blocked:
            del sys.modules["openvino_telemetry"]


@cache
def _core() -> Any:
    """One Core for the process: its networks then share threads and plug-ins."""
    return _openvino().Core()
