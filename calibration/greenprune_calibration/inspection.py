"""What int8 does to a graph: which layers run on integers, and which it hurts most."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from greenprune_calibration import graphs
from greenprune_calibration.graphs import LAYERS

if TYPE_CHECKING:
    import onnx

INTEGER_KERNELS = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)


def int8_kernels(graph: Path) -> dict[str, bool]:
    """Whether ONNX Runtime, on this machine's CPU, runs each layer of a graph on integers.

    Read from the graph as ONNX Runtime has optimised it for itself: fused with the Q and DQ around
    it, a layer has become an integer kernel; else it is a float one with rounding on top.

    Args:
        graph: the ``.onnx`` file, such as :func:`~greenprune_calibration.quantise.cpu_int8` writes.

    Returns:
        By name of each convolution and linear layer of the file.

    Raises:
        ValueError: no valid graph, or ONNX Runtime cannot run it.
    """
    model = graphs.load(graph)
    # beyond this level only the layout of tensors changes, and names are lost
    optimised = graphs.optimised(model, graph, "ORT_ENABLE_EXTENDED")
    by_name = {node.name: node.op_type for node in optimised.graph.node}
    by_output = {name: node.op_type for name, node in graphs.producers(optimised).items()}
    return {
        node.name: by_name.get(node.name, by_output.get(node.output[0])) in INTEGER_KERNELS
        for node in model.graph.node
        if node.op_type in LAYERS
    }


def sensitivity(
    graph: Path, calibration: NDArray[np.float32] | None, *, images: int = 64
) -> list[tuple[str, float]]:
    """How much int8 hurts each layer by itself, the most hurt first.

    Each layer gets a twin that reads the same float tensor, but rounds it to u8 (by the smallest
    and largest value of a batch) and its weights to s8 per channel; signal-to-quantisation-noise
    ratio = 10 log10(sum y² / sum (y - twin's y)²) over the layer's answers y. One pass over the
    images measures all layers, and no layer answers for the errors of those before it. How much an
    error then matters to the network's answer is not in this figure.

    Args:
        graph: float32 ONNX with one input.
        calibration: float32 [N, C, H, W], normalised as the network expects.
        images: how many of them are used, at most.

    Returns:
        (name of the layer in ``graph``, ratio in dB), ascending; infinite where rounding changes
        nothing.

    Raises:
        ValueError: no valid graph or calibration images, or a layer answers NaN or infinity.
    """
    import onnxruntime

    model, _ = graphs.prepared(graph)
    batches = graphs.batches(model, None if calibration is None else calibration[:images])
    measured = _add_twins(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    sums = np.zeros((len(measured), 2))
    for feed in batches:
        sums += np.array(session.run(None, feed), dtype=np.float64).reshape(-1, 2)
    ratios = []
    for name, (signal, noise) in zip(measured, sums, strict=True):
        if not math.isfinite(signal + noise):
            raise ValueError(
                f"{graph}: layer '{name}' answers NaN or infinity to the calibration images; "
                "expected finite numbers"
            )
        ratios.append((name, 10 * math.log10(signal / noise) if noise and signal else math.inf))
    return sorted(ratios, key=lambda each: each[1])


def _add_twins(model: onnx.ModelProto) -> list[str]:
    """Make the graph answer signal and noise of each layer, in turn; the names of the layers."""
    from onnx import TensorProto, helper, numpy_helper

    inside = model.graph
    weights = {each.name: each for each in inside.initializer}
    layers = [node for node in inside.node if node.op_type in LAYERS and node.input[1] in weights]
    nodes: list[onnx.NodeProto] = []
    del inside.output[:]
    for tensor in dict.fromkeys(node.input[0] for node in layers):
        parts = [f"{tensor}:{part}" for part in ("quantised", "scale", "zero")]
        nodes.append(helper.make_node("DynamicQuantizeLinear", [tensor], parts))
        nodes.append(helper.make_node("DequantizeLinear", parts, [f"{tensor}:rounded"]))
    for number, layer in enumerate(layers):
        rounded, answer = f"twin{number}:weights", f"twin{number}:answer"
        values = numpy_helper.to_array(weights[layer.input[1]])
        inside.initializer.append(
            numpy_helper.from_array(rounded_weights(values, channel_axis(layer)), rounded)
        )
        twin = helper.make_node(layer.op_type, [], [answer], name=f"twin{number}")
        twin.attribute.extend(layer.attribute)
        twin.input.extend([f"{layer.input[0]}:rounded", rounded, *layer.input[2:]])
        error, ends = f"twin{number}:error", [f"twin{number}:signal", f"twin{number}:noise"]
        nodes += [
            twin,
            helper.make_node("Sub", [layer.output[0], answer], [error]),
            helper.make_node("ReduceSumSquare", [layer.output[0]], [ends[0]], keepdims=0),
            helper.make_node("ReduceSumSquare", [error], [ends[1]], keepdims=0),
        ]
        inside.output.extend(
            helper.make_tensor_value_info(end, TensorProto.FLOAT, []) for end in ends
        )
    inside.node.extend(nodes)
    return [layer.name for layer in layers]


def channel_axis(layer: onnx.NodeProto) -> int:
    """The dimension of a layer's weights that counts its outputs."""
    if layer.op_type == "Gemm":
        turned = any(each.name == "transB" and each.i for each in layer.attribute)
        return 0 if turned else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}[layer.op_type]


def rounded_weights(weights: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Weights as symmetric int8 holds them, with one scale for each index of ``axis``."""
    others = tuple(each for each in range(weights.ndim) if each != axis % weights.ndim)
    scale = np.abs(weights).max(axis=others, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.asarray(np.round(weights / scale) * scale, dtype=np.float32)
