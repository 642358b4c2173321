"""Toy ONNX graphs as they are meant for TensorRT: two convolutions and a classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE, CLASSES = 3, 8, 4


def write(
    path: Path,
    precision: str = "fp32",
    *,
    zero_point: int = 0,
    batch: int | str = "batch",
    size: int | str = SIZE,
    operator: str = "Relu",
    surroundings: str = "fp16",
    half_ends: bool = False,
    score: bool = False,
) -> Path:
    """Write a network with float32 input [batch, 3, 8, 8] and output [batch, 4].

    Args:
        precision: ``fp32``; ``fp16``: float16 tensors between casts; ``int8``: Q/DQ, symmetric
            unless ``zero_point`` is not 0, with ``surroundings`` as type around.
        operator: stands after the first convolution.
        half_ends: input and outputs are float16 too.
        score: a second output, float32 [batch], the largest logit.
    """
    half = precision == "fp16" or (precision == "int8" and surroundings == "fp16")
    dtype = np.dtype(np.float16 if half else np.float32)
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def node(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(
            helper.make_node(operator, inputs, [output], name=f"{output}_node", **attributes)
        )
        return output

    def quantized(tensor: str, scale: np.ndarray, zero: np.ndarray, axis: int = 1) -> str:
        scales = constant(f"{tensor}_scale", scale.astype(dtype))
        zeros = constant(f"{tensor}_zero", zero)
        small = node("QuantizeLinear", [tensor, scales, zeros], f"{tensor}_q", axis=axis)
        return node("DequantizeLinear", [small, scales, zeros], f"{tensor}_dq", axis=axis)

    def convolution(tensor: str, name: str, channels: int, out: int) -> str:
        weights = random.normal(0, 0.3, (out, channels, 3, 3))
        kernel = constant(f"{name}_weight", weights.astype(dtype))
        if precision == "int8":
            tensor = quantized(tensor, np.array(0.05), np.array(zero_point, np.int8))
            peaks = np.abs(weights).max(axis=(1, 2, 3)) / 127
            kernel = quantized(kernel, peaks, np.zeros(out, np.int8), axis=0)
        bias = constant(f"{name}_bias", random.normal(0, 0.1, out).astype(dtype))
        return node("Conv", [tensor, kernel, bias], name, pads=[1, 1, 1, 1])

    casts = half and not half_ends
    ends = TensorProto.FLOAT16 if half_ends else TensorProto.FLOAT
    tensor = node("Cast", ["input"], "input_half", to=kind) if casts else "input"
    tensor = node(operator, [convolution(tensor, "first", CHANNELS, 8)], "active")
    tensor = node("GlobalAveragePool", [convolution(tensor, "second", 8, 8)], "pooled")
    tensor = node("Flatten", [tensor], "flat")
    weights = constant("weights", random.normal(0, 1, (8, CLASSES)).astype(dtype))
    tensor = node("MatMul", [tensor, weights], "logits_half" if casts else "logits")
    if casts:
        node("Cast", [tensor], "logits", to=TensorProto.FLOAT)
    outputs = [helper.make_tensor_value_info("logits", ends, [batch, CLASSES])]
    if score:
        node("ReduceMax", ["logits", constant("axis", np.array([1]))], "score", keepdims=0)
        outputs.append(helper.make_tensor_value_info("score", ends, [batch]))
    shape = [batch, CHANNELS, size, size]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("input", ends, shape)],
        outputs,
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
