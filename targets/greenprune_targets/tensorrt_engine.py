"""TensorRT 10.3 to 11.x: from an ONNX graph to an engine, by one strongly typed path.

The graph carries its precision (float32, float16 tensors, or explicit Q/DQ with float16 around);
no precision flag is set. The deep learning accelerator (DLA) is not used. Engines are kept by
:mod:`greenprune_targets.tensorrt_cache`.

Tested with a fake ``tensorrt`` made from the symbols of four real versions, and with
TensorRT-RTX's parser and builder; it has not run on NVIDIA hardware.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from greenprune.errors import MissingPackageError, TargetError
from greenprune_targets.cuda_runtime import extra

log = logging.getLogger(__name__)

OLDEST = (10, 3)
STRONG_INT8 = (10, 12)
"""Strong typing is called fully available from here on; older versions get one fallback in int8."""

OUTPUT_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "HALF"}
"""Type that convolutions give by precision. Layers that int8 leaves out run in the graph's own
type, so an int8 graph needs float16 around, or it is slower than fp16."""

WORKSPACE_SHARE = 0.5
"""Part of the free memory that tactics may take; weights and activations need the rest."""

OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|insufficient (device )?memory|memory is insufficient"
    r"|could not be allocated|memoryallocation|cuda error 2\b|failed to allocate",
    re.IGNORECASE,
)
NO_IMPLEMENTATION = "Could not find any implementation"


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine and what it was built with."""

    engine: bytes
    typing: str
    """``strong``, or ``weak`` where int8 needed the fallback of versions below 10.12."""
    workspace_bytes: int
    layer_types: dict[str, str]
    """Output type of each convolution, by layer, as parsed with strong typing."""
    timing_cache: bytes


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A network and what must live as long as it: the parser holds its weights."""

    builder: Any
    network: Any
    parser: Any


class BuildError(TargetError):
    """The builder gave no engine."""

    out_of_memory = False


def tensorrt(root: Path = Path("/")) -> Any:
    """The ``tensorrt`` package.

    Raises:
        MissingPackageError: it is not installed.
        TargetError: it is older than 10.3.
    """
    try:
        package = import_module("tensorrt")
    except ImportError as error:
        missing = MissingPackageError("tensorrt", extra(root))
        if missing.extra == "jetson":
            missing.args = (
                f"{missing} in a venv made with --system-site-packages: TensorRT comes with "
                "JetPack (sudo apt install python3-libnvinfer)",
            )
        raise missing from error
    if version_of(package) < OLDEST:
        raise TargetError(
            f"expected TensorRT 10.3 or later, got {package.__version__}; "
            "install a newer one (on a Jetson: JetPack 6.1 or later)"
        )
    return package


def version_of(trt: Any) -> tuple[int, ...]:
    """Major and minor version of the package."""
    return tuple(int(part) for part in trt.__version__.split(".")[:2])


def product(trt: Any) -> str:
    """Name and version of the package, for messages."""
    return f"TensorRT{'-RTX' if trt.__name__ == 'tensorrt_rtx' else ''} {trt.__version__}"


def build(
    trt: Any, graph: Path, precision: str, *, batch: int, free_bytes: int, timing_cache: bytes = b""
) -> Built:
    """Build an engine that takes 1 to ``batch`` inputs at once.

    Args:
        trt: the ``tensorrt`` package.
        graph: ONNX that carries its precision.
        precision: ``fp32``, ``fp16`` or ``int8``; checked against the types that the parser gives.
        free_bytes: memory that is free now; half of it is the workspace's limit.
        timing_cache: what an earlier build on this device measured.

    Raises:
        TargetError: the graph is refused, its convolutions are of another type than
            ``precision`` means, or no engine comes out. Never built in another precision instead.
    """
    parsed = parse_graph(trt, graph)
    types = layer_types(trt, parsed.network)
    check_types(trt, graph, precision, parsed.network, types)
    settings = _Settings(
        graph=graph,
        precision=precision,
        batch=batch,
        free_bytes=free_bytes,
        timing_cache=timing_cache,
    )
    typing = "strong"
    try:
        engine, timings = _serialize(trt, parsed, settings, weak=False)
    except BuildError as error:
        older = version_of(trt) < STRONG_INT8
        if precision != "int8" or not older or error.out_of_memory:
            raise
        log.warning(
            "%s: TensorRT %s does not build int8 strongly typed (%s); building the same graph "
            "weakly typed with the flags FP16 and INT8",
            graph,
            trt.__version__,
            error,
        )
        typing = "weak"
        engine, timings = _serialize(
            trt, parse_graph(trt, graph, strong=False), settings, weak=True
        )
    return Built(
        engine=engine,
        typing=typing,
        workspace_bytes=settings.workspace_bytes,
        layer_types=types,
        timing_cache=timings,
    )


def parse_graph(trt: Any, graph: Path, *, strong: bool = True) -> Parsed:
    """Parse an ONNX file into a network (``trt`` may be TensorRT or TensorRT-RTX).

    Raises:
        TargetError: the file is missing or refused; the nodes that the parser complains of are
            named.
    """
    if not graph.is_file():
        raise TargetError(f"{graph}: expected an ONNX file, found none; export it again")
    logger = logger_of(trt)
    logger.messages.clear()
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        raise TargetError(
            f"{product(trt)} gives no builder: {_told(logger) or error}; "
            "check the driver and its CUDA version"
        ) from error
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strong else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise TargetError(
            f"{graph}: expected a graph that {product(trt)} accepts; it refuses "
            f"{'; '.join(errors) or _told(logger) or 'without saying why'}; "
            "export it again for this target"
        )
    return Parsed(builder=builder, network=network, parser=parser)


def _parser_error(error: Any) -> str:
    return f"node {error.node()} '{error.node_name()}' ({error.node_operator()}): {error.desc()}"


def layer_types(trt: Any, network: Any) -> dict[str, str]:
    """Name of the output type of each convolution, by layer; of each matrix product where the
    network has no convolution."""
    convolutions = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for kinds in (convolutions, (trt.LayerType.MATRIX_MULTIPLY,)):
        found: dict[str, str] = {}
        for index, layer in enumerate(layers):
            if layer.type in kinds:
                name = layer.name if layer.name not in found else f"{layer.name} (layer {index})"
                found[name] = str(layer.get_output(0).dtype.name)
        if found:
            return found
    return {}


def check_types(trt: Any, graph: Path, precision: str, network: Any, types: dict[str, str]) -> None:
    """Raises TargetError: the network is not in ``precision`` as parsed.

    A precision that is asked for and not in the graph would be measured as something else
    (rf-detr#1453: an engine called fp16 that ran in fp32).
    """
    if precision not in OUTPUT_TYPES:
        raise TargetError(
            f"expected a precision of {', '.join(OUTPUT_TYPES)}, got '{precision}'; choose one"
        )
    expected = OUTPUT_TYPES[precision]
    wrong = [f"{name} ({kind})" for name, kind in types.items() if kind != expected]
    if wrong or not types:
        raise TargetError(
            f"{graph}: expected convolutions that give {expected} for {precision}"
            f"{' (Q/DQ with float16 around)' if precision == 'int8' else ''}, got "
            f"{', '.join(wrong[:5]) or 'none at all'}{' ...' if len(wrong) > 5 else ''}; "
            "export the graph again in that precision"
        )
    kinds = {network.get_layer(index).type for index in range(network.num_layers)}
    quantized = {trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE} <= kinds
    if quantized != (precision == "int8"):
        raise TargetError(
            f"{graph}: expected {'explicit' if precision == 'int8' else 'no'} Q/DQ layers for "
            f"{precision}, got {'some' if quantized else 'none'}; "
            "export the graph again in that precision"
        )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    graph: Path
    precision: str
    batch: int
    free_bytes: int
    timing_cache: bytes

    @property
    def workspace_bytes(self) -> int:
        return int(self.free_bytes * WORKSPACE_SHARE)


def _serialize(trt: Any, parsed: Parsed, settings: _Settings, *, weak: bool) -> tuple[bytes, bytes]:
    """The engine and the timing cache after it."""
    config = parsed.builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if weak:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.INT8)
    add_profile(parsed, config, settings.graph, settings.batch)
    _set_timing_cache(config, settings.timing_cache)
    logger = logger_of(trt)
    logger.messages.clear()
    try:
        plan = parsed.builder.build_serialized_network(parsed.network, config)
    except (MemoryError, RuntimeError) as error:
        raise _build_error(trt, settings, f"{type(error).__name__}: {error}") from error
    if plan is None:
        raise _build_error(trt, settings, "")
    timings = config.get_timing_cache()
    return bytes(plan), bytes(timings.serialize()) if timings is not None else b""


def add_profile(parsed: Parsed, config: Any, graph: Path, batch: int) -> None:
    """One optimisation profile for a dynamic batch: 1 to ``batch``, fastest at ``batch``.

    Raises:
        TargetError: another dimension is dynamic, or the batch is fixed and not 1.
    """
    profile = None
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        shape = tuple(tensor.shape)
        first, rest = shape[0], shape[1:]
        if first not in (-1, 1) or any(size < 0 for size in rest):
            raise TargetError(
                f"{graph}: expected input '{tensor.name}' with a dynamic batch (or 1) and fixed "
                f"sizes after it, got {list(shape)}; export it with fixed channels, height, width"
            )
        if first == -1:
            profile = profile or parsed.builder.create_optimization_profile()
            profile.set_shape(tensor.name, (1, *rest), (batch, *rest), (batch, *rest))
    if profile is not None and config.add_optimization_profile(profile) < 0:
        raise TargetError(
            f"{graph}: expected TensorRT to take a batch of 1 to {batch}, it refuses the profile; "
            "choose another batch"
        )


def _set_timing_cache(config: Any, content: bytes) -> None:
    """A cache that does not fit is named and left alone; the build then times every tactic."""
    if not config.set_timing_cache(config.create_timing_cache(content), False):
        log.warning("the timing cache is of another device or version: building without it")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _build_error(trt: Any, settings: _Settings, raised: str) -> BuildError:
    told = "; ".join(part for part in (raised, _told(logger_of(trt))) if part)
    memory = f"{settings.free_bytes / 2**20:.0f} MiB were free when it began"
    if OUT_OF_MEMORY.search(told) or raised.startswith("MemoryError"):
        reason = f"out of memory ({memory}); close other programs or choose a smaller batch"
    elif NO_IMPLEMENTATION in told:
        reason = (
            f"a layer has no kernel here, or too little memory for one ({memory}); "
            "close other programs and try again, or use another precision"
        )
    else:
        reason = "the builder failed; use another precision or another TensorRT"
    error = BuildError(
        f"{settings.graph}: expected a {settings.precision} engine from TensorRT "
        f"{trt.__version__}, got none: {reason}; it said: {told or 'nothing'}"
    )
    error.out_of_memory = reason.startswith("out of memory")
    return error


@cache
def logger_of(trt: Any) -> Any:
    """The process's logger for ``trt``: TensorRT keeps the first that it is given.

    ``messages`` holds the last warnings and errors, oldest first.
    """
    noted = int(trt.ILogger.Severity.WARNING)

    def begin(self: Any) -> None:
        trt.ILogger.__init__(self)
        self.messages = deque(maxlen=100)

    def note(self: Any, severity: Any, message: str) -> None:
        if int(severity) <= noted:
            self.messages.append(message)
            log.debug("%s", message)

    return type("Messages", (trt.ILogger,), {"__init__": begin, "log": note})()


def _told(logger: Any) -> str:
    """The last words of the logger that tell a cause; memory first, since it is often masked."""
    messages = list(dict.fromkeys(logger.messages))
    causes = [message for message in messages if OUT_OF_MEMORY.search(message)]
    return "; ".join(dict.fromkeys([*causes[:1], *messages[-3:]]))
