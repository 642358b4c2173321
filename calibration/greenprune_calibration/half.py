"""fp16 graphs: weights and tensors of 16 bits, inputs and outputs of 32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from greenprune_calibration import graphs
from greenprune_calibration.qdq_rules import checked_types, refuse_opset

if TYPE_CHECKING:
    import onnx

LARGEST = float(np.finfo(np.float16).max)


def tensorrt_fp16(graph: Path, destination: Path) -> dict[str, str]:
    """Write the graph in fp16 for a strongly typed build.

    BatchNorm is folded first, while it is float32. Inputs and outputs keep their names and stay
    float32; what no layer reads (softmax, a score) runs in float32: fp16 has steps of 0.0005
    below 1, too coarse for a threshold.

    Args:
        graph: float32 ONNX of opset 19 or 20.
        destination: the ``.onnx`` file to write.

    Returns:
        The type that each layer computes in: see
        :func:`~greenprune_calibration.qdq_rules.check_tensorrt`.

    Raises:
        ValueError: no valid graph, another opset, or a weight that fp16 cannot hold.
    """
    model, _ = graphs.prepared(graph)
    refuse_opset(model, graph)
    refuse_overflow(model, graph)
    half = to_half(model)
    types = checked_types(half, destination)
    graphs.write(half, destination)
    return types


def refuse_overflow(model: onnx.ModelProto, graph: Path) -> None:
    """Raises ValueError, with the name, where a weight is not a finite number in fp16."""
    from onnx import TensorProto, numpy_helper

    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT:
            continue
        largest = float(np.abs(numpy_helper.to_array(weight)).max(initial=0.0))
        if not largest <= LARGEST:  # not '>': NaN is refused too
            raise ValueError(
                f"{graph}: expected weights of at most {LARGEST:.0f} (fp16's largest number), "
                f"'{weight.name}' has {largest:g}; scale this layer down or export in fp32"
            )


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in fp16, Q/DQ scales too, but for its rim and what no layer reads."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half: onnx.ModelProto = convert_float_to_float16(
        model, keep_io_types=True, node_block_list=graphs.after_last_layer(model)
    )
    del half.graph.value_info[:]
    _drop_repeated_casts(half)
    _drop_round_trips(half)
    ONNXModel(half).topological_sort()
    return half


def _drop_repeated_casts(model: onnx.ModelProto) -> None:
    """The converter casts a tensor once for each float node that reads it, by one name."""
    made: set[str] = set()
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.output[0] in made:
            model.graph.node.remove(node)
        made.update(node.output)


def _drop_round_trips(model: onnx.ModelProto) -> None:
    """Take out casts from 32 bits to 16 and back, which the converter puts between float nodes."""
    from onnx import TensorProto

    makers = graphs.producers(model)
    same: dict[str, str] = {}
    for node in model.graph.node:
        before = makers.get(node.input[0]) if _casts_to(node, TensorProto.FLOAT) else None
        if before is not None and _casts_to(before, TensorProto.FLOAT16):
            same[node.output[0]] = before.input[0]
    outputs = {each.name for each in model.graph.output}
    for end, start in same.items():
        maker = makers.get(start)
        if end in outputs and maker is not None and start not in outputs:
            model.graph.node.remove(makers[end])
            maker.output[list(maker.output).index(start)] = end
            _replace_input(model, start, end)
        else:
            _replace_input(model, end, start)
    _drop_unread_casts(model)


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and any(
        each.name == "to" and each.i == kind for each in node.attribute
    )


def _replace_input(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if tensor == old else tensor for tensor in node.input]


def _drop_unread_casts(model: onnx.ModelProto) -> None:
    read = {each.name for each in model.graph.output}
    for node in model.graph.node:
        read.update(node.input)
    while unread := [
        node for node in model.graph.node if node.op_type == "Cast" and not read & set(node.output)
    ]:
        for node in unread:
            model.graph.node.remove(node)
        read = {each.name for each in model.graph.output}
        for node in model.graph.node:
            read.update(node.input)
