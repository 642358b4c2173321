"""int8 graphs from float ones: for ONNX Runtime on a CPU, and for TensorRT.

The two do not share a graph. ONNX Runtime fuses activations of u8; signed ones with a Q behind
Conv and Relu, as TensorRT wants them, it runs as float convolutions with rounding on top.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from greenprune_calibration import graphs
from greenprune_calibration.graphs import LAYERS
from greenprune_calibration.half import refuse_overflow, to_half
from greenprune_calibration.qdq_rules import checked_types, refuse_opset

if TYPE_CHECKING:
    import onnx

CPU_OPERATIONS = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "LeakyRelu",
    "MatMul",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""What ONNX Runtime has integer kernels for, or moves bytes in. No ConvTranspose: it has none."""
RESIDUAL = "residual branch of "
"""How a node is named that marks a tensor for rounding; it is gone before the graph is written."""


def cpu_int8(
    graph: Path,
    calibration: NDArray[np.float32] | None,
    destination: Path,
    *,
    keep_float: Collection[str] = (),
    reduce_range: bool = False,
) -> None:
    """Write the graph in the form that ONNX Runtime runs with integer kernels on a CPU.

    Explicit Q/DQ, activations u8 by their smallest and largest value, weights s8 per channel.
    Linear layers answer in float, and what no layer reads (softmax, a score) is left in float, so
    that outputs are not rounded to 256 steps. The batch stays as it is.

    Args:
        graph: float32 ONNX with one input.
        calibration: float32 [N, C, H, W], normalised as the network expects.
        destination: the ``.onnx`` file to write.
        keep_float: names of nodes of ``graph`` that stay in float; see
            :func:`~greenprune_calibration.graphs.feeding_only`.
        reduce_range: weights of 7 bits: against saturation on AVX2 and AVX-512 without VNNI, which
            add two products of 8 bits in 16.

    Raises:
        ValueError: no valid graph, calibration images or names.
    """
    from onnxruntime.quantization import QuantType

    model, kept = _ready(graph, keep_float)
    kept |= set(graphs.after_last_layer(model))
    quantised = _quantise(
        model,
        calibration,
        kept,
        CPU_OPERATIONS,
        activation_type=QuantType.QUInt8,
        reduce_range=reduce_range,
        extra_options={
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
        },
    )
    _read_unrounded(quantised, kept)
    _shield_float_layers(quantised)
    graphs.write(quantised, destination)


def tensorrt_int8(
    graph: Path,
    calibration: NDArray[np.float32] | None,
    destination: Path,
    *,
    keep_float: Collection[str] = (),
) -> dict[str, str]:
    """Write the graph with symmetric Q/DQ, and fp16 around it, for a strongly typed build.

    Activations s8 per tensor with zero point 0, weights s8 per channel; biases stay in float; no
    rounding between a layer and its activation function; the shortcut into a residual addition is
    rounded, so that the addition joins the convolution that it follows. Inputs and outputs stay
    float32; what no layer reads (softmax, a score) runs in float32.

    To compare its answers in ONNX Runtime, turn graph optimisation off (``ORT_DISABLE_ALL``): else
    ONNX Runtime rounds the biases to steps that fp16 cannot hold.

    Args:
        graph: float32 ONNX of opset 19 or 20 with one input.
        calibration: float32 [N, C, H, W], normalised as the network expects.
        destination: the ``.onnx`` file to write.
        keep_float: names of nodes of ``graph`` that run in fp16.

    Returns:
        The type that each layer computes in: see
        :func:`~greenprune_calibration.qdq_rules.check_tensorrt`.

    Raises:
        ValueError: no valid graph, calibration images or names; another opset; a weight that fp16
            cannot hold.
    """
    from onnxruntime.quantization import QuantType

    model, kept = _ready(graph, keep_float)
    refuse_opset(model, graph)
    refuse_overflow(model, graph)
    _mark_residuals(model, kept)
    quantised = _quantise(
        model,
        calibration,
        kept,
        (*LAYERS, "Identity"),
        activation_type=QuantType.QInt8,
        reduce_range=False,
        extra_options={
            "ActivationSymmetric": True,
            "AddQDQPairToWeight": True,
            "DedicatedQDQPair": False,
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": [*LAYERS, "Identity"],
            "QuantizeBias": False,
        },
    )
    _drop_marks(quantised)
    _unround_activations(quantised)
    half = to_half(quantised)
    types = checked_types(half, destination)
    graphs.write(half, destination)
    return types


def _ready(graph: Path, keep_float: Collection[str]) -> tuple[onnx.ModelProto, set[str]]:
    """The prepared graph, and which of its nodes do the work of ``keep_float``."""
    graphs.checked_names(graphs.load(graph), set(keep_float), "keep_float")
    model, carriers = graphs.prepared(graph)
    return model, {carriers[name] for name in keep_float if name in carriers}


def _quantise(
    model: onnx.ModelProto,
    calibration: NDArray[np.float32] | None,
    kept: set[str],
    operations: Collection[str],
    **options: Any,
) -> onnx.ModelProto:
    """ONNX Runtime's static quantisation; ``kept`` are the names of nodes that it leaves."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    images = graphs.batches(model, calibration)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(images, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        quantize_static(
            model,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operations),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(kept),
            calibrate_method=CalibrationMethod.MinMax,
            **options,
        )
        return onnx.load(path)


def _read_unrounded(model: onnx.ModelProto, kept: set[str]) -> None:
    """Give nodes that stay in float the float tensor, where there is one.

    The quantiser lets every reader of a tensor read it rounded. Where the tensor is an integer
    kernel's, there is no other.
    """
    makers = graphs.producers(model)
    for node in model.graph.node:
        if node.name not in kept:
            continue
        for index, tensor in enumerate(node.input):
            source = _before_rounding(makers, tensor)
            maker = makers.get(source or "")
            integer = maker is not None and (
                maker.op_type in CPU_OPERATIONS
                and _before_rounding(makers, maker.input[0]) is not None
            )
            if source is not None and not integer:
                node.input[index] = source


def _shield_float_layers(model: onnx.ModelProto) -> None:
    """Hold ONNX Runtime from rounding the weights of layers that are to stay in float.

    It does so by itself, with one scale for the whole tensor, to any layer between DQ and Q that
    nothing parts but Relu and Clip (its WeightBiasQuantization). LeakyRelu of slope 1 changes no
    number and is fused into the float layer.
    """
    from onnx import helper

    makers = graphs.producers(model)
    weights = {each.name for each in model.graph.initializer}
    outputs = {each.name for each in model.graph.output}
    ordered = []
    for node in model.graph.node:
        ordered.append(node)
        if (
            node.op_type in LAYERS
            and node.input[1] in weights
            and node.output[0] not in outputs
            and _before_rounding(makers, node.input[0])
        ):
            answer, node.output[0] = node.output[0], f"{node.output[0]}_unshielded"
            ordered.append(
                helper.make_node(
                    "LeakyRelu",
                    [node.output[0]],
                    [answer],
                    name=f"{node.name} stays float",
                    alpha=1.0,
                )
            )
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def _before_rounding(makers: dict[str, onnx.NodeProto], tensor: str) -> str | None:
    """The activation that Q and DQ made ``tensor`` of, if they did."""
    dequantise = makers.get(tensor)
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return None
    quantise = makers.get(dequantise.input[0])
    if quantise is None or quantise.op_type != "QuantizeLinear":
        return None
    return str(quantise.input[0])


def _mark_residuals(model: onnx.ModelProto, kept: set[str]) -> None:
    """Put an Identity, which the quantiser rounds the input of, on the shortcuts into additions.

    Where a layer's answer is added to something, this is the branch with the fewer layers.
    """
    from onnx import helper

    makers = graphs.producers(model)
    depth: dict[str, int] = {}  # of tensors that come from the input: layers on the longest way
    depth[graphs.the_input(model).name] = 0
    marks = []
    for node in model.graph.node:
        sources = [tensor for tensor in node.input if tensor in depth]
        if not sources:
            continue
        deepest = max(depth[tensor] for tensor in sources) + (node.op_type in LAYERS)
        depth.update((tensor, deepest) for tensor in node.output)
        if node.op_type != "Add" or node.name in kept or len(set(sources)) != 2:
            continue
        shortcut, main = sorted(sources, key=lambda tensor: depth[tensor])
        if main not in makers or makers[main].op_type not in LAYERS:
            continue
        mark = f"{RESIDUAL}{node.name}"
        marks.append(helper.make_node("Identity", [shortcut], [mark], name=mark))
        node.input[list(node.input).index(shortcut)] = mark
    _insert(model, marks)


def _insert(model: onnx.ModelProto, added: list[onnx.NodeProto]) -> None:
    """Add nodes, each before its first reader."""
    waiting = {node.output[0]: node for node in added}
    ordered = []
    for node in model.graph.node:
        ordered += [waiting.pop(tensor) for tensor in node.input if tensor in waiting]
        ordered.append(node)
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def _drop_marks(model: onnx.ModelProto) -> None:
    """Take out what :func:`_mark_residuals` put in."""
    marks = [node for node in model.graph.node if node.name.startswith(RESIDUAL)]
    sources = {mark.output[0]: mark.input[0] for mark in marks}
    for mark in marks:
        model.graph.node.remove(mark)
    for node in model.graph.node:
        node.input[:] = [sources.get(tensor, tensor) for tensor in node.input]


def _unround_activations(model: onnx.ModelProto) -> None:
    """Let activation functions read their layer itself where others read it rounded."""
    makers = graphs.producers(model)
    for node in model.graph.node:
        source = _before_rounding(makers, node.input[0]) if node.input else None
        if node.op_type in ("Relu", "Clip") and source in makers:
            node.input[0] = source
