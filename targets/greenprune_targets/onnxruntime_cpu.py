"""ONNX Runtime on a CPU: the graph is the artifact, optimised when it is opened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.cores import session_threads
from greenprune.errors import MissingPackageError
from greenprune.registry import Build
from greenprune_targets.base import refusal


def compile_graph(graph: Path, build: Build, folder: Path, name: str) -> Path:
    """Copy the graph, or quantise it, to ``folder/<name>.onnx``.

    What ONNX Runtime's optimiser writes is bound to its version and the processor it ran on, so
    the plain graph travels and every machine optimises for itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    if build.precision == "int8":
        from greenprune_calibration import quantise  # here: opening a session needs none of it

        assert build.calibration is not None  # BaseTarget.check_build()
        with refusal(graph, "onnxruntime"):
            quantise.cpu_int8(graph, build.calibration, path, keep_float=build.keep_float)
    else:
        shutil.copyfile(graph, path)
    return path


def layer_precisions(artifact: Path) -> dict[str, str]:
    """What each layer computes in once ONNX Runtime has optimised the graph on this machine."""
    from greenprune_calibration import inspection

    with refusal(artifact, "onnxruntime"):
        found = inspection.int8_kernels(artifact)
    return {layer: "int8" if integer else "fp32" for layer, integer in found.items()}


def open_session(artifact: Path, threads: int, *, optimise: bool = True) -> OnnxRuntimeRunner:
    """Open an ONNX graph on the CPU, with all optimisations or none; ``threads`` as
    :func:`greenprune.cores.session_threads` takes them.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        TargetError: it does not accept the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime") from error

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    # ONNX Runtime's own 0 starts a thread for each core of the machine and pins it there, whatever
    # this process's affinity mask says; a number pins nothing.
    options.intra_op_num_threads = session_threads(threads)
    options.inter_op_num_threads = 1
    # Two sessions in one process: the idle one's threads would spin on the cores that the other
    # needs, which makes both 2.5 times slower.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with refusal(artifact, "onnxruntime"):
        session = onnxruntime.InferenceSession(
            artifact, options, providers=["CPUExecutionProvider"]
        )
    return OnnxRuntimeRunner(session)


class OnnxRuntimeRunner:
    """An ONNX Runtime session; sessions are safe to call from several threads."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.input_name: str = session.get_inputs()[0].name
        self.output_names: tuple[str, ...] = tuple(out.name for out in session.get_outputs())
        self._names = list(self.output_names)  # for None ONNX Runtime lists them in every call

    def run(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Outputs by name, of float32 inputs [N, C, H, W]."""
        answers = self._session.run(self._names, {self.input_name: inputs})
        return dict(zip(self.output_names, answers, strict=True))

    def close(self) -> None:
        """Drop the session and its threads."""
        self._session = None
