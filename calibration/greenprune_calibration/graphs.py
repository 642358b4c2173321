"""ONNX graphs: read, made ready, looked through and written. For the modules of this package."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operations that int8 is for: convolutions and linear layers."""
BATCH = 32
"""Images that a graph with a free batch is given at once."""


def load(graph: Path) -> onnx.ModelProto:
    """A valid graph in which every node has a name: its own, or that of its first output.

    Raises:
        ValueError: there is no such file, or no valid ONNX graph in it.
    """
    import onnx

    if not graph.is_file():
        raise ValueError(f"{graph}: expected an ONNX graph, there is no such file")
    try:
        model = onnx.load(graph)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, onnx's checker's and numpy's have no common base
        raise ValueError(
            f"{graph}: expected a valid ONNX graph, got one that onnx refuses ({error}); export "
            "the network again"
        ) from error
    for node in model.graph.node:
        node.name = node.name or node.output[0]
    return model


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operations."""
    return int(max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")))


def prepared(graph: Path) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph with its shapes and constants worked out and BatchNorm folded into convolutions.

    Layers keep their names.

    Returns:
        The graph, and by name of each node of the file the name of the node that now does its work;
        those that nothing does any more are left out.

    Raises:
        ValueError: see :func:`load`, or ONNX Runtime cannot run the graph.
    """
    import onnx
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    original = load(graph)
    model = onnx.shape_inference.infer_shapes(optimised(original, graph, "ORT_ENABLE_BASIC"))
    add_pre_process_metadata(model)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"prepared_{number}"
    used = {node.domain for node in model.graph.node} | {""}
    imports = [each for each in model.opset_import if each.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    return model, _restore_names(original, model)


def optimised(model: onnx.ModelProto, graph: Path, level: str) -> onnx.ModelProto:
    """What ONNX Runtime makes of a graph on this machine's CPU; ``graph`` is for messages.

    Raises:
        ValueError: it cannot run the graph.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors: what it cannot fold is no news
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own errors have no public base
            raise ValueError(
                f"{graph}: expected a graph that ONNX Runtime can run, got: {error}"
            ) from error
        return onnx.load(path)


def _restore_names(original: onnx.ModelProto, model: onnx.ModelProto) -> dict[str, str]:
    """Give layers of ``model`` that were renamed their first names back; who does whose work."""
    carriers = _carriers(original, model)
    by_name = {node.name: node for node in model.graph.node}
    renamed = {}
    for node in original.graph.node:
        carrier = by_name.get(carriers.get(node.name, ""))
        if carrier is None or node.op_type not in LAYERS or carrier.op_type not in LAYERS:
            continue
        if carrier.name != node.name and carrier.name not in carriers:
            renamed[carrier.name] = node.name
            carrier.name = node.name
    return {name: renamed.get(carrier, carrier) for name, carrier in carriers.items()}


def _carriers(original: onnx.ModelProto, model: onnx.ModelProto) -> dict[str, str]:
    """The node of the same name, or that makes the same tensor, or that does the reader's work."""
    names = {node.name for node in model.graph.node}
    producers = {tensor: node.name for node in model.graph.node for tensor in node.output}
    readers: dict[str, list[str]] = {}
    for node in original.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node.name)
    carriers: dict[str, str] = {}
    for node in reversed(original.graph.node):  # readers come before what they read
        if node.name in names:
            carriers[node.name] = node.name
        elif node.output[0] in producers:
            carriers[node.name] = producers[node.output[0]]
        else:
            found = {carriers[each] for each in readers.get(node.output[0], []) if each in carriers}
            if len(found) == 1:
                carriers[node.name] = found.pop()
    return carriers


def feeding_only(graph: Path, output: str) -> list[str]:
    """Names of the nodes that one output of a graph needs and no other output does.

    Raises:
        ValueError: see :func:`load`, or the graph has no such output.
    """
    model = load(graph)
    outputs = [each.name for each in model.graph.output]
    if output not in outputs:
        raise ValueError(f"{graph}: expected an output '{output}', the graph has {outputs}")
    wanted = _needed(model, [output])
    others = _needed(model, [name for name in outputs if name != output])
    return [node.name for node in model.graph.node if node.name in wanted - others]


def _needed(model: onnx.ModelProto, outputs: list[str]) -> set[str]:
    """Names of the nodes that work for ``outputs``."""
    tensors, names = set(outputs), set()
    for node in reversed(model.graph.node):
        if tensors & set(node.output):
            names.add(node.name)
            tensors.update(node.input)
    return names


def after_last_layer(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes whose answers no layer reads: softmax, a score made of logits."""
    read: set[str] = set()
    names = []
    for node in reversed(model.graph.node):
        if node.op_type in LAYERS or read & set(node.output):
            read.update(node.input)
        else:
            names.append(node.name)
    return names


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each tensor."""
    return {tensor: node for node in model.graph.node for tensor in node.output}


def the_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The one input that is no weight.

    Raises:
        ValueError: there are several, or none.
    """
    weights = {each.name for each in model.graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [
        each for each in model.graph.input if each.name not in weights
    ]
    if len(inputs) != 1:
        raise ValueError(f"expected a graph with one input, got {[each.name for each in inputs]}")
    return inputs[0]


def batches(
    model: onnx.ModelProto, calibration: NDArray[np.float32] | None
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """The calibration images as a session takes them, some at a time.

    Args:
        model: with one input [N, C, H, W].
        calibration: float32 [N, C, H, W], normalised as the network expects.

    Raises:
        ValueError: at once, not at the first batch: there are no images, they are not float32, not
            of the input's shape or not finite, or do not fill a fixed batch.
    """
    given = the_input(model)
    if calibration is None or len(calibration) == 0:
        raise ValueError(
            "calibration: int8 needs images to calibrate with, got none; expected float32 "
            "[N, C, H, W], such as a few hundred training images, normalised"
        )
    images = np.asarray(calibration)
    fixed, *expected = [each.dim_value for each in given.type.tensor_type.shape.dim]
    shape = list(images.shape[1:])
    if len(shape) != len(expected) or any(
        want not in (0, got) for want, got in zip(expected, shape, strict=True)
    ):
        raise ValueError(
            f"calibration: expected images of shape {expected} for the input '{given.name}', got "
            f"{shape}"
        )
    if images.dtype != np.float32:
        raise ValueError(f"calibration: expected float32 images, got {images.dtype}; convert them")
    if not np.isfinite(images).all():
        worst = int(np.argmin(np.isfinite(images.reshape(len(images), -1)).all(axis=1)))
        raise ValueError(
            f"calibration: expected finite images, image {worst} has NaN or infinity; leave it out"
        )
    if fixed and len(images) % fixed:
        raise ValueError(
            f"calibration: expected a multiple of {fixed} images, the graph's fixed batch, got "
            f"{len(images)}"
        )
    size = fixed or BATCH
    return ({given.name: images[at : at + size]} for at in range(0, len(images), size))


def checked_names(model: onnx.ModelProto, names: set[str], what: str) -> None:
    """Raises ValueError where ``model`` has no node of one of these names."""
    unknown = sorted(names - {node.name for node in model.graph.node})
    if unknown:
        layers = [node.name for node in model.graph.node if node.op_type in LAYERS]
        raise ValueError(
            f"{what}: expected names of the graph's nodes, got {unknown}; its layers are {layers}"
        )


def write(model: onnx.ModelProto, destination: Path) -> None:
    """Write a graph whole or not at all; inner shapes that rewriting made stale are dropped."""
    import onnx

    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".") as folder:
        onnx.save(model, Path(folder) / "graph.onnx")
        (Path(folder) / "graph.onnx").replace(destination)
