"""x86-64 processors: ONNX Runtime and OpenVINO, fp32 and int8."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.cores import session_threads
from greenprune.errors import MissingPackageError, TargetError
from greenprune.registry import Build, Capabilities, Runner
from greenprune_targets import onnxruntime_cpu, openvino_cache
from greenprune_targets.base import BaseTarget, processor, refusal

VNNI = {"avx_vnni", "avx512_vnni"}
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

    def arithmetic(self, precision: str) -> str:
        """int8 is multiplied by VNNI or, without it, two products are added in 16 bits first, which
        may saturate."""
        if precision != "int8":
            return ""
        return "VNNI" if _has_vnni() else "no VNNI"

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
        return OpenVinoRunner(_compiler(artifact, threads))

    def layer_precisions(self, artifact: Path, runtime: str) -> dict[str, str]:
        """From the graph that the runtime makes of the artifact on this machine."""
        base, _ = self.check_runtime(runtime)
        if base == "onnxruntime":
            return onnxruntime_cpu.layer_precisions(artifact)
        layers = _compiler(artifact, 0)(1).get_runtime_model().get_ops()
        told = {layer.get_friendly_name(): layer.get_rt_info() for layer in layers}
        return {
            name: OPENVINO_PRECISIONS.get(str(info["runtimePrecision"].value), "other")
            for name, info in told.items()
            if str(info["layerType"].value) in OPENVINO_LAYERS
        }


class OpenVinoRunner:
    """An OpenVINO model compiled for batch 1, and as soon as another batch comes for any.

    Fixed shapes are faster, and a request that keeps its input's memory spares the dispatch of
    ``infer(inputs)`` in Python, which costs as much as several layers once caches are cold.
    """

    def __init__(self, compile_for: Callable[[int | None], Any]) -> None:
        """``compile_for`` takes the batch, None for any."""
        self._compile_for = compile_for
        self._lock = threading.Lock()
        self._one: Any = compile_for(1)
        self._any: Any = None
        # as many requests as there were calls at once
        self._requests: deque[tuple[Any, NDArray[np.float32]]] = deque()
        self._requests_any: deque[Any] = deque()
        port = self._one.inputs[0]
        fixed = port.get_partial_shape().is_static
        self._shape: tuple[int, ...] | None = tuple(port.get_shape()) if fixed else None
        self.input_name: str = port.get_any_name()
        self.output_names: tuple[str, ...] = tuple(out.get_any_name() for out in self._one.outputs)

    def run(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Outputs by name, of float32 inputs [N, C, H, W]."""
        return self._run_one(inputs) if inputs.shape == self._shape else self._run_any(inputs)

    def _run_one(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        try:
            request, memory = self._requests.pop()
        except IndexError:
            request = self._one.create_infer_request()
            memory = request.get_input_tensor(0).data
        try:
            memory[...] = inputs
            request.infer(share_outputs=True)
            return {
                name: request.get_output_tensor(index).data.copy()
                for index, name in enumerate(self.output_names)
            }
        finally:
            self._requests.append((request, memory))

    def _run_any(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        with self._lock:
            if self._one is None:
                raise TargetError("this OpenVINO model was closed; open it again")
            if self._any is None:
                self._any = self._compile_for(None)
        try:
            request = self._requests_any.pop()
        except IndexError:
            request = self._any.create_infer_request()
        try:
            answers = request.infer(np.ascontiguousarray(inputs), share_inputs=True)
        finally:
            self._requests_any.append(request)
        return {name: answers[index] for index, name in enumerate(self.output_names)}

    def close(self) -> None:
        """Drop the models and their requests."""
        with self._lock:
            self._one = self._any = self._shape = None
        self._requests.clear()
        self._requests_any.clear()


@cache  # a session asks whenever its policy changes
def _has_vnni() -> bool:
    return not VNNI.isdisjoint(processor()["isa"])


def _compiler(artifact: Path, threads: int) -> Callable[[int | None], Any]:
    """Compiles for a batch, None for any, what the artifact is now."""
    # ENABLE_CPU_PINNING stays as OpenVINO sets it: within this process's affinity mask.
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": session_threads(threads),
    }
    version, hashes = _openvino().get_version(), openvino_cache.hashes_of(artifact)

    def compile_for(batch: int | None) -> Any:
        with refusal(artifact, "openvino"):
            return openvino_cache.compile_model(_core(), version, artifact, hashes, batch, settings)

    return compile_for


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
