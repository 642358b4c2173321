"""Check a graph meant for TensorRT on a machine without a GPU, by TensorRT-RTX.

TensorRT-RTX is another product: it checks parsing, typing and the 11-style interface, not a
Jetson's kernels nor speed. This check has run on a PC without a GPU; it says nothing of a run on
NVIDIA hardware.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from greenprune.errors import MissingPackageError, TargetError
from greenprune_targets import tensorrt_engine as engine


def parse(graph: Path, precision: str | None = None) -> dict[str, str]:
    """Parse and build ``graph`` strongly typed; the type that each convolution gives, by layer.

    Types are named as TensorRT does: ``FLOAT``, ``HALF``. Where there is no convolution, the
    matrix products are told. With a ``precision`` (``fp32``, ``fp16``, ``int8``) the types must be
    that precision's.

    Raises:
        MissingPackageError: tensorrt-rtx is not installed.
        TargetError: TensorRT would refuse the graph (the node is named), or it is in another
            precision.
    """
    try:
        trt = import_module("tensorrt_rtx")
    except ImportError as error:
        raise MissingPackageError("tensorrt-rtx", "check") from error
    parsed = engine.parse_graph(trt, graph)
    types = engine.layer_types(trt, parsed.network)
    if precision is not None:
        engine.check_types(trt, graph, precision, parsed.network, types)
    _build(trt, parsed, graph)
    return types


def _build(trt: Any, parsed: engine.Parsed, graph: Path) -> None:
    config = parsed.builder.create_builder_config()
    engine.add_profile(parsed, config, graph, batch=1)
    logger = engine.logger_of(trt)
    logger.messages.clear()
    if parsed.builder.build_serialized_network(parsed.network, config) is None:
        said = "; ".join(list(logger.messages)[-3:]) or "nothing"
        raise TargetError(
            f"{graph}: expected a graph that {engine.product(trt)} builds, it does not; "
            f"it said: {said}; change or export the graph again"
        )
