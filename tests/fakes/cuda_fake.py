"""A CUDA runtime as cuda-python shows it, with memory that is real.

Addresses are those of numpy arrays: a copy copies, and a copy that reads or writes outside of what
was allocated, or on the wrong side, fails as it should. While a stream captures, work is recorded
and runs at each launch of the graph. A test makes functions fail by :attr:`FakeCuda.failures`.
"""

# ruff: noqa: N801, N802, N803, N815 (the names are CUDA's)
from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


Work = Callable[[], cudaError_t]


class FakeCuda(types.ModuleType):
    """Stands for ``cuda.bindings.runtime``."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode

    def __init__(self, *, gpu: str = "Orin", sm: str = "8.7", integrated: bool = True) -> None:
        super().__init__("cuda.bindings.runtime")
        self.gpu, self.sm, self.integrated = gpu, sm, integrated
        self.free = 4 * 2**30
        self.failures: dict[str, list[cudaError_t]] = {}
        """Answers of the next calls of a function, in order; then it works again."""
        self.calls: Counter[str] = Counter()
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Work] | None] = {}
        """Work that was recorded, of a stream that captures; None of one that does not."""
        self.graphs: dict[int, list[Work]] = {}
        self.launched: dict[int, list[Work]] = {}
        self._numbers = itertools.count(0x1000)
        self._inside = threading.Lock()

    def live(self) -> int:
        """What was allocated or made, and is not given back."""
        parts = (self.device, self.pinned, self.streams, self.graphs, self.launched)
        return sum(len(part) for part in parts)

    def submit(self, stream: int, work: Work) -> cudaError_t:
        """Run ``work`` on the stream, or record it while the stream captures."""
        if stream not in self.streams:
            return cudaError_t.cudaErrorInvalidValue
        recorded = self.streams[stream]
        if recorded is None:
            # one piece of work at a time: two at once would mean that a lock is missing
            assert self._inside.acquire(blocking=False), "two threads use one stream"
            try:
                return work()
            finally:
                self._inside.release()
        recorded.append(work)
        return cudaError_t.cudaSuccess

    def bytes_at(self, address: int, size: int, side: dict[int, np.ndarray]) -> Any:
        """The memory at ``address``, or None where ``side`` has not that much there."""
        for start, block in side.items():
            if start <= address and address + size <= start + block.nbytes:
                return (ctypes.c_byte * size).from_address(address)
        return None

    def _failure(self, function: str) -> cudaError_t:
        self.calls[function] += 1
        planned = self.failures.get(function, [])
        return planned.pop(0) if planned else cudaError_t.cudaSuccess

    def _allocate(self, function: str, side: dict[int, np.ndarray], size: int) -> tuple[Any, ...]:
        if code := self._failure(function):
            return code, None
        block = np.full(size, 0x7F, dtype=np.uint8)  # memory is not zero when it is given
        side[block.ctypes.data] = block
        return cudaError_t.cudaSuccess, block.ctypes.data

    def _release(self, function: str, part: dict[int, Any], key: Any) -> tuple[cudaError_t]:
        if code := self._failure(function):
            return (code,)
        if part.pop(int(key), part) is part:
            return (cudaError_t.cudaErrorInvalidValue,)
        return (cudaError_t.cudaSuccess,)

    def cudaGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, cudaError_t(error).name.encode()

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, b"described"

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return self._failure("cudaGetDevice"), 0

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = map(int, self.sm.split("."))
        name = self.gpu.encode() + b"\0\0"
        return cudaError_t.cudaSuccess, SimpleNamespace(
            name=name, major=major, minor=minor, integrated=int(self.integrated)
        )

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._failure("cudaMemGetInfo"), self.free, 8 * 2**30

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate("cudaMalloc", self.device, size)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._allocate("cudaMallocHost", self.pinned, size)

    def cudaFree(self, devPtr: int) -> tuple[cudaError_t]:
        return self._release("cudaFree", self.device, devPtr)

    def cudaFreeHost(self, ptr: int) -> tuple[cudaError_t]:
        return self._release("cudaFreeHost", self.pinned, ptr)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        if code := self._failure("cudaStreamCreate"):
            return code, None
        stream = next(self._numbers)
        self.streams[stream] = None
        return cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[cudaError_t]:
        return self._release("cudaStreamDestroy", self.streams, stream)

    def cudaStreamSynchronize(self, stream: int) -> tuple[cudaError_t]:
        return (self._failure("cudaStreamSynchronize"),)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Any, stream: int
    ) -> tuple[cudaError_t]:
        if code := self._failure("cudaMemcpyAsync"):
            return (code,)
        to_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        into, out_of = (self.device, self.pinned) if to_device else (self.pinned, self.device)
        if self.bytes_at(dst, count, into) is None or self.bytes_at(src, count, out_of) is None:
            return (cudaError_t.cudaErrorInvalidValue,)

        def copy() -> cudaError_t:
            ctypes.memmove(dst, src, count)
            return cudaError_t.cudaSuccess

        return (self.submit(int(stream), copy),)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[cudaError_t]:
        if code := self._failure("cudaStreamBeginCapture"):
            return (code,)
        self.streams[int(stream)] = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        recorded, self.streams[int(stream)] = self.streams[int(stream)], None
        if code := self._failure("cudaStreamEndCapture"):
            return code, None
        assert recorded is not None
        graph = next(self._numbers)
        self.graphs[graph] = recorded
        return cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        if code := self._failure("cudaGraphInstantiate"):
            return code, None
        ready = next(self._numbers)
        self.launched[ready] = list(self.graphs[graph])
        return cudaError_t.cudaSuccess, ready

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[cudaError_t]:
        if code := self._failure("cudaGraphLaunch"):
            return (code,)
        codes = [self.submit(int(stream), work) for work in self.launched[graphExec]]
        return (max(codes),)

    def cudaGraphDestroy(self, graph: int) -> tuple[cudaError_t]:
        return self._release("cudaGraphDestroy", self.graphs, graph)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[cudaError_t]:
        return self._release("cudaGraphExecDestroy", self.launched, graphExec)


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    """Until the test ends, ``cuda`` is cuda-python's runtime."""
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return cuda
