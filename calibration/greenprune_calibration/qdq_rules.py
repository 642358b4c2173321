"""What a strongly typed TensorRT build asks of a graph, checked without TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from greenprune_calibration import graphs
from greenprune_calibration.graphs import LAYERS

if TYPE_CHECKING:
    import onnx

OPSETS = (19, 20)
"""fp16 scales are valid from 19 on; the parser of TensorRT 10.0 and 10.1 ends at 20."""


def refuse_opset(model: onnx.ModelProto, graph: Path) -> None:
    """Raises ValueError where the graph's opset is not one of :data:`OPSETS`."""
    found = graphs.opset(model)
    if found not in OPSETS:
        raise ValueError(
            f"{graph}: expected opset {OPSETS[0]} or {OPSETS[1]} for TensorRT, got {found}; export "
            f"the network with opset {OPSETS[1]}"
        )


def check_tensorrt(graph: Path) -> dict[str, str]:
    """Check the rules for precision written into a graph; TensorRT has the last word on the device.

    Standard operations of opset 19 or 20; types and shapes that agree; every dimension but the
    batch fixed; Q and DQ of int8 with constant, positive scales and a constant zero point 0; no
    quantised bias; no rounding between a layer and its activation function.

    Args:
        graph: the ``.onnx`` file.

    Returns:
        By name of each convolution and linear layer the type that it computes in: ``int8`` where
        its input and its weights are rounded to it, else ``fp16`` or ``fp32``.

    Raises:
        ValueError: a rule is broken; the node is named.
    """
    return checked_types(graphs.load(graph), graph)


def checked_types(model: onnx.ModelProto, graph: Path) -> dict[str, str]:
    """:func:`check_tensorrt` of a graph in memory; ``graph`` is what messages call it."""
    import onnx

    refuse_opset(model, graph)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ValueError(
                f"{graph}: node '{node.name}': expected standard ONNX operations, got "
                f"{node.op_type} of the domain '{node.domain}'; write it with standard ones"
            )
    _refuse_free_shapes(model, graph)
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:  # onnx's checker's and shape inference's have no common base
        raise ValueError(
            f"{graph}: expected a graph whose types and shapes agree, got: {error}"
        ) from error
    makers, constants = graphs.producers(model), _constants(model)
    for node in model.graph.node:
        problem = _rounding_problem(node, makers, constants)
        if problem:
            raise ValueError(f"{graph}: {node.op_type} '{node.name}': {problem}")
    types = _element_types(inferred)
    return {
        node.name: _computes_in(node, makers, types)
        for node in model.graph.node
        if node.op_type in LAYERS
    }


def _refuse_free_shapes(model: onnx.ModelProto, graph: Path) -> None:
    weights = {each.name for each in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output):
        _, *rest = value.type.tensor_type.shape.dim or [None]
        free = [each.dim_param or "?" for each in rest if each and not each.dim_value]
        if value.name not in weights and free:
            raise ValueError(
                f"{graph}: '{value.name}': expected every dimension but the batch to be fixed, got "
                f"free ones ({', '.join(free)}); export with a fixed image size"
            )


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    found = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], each.t) for each in node.attribute if each.HasField("t"))
    return {name: numpy_helper.to_array(each) for name, each in found.items()}


def _rounding_problem(
    node: onnx.NodeProto,
    makers: dict[str, onnx.NodeProto],
    constants: dict[str, np.ndarray],
) -> str | None:
    """What a node does against the rules of rounding."""
    if node.op_type in ("Relu", "Clip"):
        return _between_layer_and_activation(node, makers)
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    quantised = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    if quantised is not None and quantised.dtype == np.int32:
        return f"expected a float bias, got '{node.input[0]}' in int32; leave biases unquantised"
    if quantised is not None and quantised.dtype != np.int8:
        return f"expected int8 weights, got {quantised.dtype}; quantise them symmetrically to int8"
    scale = constants.get(node.input[1])
    if scale is None or not (np.isfinite(scale) & (scale > 0)).all():
        return "expected a constant scale above 0"
    if len(node.input) < 3 or not node.input[2]:
        if node.op_type == "DequantizeLinear":  # 0, of the type of what it reads
            return None
        return "expected a constant int8 zero point 0, got none, which means uint8"
    zero = constants.get(node.input[2])
    if zero is None or zero.dtype != np.int8 or zero.any():
        found = "a computed one" if zero is None else f"{np.unique(zero).tolist()} ({zero.dtype})"
        return f"expected a constant int8 zero point 0, got {found}; quantise symmetrically"
    return None


def _between_layer_and_activation(
    node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]
) -> str | None:
    tensor = node.input[0]
    for wanted in ("DequantizeLinear", "QuantizeLinear"):
        maker = makers.get(tensor)
        if maker is None or maker.op_type != wanted:
            return None
        tensor = maker.input[0]
    layer = makers.get(tensor)
    if layer is None or layer.op_type not in LAYERS:
        return None
    return f"expected no rounding between it and '{layer.name}'; put Q behind the activation"


def _element_types(model: onnx.ModelProto) -> dict[str, str]:
    from onnx import TensorProto

    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}
    inside = model.graph
    found = {each.name: each.data_type for each in inside.initializer}
    for value in (*inside.input, *inside.value_info, *inside.output):
        found[value.name] = value.type.tensor_type.elem_type
    return {name: names.get(kind, TensorProto.DataType.Name(kind)) for name, kind in found.items()}


def _computes_in(
    node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], types: dict[str, str]
) -> str:
    both = [makers.get(tensor) for tensor in node.input[:2]]
    if all(maker is not None and maker.op_type == "DequantizeLinear" for maker in both):
        return "int8"
    return types[node.input[0]]
