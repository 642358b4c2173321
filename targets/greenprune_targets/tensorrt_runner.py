"""Run a TensorRT engine: buffers allocated once, one stream, a CUDA graph where it can be had.

Tested with a fake ``tensorrt`` and a fake CUDA runtime that has real memory; it has not run on
NVIDIA hardware.
"""

from __future__ import annotations

import ctypes
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import TargetError
from greenprune_targets.cuda_runtime import call, checked, cuda_runtime
from greenprune_targets.tensorrt_cache import engine_for, load, this_device
from greenprune_targets.tensorrt_engine import logger_of, tensorrt

log = logging.getLogger(__name__)

DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
"""numpy's type of each TensorRT type that a network may take or give."""


def open_network(
    artifact: Path,
    precision: str,
    *,
    batch: int = 1,
    cache: Path | None = None,
    root: Path = Path("/"),
) -> TensorRtRunner:
    """Open a graph's engine, built on first use: :func:`~.tensorrt_cache.engine_for`, then
    :func:`open_engine`; arguments and errors are theirs."""
    return open_engine(engine_for(artifact, precision, batch=batch, cache=cache, root=root), root)


def open_engine(engine: Path, root: Path = Path("/")) -> TensorRtRunner:
    """Open an engine that was built on this machine.

    Raises:
        MissingPackageError: tensorrt or cuda-python is not installed.
        TargetError: the engine is another machine's or damaged, or memory runs out.
    """
    plan = load(engine, this_device(root))
    return TensorRtRunner(tensorrt(root), cuda_runtime(root), plan, engine)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """An input or output, with room for the largest batch on both sides."""

    name: str
    device: int
    """Address in the GPU's memory."""
    host: NDArray[Any]
    """Page-locked, [largest batch, ...]."""

    def bytes_of(self, count: int) -> int:
        return self.host.nbytes // len(self.host) * count


class TensorRtRunner:
    """An opened engine; calls from several threads wait for each other (one context)."""

    def __init__(self, trt: Any, cuda: Any, plan: bytes, source: Path) -> None:
        self._trt, self._cuda, self._source = trt, cuda, source
        self._lock = Lock()
        self._open = True
        self._resources = ExitStack()
        self._graph: Any = None
        self._graph_works = True
        self._shaped_for = 0
        self._ran = False
        try:
            self._engine, self._context = self._deserialize(plan)
            self._resources.callback(self._forget)
            self._stream = call(cuda, "cudaStreamCreate")
            self._resources.callback(call, cuda, "cudaStreamDestroy", self._stream)
            self._allocate()
        except BaseException:
            self.close()
            raise

    def run(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Outputs by name, float32 copies, of float32 inputs [N, C, H, W]; a batch larger than
        the engine's runs in pieces.

        Raises:
            TargetError: the inputs are of another shape, the runner is closed, CUDA fails.
        """
        expected = self._input.host.shape[1:]
        if inputs.shape[1:] != expected:
            raise TargetError(
                f"{self._source}: expected inputs [N, {', '.join(map(str, expected))}], got "
                f"{list(inputs.shape)}; prepare them as the bundle says"
            )
        with self._lock:
            if not self._open:
                raise TargetError(f"{self._source}: expected an open runner; it was closed")
            pieces = [
                self._run_piece(inputs[start : start + self.largest_batch])
                for start in range(0, len(inputs), self.largest_batch)
            ]
        if len(pieces) == 1:
            return pieces[0]
        empty = {out.name: out.host[:0].astype(np.float32) for out in self._outputs}
        return {name: np.concatenate([empty[name], *(p[name] for p in pieces)]) for name in empty}

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""
        with self._lock:
            self._open = False
            try:
                self._drop_graph()
            finally:
                self._resources.close()

    @property
    def uses_graph(self) -> bool:
        """Whether the next call of the last batch's size launches a captured CUDA graph."""
        return self._graph is not None

    def _deserialize(self, plan: bytes) -> tuple[Any, Any]:
        logger = logger_of(self._trt)
        logger.messages.clear()
        self._runtime = self._trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            what = "load this engine" if engine is None else "make room to run this engine"
            raise TargetError(
                f"{self._source}: expected TensorRT {self._trt.__version__} to {what}, it does "
                f"not; it said: {'; '.join(list(logger.messages)[-3:]) or 'nothing'}; delete the "
                "engine to have it built again, or close programs that use the GPU"
            )
        return engine, context

    def _forget(self) -> None:
        """TensorRT frees what it holds when the last reference goes, the context first."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _allocate(self) -> None:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        mode = self._trt.TensorIOMode.INPUT
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode]
        if len(inputs) != 1:
            raise TargetError(
                f"{self._source}: expected one input, got {', '.join(inputs) or 'none'}; "
                "export the network again"
            )
        self.input_name: str = inputs[0]
        self.output_names: tuple[str, ...] = tuple(name for name in names if name not in inputs)
        shape = tuple(engine.get_tensor_shape(self.input_name))
        self._dynamic = shape[0] == -1
        if self._dynamic:
            shape = tuple(engine.get_tensor_profile_shape(self.input_name, 0)[2])
        self.largest_batch: int = shape[0]
        self._shape(self.largest_batch, shape)
        self._input = self._tensor(self.input_name, shape)
        self._outputs = tuple(
            self._tensor(name, tuple(self._context.get_tensor_shape(name)))
            for name in self.output_names
        )

    def _tensor(self, name: str, shape: tuple[int, ...]) -> _Tensor:
        """Buffers for ``name``, which the context reads or writes from now on."""
        kind = str(self._engine.get_tensor_dtype(name).name)
        if kind not in DTYPES or shape[:1] != (self.largest_batch,) or min(shape) < 1:
            raise TargetError(
                f"{self._source}: expected '{name}' as [batch, ...] of fixed sizes in one of "
                f"{', '.join(DTYPES)}, got {kind} {list(shape)}; export the network again"
            )
        dtype = np.dtype(DTYPES[kind])
        size = prod(shape) * dtype.itemsize
        device = call(self._cuda, "cudaMalloc", size)
        self._resources.callback(call, self._cuda, "cudaFree", device)
        pinned = call(self._cuda, "cudaMallocHost", size)
        self._resources.callback(call, self._cuda, "cudaFreeHost", pinned)
        memory = (ctypes.c_byte * size).from_address(int(pinned))
        if not self._context.set_tensor_address(name, int(device)):
            raise TargetError(
                f"{self._source}: expected the engine to take a buffer for '{name}', it does not; "
                "delete the engine to have it built again"
            )
        host = np.frombuffer(memory, dtype=dtype).reshape(shape)
        return _Tensor(name=name, device=int(device), host=host)

    def _shape(self, count: int, shape: tuple[int, ...]) -> None:
        """Make the context ready for ``count`` inputs."""
        if self._dynamic and not self._context.set_input_shape(self.input_name, shape):
            raise TargetError(
                f"{self._source}: expected the engine to take inputs {list(shape)}, it does not; "
                "delete the engine to have it built again"
            )
        self._shaped_for = count

    def _run_piece(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        count = len(inputs) if self._dynamic else self.largest_batch
        self._input.host[: len(inputs)] = inputs
        self._launch(count)
        call(self._cuda, "cudaStreamSynchronize", self._stream)
        return {
            out.name: out.host[: len(inputs)].astype(np.float32, copy=True) for out in self._outputs
        }

    def _launch(self, count: int) -> None:
        """Run directly the first time that a size comes, and from its second time in a row on by
        a CUDA graph, captured then: TensorRT has set itself up for the size by that time."""
        if count != self._shaped_for:
            self._drop_graph()
            self._shape(count, (count, *self._input.host.shape[1:]))
            self._ran = False
        if self._ran and self._graph_works and self._graph is None:
            self._capture(count)
        if self._graph is not None:
            call(self._cuda, "cudaGraphLaunch", self._graph, self._stream)
        else:
            self._enqueue(count)
            self._ran = True

    def _enqueue(self, count: int) -> None:
        """Inputs to the GPU, the network, outputs back: all on the stream, in this order."""
        kinds = self._cuda.cudaMemcpyKind
        source = self._input
        self._copy(
            source.device,
            source.host.ctypes.data,
            source.bytes_of(count),
            kinds.cudaMemcpyHostToDevice,
        )
        if not self._context.execute_async_v3(int(self._stream)):
            said = "; ".join(list(logger_of(self._trt).messages)[-3:])
            raise TargetError(
                f"{self._source}: expected TensorRT to run the network, it does not; it said: "
                f"{said or 'nothing'}; start the program again"
            )
        for out in self._outputs:
            self._copy(
                out.host.ctypes.data, out.device, out.bytes_of(count), kinds.cudaMemcpyDeviceToHost
            )

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        call(self._cuda, "cudaMemcpyAsync", target, source, size, kind, self._stream)

    def _capture(self, count: int) -> None:
        """Capture what :meth:`_enqueue` does; where that fails, say so and go on without."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            call(self._cuda, "cudaStreamBeginCapture", self._stream, mode)
            try:
                self._enqueue(count)
            finally:  # a stream that is left in capture mode runs nothing any more
                ended = self._cuda.cudaStreamEndCapture(self._stream)
            recorded = checked(self._cuda, "cudaStreamEndCapture", ended)
            try:
                self._graph = call(self._cuda, "cudaGraphInstantiate", recorded, 0)
            finally:
                call(self._cuda, "cudaGraphDestroy", recorded)
        except TargetError as error:
            self._graph_works = False
            log.warning("%s: runs without a CUDA graph: %s", self._source, error)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            call(self._cuda, "cudaGraphExecDestroy", graph)
