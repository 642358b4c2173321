"""A cost table of real chains, each round in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from greenprune import schema, storage
from greenprune.errors import MeasurementError
from greenprune.harness import cost_table
from greenprune.harness.cost_plan import Chain, ProbePlan, ProbePoint, ProbeShape
from greenprune.harness.cost_probe import measure
from greenprune.harness.cost_table import LayerShape, Lookup
from greenprune.registry import Build, load_target

pytestmark = pytest.mark.skipif(not load_target("x86").is_here(), reason="no x86-64 processor")
SIZE = 16
SHAPE = LayerShape(
    operator="convolution",
    kernel=(3, 3),
    padding=(1, 1, 1, 1),
    input_size=(SIZE, SIZE),
    activation="Relu",
)


def write_chain(path: Path, widths: tuple[int, int], layers: int) -> tuple[int, ...]:
    """An ONNX graph of 3x3 convolutions, in and out exchanged at each; its input's shape."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    nodes, constants = [], []
    for layer in range(layers):
        ins, outs = widths if layer % 2 == 0 else widths[::-1]
        weights = draw.normal(0, (2 / (9 * ins)) ** 0.5, (outs, ins, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, f"w{layer}"))
        last = "output" if layer == layers - 1 else f"x{layer + 1}"
        read = "input" if layer == 0 else f"x{layer}"
        nodes += [
            helper.make_node("Conv", [read, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{layer}"], [last]),
        ]
    shape = (1, widths[0], SIZE, SIZE)
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return shape


def write_folder(folder: Path, runtime: str) -> None:
    target = load_target("x86")

    def point(in_width: int, out_width: int) -> ProbePoint:
        chains = []
        for layers in (2, 6):
            graph = folder.parent / f"graphs/{in_width}-{out_width}-{layers}.onnx"
            shape = write_chain(graph, (in_width, out_width), layers)
            made = target.compile(graph, Build(runtime=runtime), folder / "artifacts", graph.stem)
            artifact = made.relative_to(folder).as_posix()
            chains.append(Chain(layers=layers, artifact=artifact, input_shape=shape))
        return ProbePoint(in_width=in_width, out_width=out_width, chains=tuple(chains))

    plan = ProbePlan(
        target="x86",
        runtime=runtime,
        network="chains",
        shapes=(
            ProbeShape(
                shape=SHAPE, mirrored=True, points=(point(8, 8), point(8, 64), point(64, 64))
            ),
        ),
        block=None,
        files={},
    )
    names = [p.relative_to(folder).as_posix() for p in (folder / "artifacts").iterdir()]
    files = {name: storage.sha256(folder / name) for name in names}
    storage.write_json(folder / "probe.json", schema.encode(plan) | {"files": files})


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_table_is_measured_and_answers(tmp_path: Path, runtime: str) -> None:
    if runtime not in load_target("x86").runtimes_here():
        pytest.skip(f"{runtime} is not installed")
    folder, output = tmp_path / "folder", tmp_path / "table.json"
    write_folder(folder, runtime)
    table = measure(folder, output, threads=1, meter="none", rounds=2)

    assert cost_table.read(output) == table
    assert table.threads == 1
    assert table.block_width == load_target("x86").capabilities.width_multiple
    machine = cost_table.describe_machine(load_target("x86"))
    cost_table.check_device(table, target="x86", runtime=runtime, threads=1, machine=machine)
    found = Lookup(table).latency_us(SHAPE, [0, 8, 64, 8, 64], [8, 8, 8, 64, 64])
    assert found[0] == 0
    assert found[2] == found[3] > 0
    assert found[4] > found[1] > 0  # 64 times the work


def test_a_chain_that_does_not_open_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, "onnxruntime")
    broken = folder / "artifacts/8-64-6.onnx"
    broken.write_bytes(b"this is not a network")
    plan = json.loads((folder / "probe.json").read_text())
    plan["files"]["artifacts/8-64-6.onnx"] = storage.sha256(broken)
    storage.write_json(folder / "probe.json", plan)
    with pytest.raises(MeasurementError, match=r"8-64-6\.onnx"):
        measure(folder, tmp_path / "table.json", threads=1, meter="none", rounds=1)
