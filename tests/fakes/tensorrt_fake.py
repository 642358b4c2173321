"""A ``tensorrt`` of a given version that has that version's symbols and no others.

``tensorrt_symbols.json`` tells which symbols the version has (see extract_symbols.py): anything
else raises AttributeError, as the real package does. It reads the real ONNX graph, gives layers
with the types that ONNX's inference finds, refuses what TensorRT refuses (asymmetric Q/DQ, unknown
operators), and runs a network by onnxruntime on the bytes at the addresses that it was given.

Names that begin with an underscore are the tests' own: ``_calls``, ``_fail_builds``.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_fake import FakeCuda, cudaError_t

TABLE = json.loads(Path(__file__).with_name("tensorrt_symbols.json").read_text(encoding="utf-8"))
VERSIONS: tuple[str, ...] = tuple(TABLE["versions"])
DTYPES = {
    "FLOAT": (1, np.float32),
    "HALF": (10, np.float16),
    "INT8": (3, np.int8),
    "UINT8": (2, np.uint8),
    "INT32": (6, np.int32),
    "INT64": (7, np.int64),
    "BOOL": (9, np.bool_),
}
"""ONNX's number and numpy's type of each TensorRT type."""

OPERATORS = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "MatMul": "MATRIX_MULTIPLY",
    "Gemm": "MATRIX_MULTIPLY",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "Cast": "CAST",
    "Relu": "ACTIVATION",
    "Flatten": "SHUFFLE",
    "GlobalAveragePool": "REDUCE",
    "ReduceMax": "REDUCE",
}


class Guarded:
    """Has the symbols of its version's class, and what begins with an underscore."""

    _symbols: dict[str, Any]
    _where: str

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self)._symbols:
            raise AttributeError(f"{type(self)._where} has no attribute '{name}'")
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in type(self)._symbols:
            raise AttributeError(f"{type(self)._where} has no attribute '{name}'")
        object.__setattr__(self, name, value)


class FakeTensorRt(types.ModuleType):
    """The package: classes and enumerations of one version."""

    def __init__(self, version: str, cuda: FakeCuda) -> None:
        super().__init__("tensorrt")
        column = VERSIONS.index(version)
        self.__version__ = version
        self._cuda = cuda
        self._calls: list[tuple[Any, ...]] = []
        self._fail_builds: list[list[str]] = []
        """What the next builds say before they fail; then builds work again."""
        self._kernel_failures = 0
        """So many of the next runs fail."""
        self._owners: dict[str, dict[str, Any]] = {}
        for symbol, row in TABLE["symbols"].items():
            owner, _, member = symbol.rpartition(".")
            if row[column] is not None:
                self._owners.setdefault(owner, {})[member] = row[column]
        for owner, members in self._owners.items():
            if all(isinstance(value, int) for value in members.values()):
                self._add(owner, IntEnum(owner.rpartition(".")[2], members))
        for implementation in IMPLEMENTATIONS:
            name = implementation.__name__
            symbols = self._owners[name]
            bound = {"_trt": self, "_symbols": symbols, "_where": f"{name} of TensorRT {version}"}
            self._add(name, type(name, (implementation,), bound))
        self.ILogger.Severity = self._severity

    def _add(self, path: str, value: Any) -> None:
        if path == "ILogger.Severity":
            self._severity = value
        else:
            setattr(self, path, value)

    def _has(self, owner: str, member: str) -> bool:
        return member in self._owners.get(owner, {})


class ILogger(Guarded):
    _trt: Any

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)  # a user's subclass has members of its own

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class Builder(Guarded):
    _trt: Any

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self._trt.ILogger)
        assert logger._made, "pybind11 wants the base's __init__ called"
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        flag = self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = self._trt.INetworkDefinition()
        network._strong = bool(flags >> int(flag) & 1)
        self._trt._calls.append(("create_network", network._strong))
        return network

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        trt = self._trt
        flags = sorted(flag.name for flag in config._flags)
        trt._calls.append(("build", network._strong, flags, config._pools, config._profiles))
        if trt._fail_builds:
            for message in trt._fail_builds.pop(0):
                self._logger.log(trt.ILogger.Severity.ERROR, message)
            return None
        dynamic = any(-1 in tensor.shape for tensor in network._inputs)
        if dynamic and not config._profiles:
            self._logger.log(trt.ILogger.Severity.ERROR, "Network has dynamic inputs, no profile")
            return None
        config._cache._content += b"timed;"
        header = {
            "tensorrt": trt.__version__,
            "sm": trt._cuda.sm,
            "profile": config._profiles[0]._shapes if config._profiles else None,
        }
        return trt.IHostMemory(json.dumps(header).encode() + b"\0" + network._model)


class IBuilderConfig(Guarded):
    _trt: Any

    def __init__(self) -> None:
        self._flags = {self._trt.BuilderFlag.TF32}  # on by default
        self._pools: dict[str, int] = {}
        self._profiles: list[Any] = []
        self._cache = self._trt.ITimingCache(b"")

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self._trt.BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(self._trt.BuilderFlag(flag))

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[self._trt.MemoryPoolType(pool).name] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        sizes = [shape[0] for shapes in profile._shapes.values() for shape in shapes]
        if sizes != sorted(sizes):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return self._trt.ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._content and not cache._content.startswith(self._trt.__version__.encode()):
            return ignore_mismatch
        cache._content = cache._content or self._trt.__version__.encode() + b":"
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class IOptimizationProfile(Guarded):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]

    def __eq__(self, other: object) -> bool:
        return self._shapes == other

    __hash__ = None


class ITimingCache(Guarded):
    _trt: Any

    def __init__(self, content: bytes) -> None:
        self._content = bytes(content)

    def serialize(self) -> Any:
        return self._trt.IHostMemory(self._content)


class IHostMemory(Guarded):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content


class INetworkDefinition(Guarded):
    _trt: Any

    def __init__(self) -> None:
        self._strong = False
        self._layers: list[Any] = []
        self._inputs: list[Any] = []
        self._model = b""

    num_layers = property(lambda self: len(self._layers))
    num_inputs = property(lambda self: len(self._inputs))

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    def get_input(self, index: int) -> Any:
        return self._inputs[index]


class ILayer(Guarded):
    def __init__(self, name: str, type: Any, output: Any) -> None:
        self._name, self._type, self._output = name, type, output

    name = property(lambda self: self._name)
    type = property(lambda self: self._type)

    def get_output(self, index: int) -> Any:
        assert index == 0
        return self._output


class ITensor(Guarded):
    def __init__(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        self._name, self._shape, self._dtype = name, shape, dtype

    name = property(lambda self: self._name)
    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self._dtype)


class OnnxParser(Guarded):
    _trt: Any

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        import onnx

        try:
            loaded = onnx.load(model)
        except Exception as error:  # protobuf has exceptions of its own
            self._refuse(-1, "", "", f"Failed to parse the ONNX model: {error}")
            return False
        inferred = onnx.shape_inference.infer_shapes(loaded)
        constants = {
            item.name: onnx.numpy_helper.to_array(item) for item in loaded.graph.initializer
        }
        for index, node in enumerate(loaded.graph.node):
            if node.op_type not in OPERATORS:
                self._refuse(index, node.name, node.op_type, "No importer registered for op")
            elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
                zero = constants[node.input[2]]
                if zero.dtype != np.int8 or zero.any():
                    told = "Non-zero zero point is not supported"
                    self._refuse(index, node.name, node.op_type, told)
        if self._errors:
            return False
        self._fill(inferred)
        return True

    def _refuse(self, node: int, name: str, operator: str, told: str) -> None:
        self._errors.append(self._trt.ParserError(node, name, operator, told))

    def _fill(self, model: Any) -> None:
        trt, graph = self._trt, model.graph
        values = {info.name: info for info in [*graph.value_info, *graph.output, *graph.input]}
        numbers = {number: getattr(trt.DataType, name) for name, (number, _) in DTYPES.items()}

        def tensor(name: str) -> Any:
            kind = values[name].type.tensor_type
            shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
            dtype = numbers[kind.elem_type]
            if not self._network._strong and dtype == trt.DataType.HALF:
                dtype = trt.DataType.FLOAT  # weak typing: the builder chooses
            return trt.ITensor(name, shape, dtype)

        self._network._model = model.SerializeToString()
        self._network._inputs = [tensor(info.name) for info in graph.input]
        self._network._layers = [
            trt.ILayer(
                node.name,
                getattr(trt.LayerType, OPERATORS[node.op_type]),
                tensor(node.output[0]),
            )
            for node in graph.node
        ]


class ParserError(Guarded):
    def __init__(self, node: int, name: str, operator: str, told: str) -> None:
        self._node, self._name, self._operator, self._told = node, name, operator, told

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def desc(self) -> str:
        return self._told


class Runtime(Guarded):
    _trt: Any

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        header, _, model = serialized_engine.partition(b"\0")
        made = json.loads(header)
        error = self._trt.ILogger.Severity.ERROR
        if made["tensorrt"] != self._trt.__version__:
            self._logger.log(error, "Serialization assertion failed. Version tag does not match")
            return None
        if made["sm"] != self._trt._cuda.sm:
            self._logger.log(error, "engine plan file is generated on an incompatible device")
            return None
        return self._trt.ICudaEngine(made["profile"], model)


class ICudaEngine(Guarded):
    _trt: Any

    def __init__(self, profile: Any, model: bytes) -> None:
        import onnxruntime

        self._profile = profile
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = {value.name: value for value in self._session.get_outputs()}
        self._tensors = {**self._inputs, **self._outputs}

    num_io_tensors = property(lambda self: len(self._tensors))

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._trt.TensorIOMode
        return mode.INPUT if name in self._inputs else mode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
        return getattr(self._trt.DataType, kinds[self._tensors[name].type])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        assert profile_index == 0
        return [tuple(shape) for shape in self._profile[name]]

    def create_execution_context(self) -> Any:
        return self._trt.IExecutionContext(self)


class IExecutionContext(Guarded):
    _trt: Any

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._pending = True
        """A shape was set, and TensorRT sets itself up for it in the next run, uncaptured."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine._profile[name]
        fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            self._shape[name] = tuple(shape)
            self._pending = True
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine._inputs:
            return self._shape.get(name, self._engine.get_tensor_shape(name))
        (given,) = self._shape.values() or [(1,)]
        first, *rest = self._engine.get_tensor_shape(name)
        return (given[0] if first == -1 else first, *rest)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine._tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt = self._trt
        if trt._kernel_failures:
            trt._kernel_failures -= 1
            return False
        if self._pending and trt._cuda.streams.get(stream_handle) is not None:
            return False
        self._pending = False
        shapes = {name: self.get_tensor_shape(name) for name in self._engine._tensors}
        work = self._work(shapes)
        return trt._cuda.submit(stream_handle, work) == cudaError_t.cudaSuccess

    def _work(self, shapes: dict[str, tuple[int, ...]]) -> Callable[[], cudaError_t]:
        """The network on the bytes of the device at the addresses of now, in these shapes."""
        engine, cuda = self._engine, self._trt._cuda
        dtypes = {name: np.dtype(DTYPES[engine.get_tensor_dtype(name).name][1]) for name in shapes}
        addresses = dict(self._addresses)

        def view(name: str) -> Any:
            size = int(np.prod(shapes[name])) * dtypes[name].itemsize
            memory = cuda.bytes_at(addresses[name], size, cuda.device)
            if memory is None:
                return None
            return np.frombuffer(memory, dtype=dtypes[name]).reshape(shapes[name])

        def run() -> cudaError_t:
            views = {name: view(name) for name in shapes}
            if any(each is None for each in views.values()):
                return cudaError_t.cudaErrorLaunchFailure
            names = list(engine._outputs)
            given = {name: views[name].copy() for name in engine._inputs}
            for name, answer in zip(names, engine._session.run(names, given), strict=True):
                views[name][...] = answer
            return cudaError_t.cudaSuccess

        return run


IMPLEMENTATIONS = (
    ILogger,
    Builder,
    IBuilderConfig,
    IOptimizationProfile,
    ITimingCache,
    IHostMemory,
    INetworkDefinition,
    ILayer,
    ITensor,
    OnnxParser,
    ParserError,
    Runtime,
    ICudaEngine,
    IExecutionContext,
)


def install(monkeypatch: pytest.MonkeyPatch, version: str, cuda: FakeCuda) -> FakeTensorRt:
    """Until the test ends, ``import tensorrt`` gives this version."""
    package = FakeTensorRt(version, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    return package
