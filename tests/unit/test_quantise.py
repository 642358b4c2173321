"""int8 and fp16 graphs of small networks, run for real; refusals of what would fail on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from greenprune_calibration.graphs import feeding_only, prepared
from greenprune_calibration.half import tensorrt_fp16
from greenprune_calibration.inspection import int8_kernels, rounded_weights, sensitivity
from greenprune_calibration.qdq_rules import check_tensorrt
from greenprune_calibration.quantise import cpu_int8, tensorrt_int8

Array = NDArray[np.float32]
SIZE = 12
BODY = ("stem", "inner", "outer", "down", "shortcut", "depthwise", "classifier")


class Graph:
    """A small ONNX graph with random weights, node by node; a node's output has its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.generator = np.random.default_rng(0)

    def weight(self, name: str, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def random(self, name: str, *shape: int, scale: float = 1.0) -> str:
        values = self.generator.normal(0, scale, shape).astype(np.float32)
        return self.weight(name, values)

    def add(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(kind, list(inputs), [f"{name}_out"], name=name, **attributes)
        )
        return f"{name}_out"

    def conv(self, name: str, source: str, shape: tuple[int, ...], **attributes: Any) -> str:
        kernel = shape[2]
        weight = self.random(f"{name}.weight", *shape, scale=1 / np.sqrt(np.prod(shape[1:])))
        bias = self.random(f"{name}.bias", shape[0], scale=0.1)
        pads = [kernel // 2] * 4
        return self.add("Conv", name, source, weight, bias, pads=pads, **attributes)

    def linear(self, name: str, source: str, inputs: int, outputs: int) -> str:
        weight = self.random(f"{name}.weight", outputs, inputs, scale=0.5)
        bias = self.random(f"{name}.bias", outputs, scale=0.1)
        return self.add("Gemm", name, source, weight, bias, transB=1)

    def save(
        self, path: Path, outputs: dict[str, tuple[str, list[int]]], *, opset: int = 20
    ) -> Path:
        """``outputs``: by name the tensor and its shape behind the batch."""
        for name, (tensor, _) in outputs.items():
            for node in self.nodes:
                node.output[:] = [name if each == tensor else each for each in node.output]
                node.input[:] = [name if each == tensor else each for each in node.input]
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                "small",
                [helper.make_tensor_value_info("input", 1, ["batch", 3, SIZE, SIZE])],
                [
                    helper.make_tensor_value_info(name, 1, ["batch", *shape])
                    for name, (_, shape) in outputs.items()
                ],
                self.weights,
            ),
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=9,
        )
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def residual(path: Path, *, opset: int = 20) -> Path:
    """BatchNorm, two residual additions, a depthwise convolution, a linear head and a score's."""
    graph = Graph()
    x = graph.conv("stem", "input", (8, 3, 3, 3))
    spread = [
        graph.weight(f"bn.{part}", values.astype(np.float32))
        for part, values in {
            "scale": np.linspace(0.5, 1.5, 8),
            "bias": np.linspace(-0.2, 0.2, 8),
            "mean": np.linspace(-0.1, 0.1, 8),
            "var": np.linspace(0.5, 2.0, 8),
        }.items()
    ]
    first = graph.add("Relu", "relu1", graph.add("BatchNormalization", "bn", x, *spread))
    x = graph.add("Relu", "relu2", graph.conv("inner", first, (8, 8, 3, 3)))
    x = graph.add("Add", "add1", graph.conv("outer", x, (8, 8, 3, 3)), first)
    x = graph.add("Relu", "relu3", x)
    main = graph.conv("down", x, (16, 8, 3, 3), strides=[2, 2])
    side = graph.conv("shortcut", x, (16, 8, 1, 1), strides=[2, 2])
    x = graph.add("Relu", "relu4", graph.add("Add", "add2", main, side))
    x = graph.conv("depthwise", x, (16, 1, 3, 3), group=16)
    low, high = (graph.weight(name, np.float32(value)) for name, value in (("low", 0), ("high", 6)))
    x = graph.add("GlobalAveragePool", "pool", graph.add("Clip", "clip", x, low, high))
    x = graph.add("Flatten", "flatten", x)
    logits = graph.linear("classifier", x, 16, 5)
    gate = graph.add("Sigmoid", "sigmoid", graph.linear("gate", x, 16, 1))
    axes = graph.weight("axes", np.array([1]))
    score = graph.add("Squeeze", "squeeze", gate, axes)
    return graph.save(path, {"logits": (logits, [5]), "score": (score, [])}, opset=opset)


def upsampling(path: Path) -> Path:
    """A transposed convolution, and a linear layer written as MatMul and Add; score of logits."""
    graph = Graph()
    x = graph.add("Relu", "relu1", graph.conv("narrow", "input", (6, 3, 3, 3), strides=[2, 2]))
    weight = graph.random("up.weight", 6, 4, 2, 2, scale=0.4)
    x = graph.add("ConvTranspose", "up", x, weight, strides=[2, 2])
    x = graph.add("Relu", "relu2", x)
    axes = graph.weight("axes", np.array([2, 3]))
    x = graph.add("ReduceMean", "mean", x, axes, keepdims=0)
    x = graph.add("MatMul", "product", x, graph.random("product.weight", 4, 5))
    logits = graph.add("Add", "sum", x, graph.random("sum.bias", 5))
    last = graph.weight("last", np.array([1]))
    score = graph.add("Softmax", "softmax", logits, axis=1)
    score = graph.add("ReduceMax", "largest", score, last, keepdims=0)
    return graph.save(path, {"logits": (logits, [5]), "score": (score, [])})


class Made:
    """The float graphs and what is made of them, once."""

    def __init__(self, folder: Path) -> None:
        self.images = np.random.default_rng(1).normal(0, 1, (40, 3, SIZE, SIZE)).astype(np.float32)
        self.residual = residual(folder / "residual.onnx")
        self.upsampling = upsampling(folder / "upsampling.onnx")
        head = feeding_only(self.residual, "score")
        self.cpu, self.trt = folder / "cpu.onnx", folder / "trt.onnx"
        cpu_int8(self.residual, self.images, self.cpu, keep_float=head, reduce_range=True)
        self.types = tensorrt_int8(self.residual, self.images, self.trt, keep_float=head)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("quantise"))


def run(path: Path, images: Array) -> dict[str, Array]:
    """Graphs for TensorRT as they stand; ONNX Runtime would round more of them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if any(node.op_type == "Cast" for node in onnx.load(path).graph.node):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": images}), strict=True))


def difference(left: Path, right: Path, images: Array, output: str = "logits") -> float:
    """Largest, relative to the largest answer of ``right``."""
    found, expected = run(left, images)[output], run(right, images)[output]
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def nodes(path: Path) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in onnx.load(path).graph.node}


def makers(path: Path) -> dict[str, onnx.NodeProto]:
    return {tensor: node for node in onnx.load(path).graph.node for tensor in node.output}


def constants(path: Path) -> dict[str, NDArray[Any]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def changed(path: Path, to: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, to)
    return to


# int8 on a CPU


def test_layers_become_integer_kernels_and_the_scores_head_does_not(made: Made) -> None:
    kernels = int8_kernels(made.cpu)

    assert kernels == {**dict.fromkeys(BODY, True), "gate": False}
    assert not any(int8_kernels(made.residual).values()), "the float graph has none"


def test_int8_answers_nearly_as_float(made: Made) -> None:
    fresh = np.random.default_rng(2).normal(0, 1, (20, 3, SIZE, SIZE)).astype(np.float32)

    assert 0 < difference(made.cpu, made.residual, fresh) < 0.1
    assert difference(made.cpu, made.residual, fresh, "score") < 0.05


@pytest.mark.parametrize("count", [1, 3, 17])
def test_the_batch_stays_free(made: Made, count: int) -> None:
    for path in (made.cpu, made.trt):
        answers = run(path, made.images[:count])

        assert {name: value.shape for name, value in answers.items()} == {
            "logits": (count, 5),
            "score": (count,),
        }
        together = run(path, made.images)
        np.testing.assert_allclose(answers["logits"], together["logits"][:count], atol=2e-3)


def test_outputs_are_not_rounded(made: Made, tmp_path: Path) -> None:
    made_by = makers(made.cpu)
    assert made_by["logits"].op_type == "Gemm"

    cpu_int8(made.upsampling, made.images, tmp_path / "cpu.onnx")

    assert len(np.unique(run(tmp_path / "cpu.onnx", made.images)["score"])) == len(made.images)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {
        makers(tmp_path / "cpu.onnx")[name].op_type for name in ("logits", "score")
    }


def test_what_stays_in_float_reads_what_was_not_rounded_for_others(tmp_path: Path) -> None:
    """The mean is float, and rounded for the classifier alone."""
    graph = Graph()
    x = graph.add("Relu", "relu", graph.conv("conv", "input", (4, 3, 3, 3)))
    axes = graph.weight("axes", np.array([2, 3]))
    x = graph.add("ReduceMean", "mean", x, axes, keepdims=0)
    outputs = {
        "logits": (graph.linear("classifier", x, 4, 5), [5]),
        "score": (graph.linear("gate", x, 4, 1), [1]),
    }
    path = graph.save(tmp_path / "float.onnx", outputs)
    images = np.random.default_rng(0).normal(0, 1, (8, 3, SIZE, SIZE)).astype(np.float32)

    cpu_int8(path, images, tmp_path / "cpu.onnx", keep_float=feeding_only(path, "score"))

    after, made_by = nodes(tmp_path / "cpu.onnx"), makers(tmp_path / "cpu.onnx")
    assert made_by[after["gate"].input[0]].op_type == "ReduceMean"
    assert made_by[after["classifier"].input[0]].op_type == "DequantizeLinear"
    assert int8_kernels(tmp_path / "cpu.onnx") == {
        "conv": True,
        "classifier": True,
        "gate": False,
    }


def test_layers_that_are_to_stay_in_float_do(made: Made, tmp_path: Path) -> None:
    keep = ["inner", "depthwise", "gate"]

    cpu_int8(made.residual, made.images, tmp_path / "cpu.onnx", keep_float=keep)
    types = tensorrt_int8(made.residual, made.images, tmp_path / "trt.onnx", keep_float=keep)

    kernels = int8_kernels(tmp_path / "cpu.onnx")
    assert sorted(name for name, integer in kernels.items() if not integer) == sorted(keep)
    weights, kept = constants(made.residual), constants(tmp_path / "cpu.onnx")
    for name in keep:
        tensor = nodes(tmp_path / "cpu.onnx")[name].input[1]
        np.testing.assert_array_equal(kept[tensor], weights[f"{name}.weight"])
    assert sorted(name for name, kind in types.items() if kind == "fp16") == sorted(keep)


def test_names_of_nodes_that_were_fused_are_still_understood(made: Made, tmp_path: Path) -> None:
    """BatchNorm goes into its convolution, MatMul and Add become a Gemm."""
    _, carriers = prepared(made.residual)
    assert carriers["bn"] == "stem"
    _, carriers = prepared(made.upsampling)
    assert carriers["product"] == carriers["sum"] == "product"

    cpu_int8(made.residual, made.images, tmp_path / "bn.onnx", keep_float=["bn"])
    cpu_int8(made.upsampling, made.images, tmp_path / "up.onnx", keep_float=["product"])

    assert not int8_kernels(tmp_path / "bn.onnx")["stem"]
    assert int8_kernels(tmp_path / "up.onnx") == {"narrow": True, "up": False, "product": False}


def test_weights_are_rounded_per_channel_to_the_nearest_step(made: Made) -> None:
    found, weights = constants(made.cpu), constants(made.residual)
    made_by, after = makers(made.cpu), nodes(made.cpu)
    for name in ("inner", "down", "depthwise"):
        dequantise = made_by[after[name].input[1]]
        rounded, scale = found[dequantise.input[0]], found[dequantise.input[1]]
        assert rounded.dtype == np.int8
        assert np.abs(rounded.astype(int)).max() <= 64, "reduce_range"
        steps = scale.reshape(-1, 1, 1, 1)
        error = np.abs(rounded * steps - weights[f"{name}.weight"])
        assert (error <= steps * (0.5 + 1e-3)).all()
        assert scale.shape == rounded.shape[:1]


# int8 for TensorRT


def test_a_graph_for_tensorrt_computes_in_int8_with_fp16_around(made: Made) -> None:
    assert made.types == {**dict.fromkeys(BODY, "int8"), "gate": "fp16"}
    assert check_tensorrt(made.trt) == made.types
    model = onnx.load(made.trt)
    kinds = {each.data_type for each in model.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    assert not {TensorProto.UINT8, TensorProto.INT32} & kinds
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert 0 < difference(made.trt, made.residual, made.images) < 0.05


def test_shortcuts_are_rounded_and_what_they_are_added_to_is_not(made: Made) -> None:
    made_by, after = makers(made.trt), nodes(made.trt)
    for name, mains in (("add1", {"outer"}), ("add2", {"down", "shortcut"})):
        layer, rounded = sorted((made_by[t] for t in after[name].input), key=lambda n: n.op_type)
        assert layer.name in mains
        assert (layer.op_type, rounded.op_type) == ("Conv", "DequantizeLinear")
    assert not any(node.op_type == "Identity" for node in after.values())


def test_transposed_convolutions_have_a_scale_for_each_output(made: Made, tmp_path: Path) -> None:
    types = tensorrt_int8(made.upsampling, made.images, tmp_path / "trt.onnx")

    assert types == {"narrow": "int8", "up": "int8", "product": "int8"}
    made_by, found = makers(tmp_path / "trt.onnx"), constants(tmp_path / "trt.onnx")
    weights = made_by[nodes(tmp_path / "trt.onnx")["up"].input[1]]
    assert found[weights.input[1]].shape == (4,)
    assert {each.name: each.i for each in weights.attribute} == {"axis": 1}
    assert difference(tmp_path / "trt.onnx", made.upsampling, made.images) < 0.05


def test_an_activation_reads_its_layer_where_others_read_it_rounded(tmp_path: Path) -> None:
    """The convolution's answer goes into an addition, rounded, and into Relu, not rounded."""
    graph = Graph()
    first = graph.conv("first", "input", (4, 3, 3, 3))
    second = graph.conv("second", graph.add("Relu", "relu", first), (4, 4, 3, 3))
    pooled = graph.add("GlobalAveragePool", "pool", graph.add("Add", "add", second, first))
    x = graph.add("Flatten", "flatten", pooled)
    path = graph.save(tmp_path / "float.onnx", {"logits": (graph.linear("fc", x, 4, 5), [5])})
    images = np.random.default_rng(0).normal(0, 1, (8, 3, SIZE, SIZE)).astype(np.float32)

    tensorrt_int8(path, images, tmp_path / "trt.onnx")

    made_by, after = makers(tmp_path / "trt.onnx"), nodes(tmp_path / "trt.onnx")
    assert made_by[after["relu"].input[0]].name == "first"
    assert [made_by[tensor].op_type for tensor in after["add"].input] == [
        "Conv",
        "DequantizeLinear",
    ]


def test_an_asymmetric_graph_is_refused_with_its_node(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cpu\.onnx: (Quantize|Dequantize)Linear '.+': expected"):
        check_tensorrt(made.cpu)

    def shift(model: onnx.ModelProto) -> None:
        target = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        zero = next(each for each in model.graph.initializer if each.name == target.input[2])
        zero.CopyFrom(numpy_helper.from_array(np.array(3, dtype=np.int8), zero.name))

    path = changed(made.trt, tmp_path / "shifted.onnx", shift)
    first = next(node for node in nodes(path).values() if node.op_type == "QuantizeLinear")
    with pytest.raises(ValueError, match=rf"'{first.name}': .* zero point 0, got \[3\]"):
        check_tensorrt(path)


def test_a_quantised_bias_is_refused(made: Made, tmp_path: Path) -> None:
    def quantise(model: onnx.ModelProto) -> None:
        conv = next(node for node in model.graph.node if node.name == "inner")
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.arange(8, dtype=np.int32), "whole"),
                numpy_helper.from_array(np.float16(0.1), "step"),
            ]
        )
        node = helper.make_node("DequantizeLinear", ["whole", "step"], ["bias"], name="bias_dq")
        model.graph.node.insert(0, node)
        conv.input[2] = "bias"

    with pytest.raises(ValueError, match="'bias_dq': expected a float bias, got 'whole' in int32"):
        check_tensorrt(changed(made.trt, tmp_path / "bias.onnx", quantise))


def test_rounding_between_a_layer_and_its_activation_is_refused(made: Made, tmp_path: Path) -> None:
    def insert(model: onnx.ModelProto) -> None:
        relu = next(node for node in model.graph.node if node.name == "relu2")
        other = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        place = list(model.graph.node).index(relu)
        pair = [
            helper.make_node("QuantizeLinear", [relu.input[0], *other.input[1:]], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", *other.input[1:]], ["dq"], name="dq"),
        ]
        relu.input[0] = "dq"
        for node in reversed(pair):
            model.graph.node.insert(place, node)

    with pytest.raises(ValueError, match=r"Relu 'relu2': expected no rounding .* 'inner'"):
        check_tensorrt(changed(made.trt, tmp_path / "between.onnx", insert))


def test_another_opset_is_refused(made: Made, tmp_path: Path) -> None:
    old = residual(tmp_path / "old.onnx", opset=17)
    for attempt in (
        lambda: tensorrt_int8(old, made.images, tmp_path / "trt.onnx"),
        lambda: tensorrt_fp16(old, tmp_path / "trt.onnx"),
        lambda: check_tensorrt(old),
    ):
        with pytest.raises(ValueError, match=r"old\.onnx: expected opset 19 or 20 .* got 17"):
            attempt()
    assert not (tmp_path / "trt.onnx").exists()


def test_free_image_sizes_are_refused(made: Made, tmp_path: Path) -> None:
    def free(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"

    with pytest.raises(ValueError, match=r"'input': .* free ones \(height\)"):
        check_tensorrt(changed(made.trt, tmp_path / "free.onnx", free))


def test_operations_of_other_domains_are_refused_with_their_node(
    made: Made, tmp_path: Path
) -> None:
    def foreign(model: onnx.ModelProto) -> None:
        node = next(each for each in model.graph.node if each.name == "relu2")
        node.op_type, node.domain = "FancyRelu", "com.example"
        model.opset_import.append(helper.make_opsetid("com.example", 1))

    with pytest.raises(ValueError, match=r"'relu2': .* got FancyRelu of the domain 'com\.example'"):
        check_tensorrt(changed(made.trt, tmp_path / "foreign.onnx", foreign))


def test_tensorrt_rtx_builds_the_graphs(made: Made, tmp_path: Path) -> None:
    """Without a GPU; its types are those of the check."""
    trt = pytest.importorskip("tensorrt_rtx")
    tensorrt_int8(made.upsampling, made.images, tmp_path / "int8.onnx")
    tensorrt_fp16(made.residual, tmp_path / "half.onnx")
    for path in (made.trt, tmp_path / "int8.onnx", tmp_path / "half.onnx"):
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
        errors = [] if parser.parse(path.read_bytes()) else [parser.get_error(0).desc()]
        assert not errors
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        convolutions = [each for each in layers if each.type == trt.LayerType.CONVOLUTION]
        assert convolutions
        assert {each.get_output(0).dtype for each in convolutions} == {trt.DataType.HALF}
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape("input", *([(batch, 3, SIZE, SIZE) for batch in (1, 1, 4)]))
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None


# fp16


def test_a_graph_in_fp16_keeps_its_rim_in_fp32(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"

    types = tensorrt_fp16(made.residual, path)

    assert types == dict.fromkeys((*BODY, "gate"), "fp16") == check_tensorrt(path)
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits", "score"]
    assert TensorProto.FLOAT not in {each.data_type for each in model.graph.initializer}
    assert path.stat().st_size < 0.75 * made.residual.stat().st_size
    assert 0 < difference(path, made.residual, made.images) < 5e-3


def test_a_tensor_that_several_float_nodes_read_is_cast_once(tmp_path: Path) -> None:
    """SiLU behind the last layer: both of its nodes read the convolution."""
    image = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
    weights = np.random.default_rng(1).standard_normal((8, 3, 3, 3)).astype(np.float32) / 5
    nodes = [
        helper.make_node("Conv", ["input", "weights"], ["read"], name="conv"),
        helper.make_node("Sigmoid", ["read"], ["gate"], name="sigmoid"),
        helper.make_node("Mul", ["read", "gate"], ["silu"], name="mul"),
        helper.make_node("GlobalAveragePool", ["silu"], ["logits"], name="pool"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "silu",
        [value("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [value("logits", TensorProto.FLOAT, ["batch", 8, 1, 1])],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9),
        tmp_path / "silu.onnx",
    )

    assert tensorrt_fp16(tmp_path / "silu.onnx", tmp_path / "half.onnx") == {"conv": "fp16"}
    expected, found = (run(tmp_path / name, image)["logits"] for name in ("silu.onnx", "half.onnx"))
    assert 0 < np.abs(found - expected).max() < 5e-3


def test_a_score_made_of_logits_has_the_steps_of_fp32(made: Made, tmp_path: Path) -> None:
    for path, write in (
        (tmp_path / "half.onnx", lambda to: tensorrt_fp16(made.upsampling, to)),
        (tmp_path / "int8.onnx", lambda to: tensorrt_int8(made.upsampling, made.images, to)),
    ):
        write(path)

        score = run(path, made.images)["score"]
        assert (score.astype(np.float16) != score).all()
        assert makers(path)["score"].op_type == "ReduceMax"


@pytest.mark.parametrize("value", [7e4, np.inf, np.nan])
def test_weights_that_fp16_cannot_hold_are_refused_by_name(
    made: Made, tmp_path: Path, value: float
) -> None:
    def enlarge(model: onnx.ModelProto) -> None:
        bias = next(each for each in model.graph.initializer if each.name == "outer.bias")
        numbers = numpy_helper.to_array(bias).copy()
        numbers[0] = value
        bias.CopyFrom(numpy_helper.from_array(numbers, bias.name))

    path = changed(made.residual, tmp_path / "large.onnx", enlarge)
    with pytest.raises(ValueError, match=r"large\.onnx: .* 65504 .*'outer\.bias'"):
        tensorrt_fp16(path, tmp_path / "half.onnx")
    assert not (tmp_path / "half.onnx").exists()


# which layers int8 hurts


def test_the_layer_that_int8_hurts_most_comes_first(tmp_path: Path) -> None:
    """One channel a thousand times larger than the others leaves them few steps of u8."""
    graph = Graph()
    x = graph.add("Relu", "relu1", graph.conv("stem", "input", (8, 3, 3, 3)))
    x = graph.conv("depthwise", x, (8, 1, 3, 3), group=8)
    x = graph.add("Relu", "relu2", graph.conv("mix", graph.add("Relu", "r", x), (8, 8, 1, 1)))
    x = graph.add("Flatten", "flatten", graph.add("GlobalAveragePool", "pool", x))
    path = graph.save(tmp_path / "float.onnx", {"logits": (graph.linear("fc", x, 8, 5), [5])})

    def spread(model: onnx.ModelProto) -> None:
        for name, factor in (
            ("stem.weight", 300),
            ("stem.bias", 300),
            ("depthwise.weight", 1 / 300),
        ):
            each = next(each for each in model.graph.initializer if each.name == name)
            numbers = numpy_helper.to_array(each).copy()
            numbers[0] *= factor
            each.CopyFrom(numpy_helper.from_array(numbers, name))

    path = changed(path, tmp_path / "spread.onnx", spread)
    images = np.random.default_rng(3).normal(0, 1, (40, 3, SIZE, SIZE)).astype(np.float32)

    ratios = sensitivity(path, images, images=35)

    assert [value for _, value in ratios] == sorted(value for _, value in ratios)
    assert {name for name, _ in ratios} == {"stem", "depthwise", "mix", "fc"}
    assert ratios[0][0] == "depthwise"
    assert ratios[0][1] < 20 < ratios[1][1]
    cpu_int8(path, images, tmp_path / "all.onnx", reduce_range=True)
    cpu_int8(path, images, tmp_path / "kept.onnx", keep_float=["stem", "depthwise"])
    kept = difference(tmp_path / "kept.onnx", path, images)
    assert kept < 0.5 * difference(tmp_path / "all.onnx", path, images)


@given(
    numbers=st.lists(
        st.floats(-1e3, 1e3, width=32).filter(lambda each: each == 0 or abs(each) > 1e-6),
        min_size=12,
        max_size=12,
    ),
    axis=st.integers(-3, 2),
)
def test_rounded_weights_are_within_half_a_step(numbers: list[float], axis: int) -> None:
    weights = np.array(numbers, dtype=np.float32).reshape(2, 3, 2)

    rounded = rounded_weights(weights, axis)

    by_channel = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
    found = np.moveaxis(rounded, axis, 0).reshape(by_channel.shape).astype(np.float64)
    steps = np.abs(by_channel).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - by_channel) <= steps * 0.5001).all()
    levels = found / np.where(steps > 0, steps, 1)
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)


# what was given


def not_finite(images: Array) -> Array:
    spoilt = images[:6].copy()
    spoilt[4, 0, 0, 0] = np.nan
    return spoilt


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: None, "needs images to calibrate with, got none"),
        (lambda images: images[:0], "needs images to calibrate with, got none"),
        (lambda images: images[:, :2], rf"expected images of shape \[3, {SIZE}, {SIZE}\]"),
        (lambda images: images[0], "expected images of shape"),
        (lambda images: images.astype(np.float64), "expected float32 images, got float64"),
        (not_finite, "image 4 has NaN or infinity"),
    ],
)
def test_images_that_cannot_calibrate_are_refused(
    made: Made, tmp_path: Path, spoil: Callable[[Array], Any], message: str
) -> None:
    images = spoil(made.images)
    for use in (
        lambda: cpu_int8(made.upsampling, images, tmp_path / "out.onnx"),
        lambda: tensorrt_int8(made.upsampling, images, tmp_path / "out.onnx"),
        lambda: sensitivity(made.upsampling, images),
    ):
        with pytest.raises(ValueError, match=f"calibration: .*{message}"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_names_and_outputs_that_the_graph_has_not_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"keep_float: .* got \['steam'\]; its layers are \['stem'"
    ):
        cpu_int8(made.residual, made.images, tmp_path / "out.onnx", keep_float=["steam"])
    with pytest.raises(ValueError, match=r"expected an output 'sore', the graph has \['logits'"):
        feeding_only(made.residual, "sore")


def test_files_that_are_no_graph_are_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"no graph at all")
    for path, message in (
        (tmp_path / "junk.onnx", "expected a valid ONNX graph"),
        (tmp_path / "none.onnx", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_int8(path, made.images, tmp_path / "out.onnx")
        with pytest.raises(ValueError, match=message):
            int8_kernels(path)


def test_the_scores_head_is_what_the_score_alone_needs(made: Made) -> None:
    assert feeding_only(made.residual, "score") == ["gate", "sigmoid", "squeeze"]
    assert feeding_only(made.upsampling, "score") == ["softmax", "largest"]
    assert feeding_only(made.upsampling, "logits") == []
