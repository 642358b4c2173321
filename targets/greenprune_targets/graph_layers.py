"""The convolutions and matrix products of an ONNX graph, as shapes for the simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenprune.errors import MissingPackageError, TargetError
from greenprune_targets.base import refusal
from greenprune_targets.row_stationary import LayerShape

if TYPE_CHECKING:
    import onnx

RECURRENT = ("LSTM", "GRU", "RNN")
NOT_MAPPED = (
    "Attention",
    "ConvInteger",
    "DeformConv",
    "Einsum",
    "If",
    "Loop",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "Scan",
)
"""Standard operations that multiply, or hold a graph that may, and have no mapping here."""


class NotMapped(Exception):  # noqa: N818 (a verdict on one layer, caught here)
    """Why a node has no shape for the simulation."""


@dataclass(frozen=True, kw_only=True)
class GraphLayer:
    """A node's product of input and weights, ``repeats`` times one after the other."""

    name: str
    operation: str
    shape: LayerShape
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class GraphLayers:
    """What a graph multiplies; ``not_mapped`` has the reason by node."""

    layers: tuple[GraphLayer, ...]
    not_mapped: dict[str, str]


def read_layers(graph: Path, batch: int) -> GraphLayers:
    """Every convolution and matrix product of an ONNX graph.

    A grouped convolution is one smaller convolution for each group (a depthwise one, one of 1 to 1
    channels for each channel); a transposed convolution of stride s is a convolution of stride 1
    with s x s as many outputs, interleaved; a recurrent layer is one product for its inputs of all
    steps and one for its state at each step. Additions, activations, pooling and normalisation are
    left out.

    Args:
        graph: the ``.onnx`` file.
        batch: set as the first dimension of every input of the graph.

    Raises:
        MissingPackageError: onnx is not installed.
        TargetError: the file is no valid ONNX graph, or not one for this batch.
    """
    if batch < 1:
        raise TargetError(f"{graph}: expected a batch of at least 1, got {batch}")
    model = _load(graph, batch)
    shapes = _shapes(model)

    def shape_of(name: str) -> tuple[int, ...]:
        shape = shapes.get(name)
        if shape is None:
            raise NotMapped(f"the shape of '{name}' does not follow from the input's")
        return shape

    layers: list[GraphLayer] = []
    not_mapped: dict[str, str] = {}
    for node in model.graph.node:
        name = node.name or next(iter(node.output), node.op_type)
        try:
            layers += _products(node, name, shape_of)
        except NotMapped as reason:
            not_mapped[name] = f"{node.op_type}: {reason}"
    return GraphLayers(layers=tuple(layers), not_mapped=not_mapped)


def _load(graph: Path, batch: int) -> onnx.ModelProto:
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise MissingPackageError("onnx", "eyeriss") from error

    if not graph.is_file():
        raise TargetError(f"{graph}: expected an ONNX graph; there is no such file")
    with refusal(graph, "onnx"):
        model = onnx.inliner.inline_local_functions(onnx.load(graph))
        onnx.checker.check_model(model)
        _fix_batch(model, graph, batch)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def _fix_batch(model: onnx.ModelProto, graph: Path, batch: int) -> None:
    """Give the inputs their batch, and every tensor whose shape names it."""
    inside = model.graph
    weights = {weight.name for weight in inside.initializer}
    symbols = set()
    for value in inside.input:
        dimensions = value.type.tensor_type.shape.dim
        if value.name in weights or not dimensions:
            continue
        fixed = dimensions[0].dim_value
        if fixed not in (0, batch):
            raise TargetError(
                f"{graph}: input '{value.name}' has a fixed batch of {fixed}, asked for is "
                f"{batch}; export the graph with a free batch"
            )
        symbols.add(dimensions[0].dim_param)
        dimensions[0].dim_value = batch
    for value in (*inside.value_info, *inside.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in symbols - {""}:
                dimension.dim_value = batch


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that are known to the last dimension."""
    inside = model.graph
    shapes = {weight.name: tuple(weight.dims) for weight in inside.initializer}
    for value in (*inside.input, *inside.value_info, *inside.output):
        tensor = value.type.tensor_type
        sizes = tuple(dimension.dim_value for dimension in tensor.shape.dim)
        if tensor.HasField("shape") and all(sizes):
            shapes.setdefault(value.name, sizes)
    return shapes


Shapes = Callable[[str], tuple[int, ...]]


def _products(node: onnx.NodeProto, name: str, shape_of: Shapes) -> list[GraphLayer]:
    """The layers of one node, [] where it multiplies nothing."""
    from onnx.helper import get_attribute_value

    if node.domain not in ("", "ai.onnx"):
        raise NotMapped(f"an operation of the domain '{node.domain}', which is not known here")
    if node.op_type in NOT_MAPPED:
        raise NotMapped(
            "no mapping for this operation; expected Conv, ConvTranspose, Gemm, "
            "MatMul, LSTM, GRU or RNN"
        )
    attributes = {item.name: get_attribute_value(item) for item in node.attribute}
    if node.op_type in RECURRENT:
        return _recurrent(node, name, attributes, shape_of)
    readers = {
        "Conv": _convolution,
        "ConvTranspose": _transposed,
        "Gemm": _gemm,
        "MatMul": _matmul,
    }
    if node.op_type not in readers:
        return []
    shape, repeats = readers[node.op_type](node, attributes, shape_of)
    return [GraphLayer(name=name, operation=node.op_type, shape=shape, repeats=repeats)]


def _convolution(
    node: onnx.NodeProto, attributes: dict[str, Any], shape_of: Shapes
) -> tuple[LayerShape, int]:
    batch, _, *_ = shape_of(node.input[0])
    outputs, inputs, *kernel = shape_of(node.input[1])
    groups = attributes.get("group", 1)
    size = _pair(kernel)
    _refuse_dilation(attributes, kernel)
    return LayerShape(
        in_channels=inputs,
        out_channels=outputs // groups,
        output=_pair(shape_of(node.output[0])[2:]),
        filter=size,
        stride=_pair(attributes.get("strides", [1] * len(kernel))),
        batch=batch,
    ), groups


def _transposed(
    node: onnx.NodeProto, attributes: dict[str, Any], shape_of: Shapes
) -> tuple[LayerShape, int]:
    """Each output pixel meets ``kernel / stride`` weights; pixels of one phase meet the same."""
    batch, channels, *_ = shape_of(node.input[0])
    _, outputs, *kernel = shape_of(node.input[1])
    groups = attributes.get("group", 1)
    size, stride = _pair(kernel), _pair(attributes.get("strides", [1] * len(kernel)))
    _refuse_dilation(attributes, kernel)
    if any(length % step for length, step in zip(size, stride, strict=True)):
        raise NotMapped(f"a filter of {size} is not a multiple of its stride {stride}")
    height, width = _pair(shape_of(node.output[0])[2:])
    return LayerShape(
        in_channels=channels // groups,
        out_channels=outputs * math.prod(stride),
        output=(-(-height // stride[0]), -(-width // stride[1])),
        filter=(size[0] // stride[0], size[1] // stride[1]),
        batch=batch,
    ), groups


def _gemm(
    node: onnx.NodeProto, attributes: dict[str, Any], shape_of: Shapes
) -> tuple[LayerShape, int]:
    left, right = shape_of(node.input[0]), shape_of(node.input[1])
    rows, inner = reversed(left) if attributes.get("transA") else left
    outputs = right[0] if attributes.get("transB") else right[1]
    return LayerShape(in_channels=inner, out_channels=outputs, batch=rows), 1


def _matmul(
    node: onnx.NodeProto, attributes: dict[str, Any], shape_of: Shapes
) -> tuple[LayerShape, int]:
    """The matrix of two dimensions is the weights; where neither is, one product a pair."""
    left, right = shape_of(node.input[0]), shape_of(node.input[1])
    left = left if len(left) > 1 else (1, *left)
    right = right if len(right) > 1 else (*right, 1)
    inner, outputs = right[-2:]
    if len(right) == 2:
        return LayerShape(in_channels=inner, out_channels=outputs, batch=math.prod(left[:-1])), 1
    if len(left) == 2:
        columns = math.prod(right[:-2]) * outputs
        return LayerShape(in_channels=inner, out_channels=left[0], batch=columns), 1
    pairs = math.prod(shape_of(node.output[0])) // (left[-2] * outputs)
    return LayerShape(in_channels=inner, out_channels=outputs, batch=left[-2]), pairs


def _recurrent(
    node: onnx.NodeProto, name: str, attributes: dict[str, Any], shape_of: Shapes
) -> list[GraphLayer]:
    """Inputs of all steps at once; the state's product waits for the step before."""
    steps, batch, inputs = shape_of(node.input[0])
    if attributes.get("layout", 0):
        steps, batch = batch, steps
    directions, outputs, hidden = shape_of(node.input[2])
    parts = (
        ("input", LayerShape(in_channels=inputs, out_channels=outputs, batch=steps * batch), 1),
        ("state", LayerShape(in_channels=hidden, out_channels=outputs, batch=batch), steps),
    )
    return [
        GraphLayer(
            name=f"{name}/{part}",
            operation=node.op_type,
            shape=shape,
            repeats=directions * repeats,
        )
        for part, shape, repeats in parts
    ]


def _pair(sizes: Any) -> tuple[int, int]:
    """Height and width; one dimension is a single row."""
    if not 1 <= len(sizes) <= 2:
        raise NotMapped(f"{len(sizes)} spatial dimensions; expected 1 or 2")
    height, width = (1, *sizes)[-2:]
    return int(height), int(width)


def _refuse_dilation(attributes: dict[str, Any], kernel: list[int]) -> None:
    dilations = attributes.get("dilations", [1] * len(kernel))
    if any(step > 1 and size > 1 for step, size in zip(dilations, kernel, strict=True)):
        raise NotMapped(f"dilation {list(dilations)}; expected 1")
