"""The graphs that a cost table is measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenprune.harness.cost_plan import read_plan
from greenprune.harness.cost_table import LayerShape
from greenprune.pruning import probe_graphs
from greenprune.pruning.layer_shapes import PricedLayer
from greenprune.pruning.probe_graphs import POINTS, chain, grids, input_shape, write_folder
from greenprune.registry import load_target

LAYERS = ("Conv", "Gemm", "MatMul")


def shape(size: int = 8, **options: Any) -> LayerShape:
    padded: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1, 1, 1), "input_size": (size, size)}
    return LayerShape(operator="convolution", **(padded | options))


def layer(
    of: LayerShape, in_width: int, out_width: int, *, free: str = "both", times: int = 1
) -> PricedLayer:
    """``free``: which sides can be pruned."""
    return PricedLayer(
        module=f"{in_width} to {out_width}",
        shape=of,
        in_width=in_width,
        out_width=out_width,
        in_groups={"a": times} if free in ("both", "in") else {},
        out_groups={"b": 1} if free in ("both", "out") else {},
    )


SHAPES = {
    "plain": (shape(activation="Relu"), 8, 16),
    "none": (shape(kernel=(1, 1), padding=(0, 0, 0, 0)), 16, 8),
    "clip": (shape(activation="Clip"), 8, 8),
    "silu": (shape(activation="Silu"), 8, 8),
    "gelu": (shape(activation="Gelu"), 8, 8),
    "hardswish": (shape(activation="HardSwish"), 8, 8),
    "hardsigmoid": (shape(activation="HardSigmoid"), 8, 8),
    "leaky": (shape(activation="LeakyRelu"), 8, 8),
    "depthwise": (shape(groups=0, activation="Clip"), 24, 24),
    "grouped": (shape(groups=4), 8, 16),
    "one dimension": (shape(kernel=(1, 3), padding=(0, 1, 0, 1), input_size=(1, 20)), 8, 8),
    "linear": (LayerShape(operator="linear", activation="Relu"), 16, 10),
    "tokens": (LayerShape(operator="linear", input_size=(5, 1), activation="Gelu"), 16, 32),
}
FANS = {
    "strided": (shape(stride=(2, 2), activation="Relu"), 8, 16),
    "first": (shape(activation="Relu"), 3, 16),
    "depthwise, strided": (shape(groups=0, stride=(2, 2), activation="HardSwish"), 8, 8),
}


@pytest.mark.parametrize("layers", [4, 12])
@pytest.mark.parametrize("name", [*SHAPES, *FANS])
def test_chains_run_and_stay_at_a_size_of_about_one(name: str, layers: int) -> None:
    of, in_width, out_width = {**SHAPES, **FANS}[name]
    made = chain(of, in_width, out_width, layers=layers, mirrored=name in SHAPES, opset=20)
    assert sum(node.op_type in LAYERS for node in made.graph.node) == layers + 1  # and the tail
    widths = layer_widths(made)
    other = (out_width, in_width) if name in SHAPES else (in_width, out_width)
    assert widths[:layers] == [(in_width, out_width), other] * (layers // 2)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    read = np.random.default_rng(0).standard_normal(input_shape(of, in_width), dtype=np.float32)
    (answer,) = session.run(["logits"], {"input": read})
    assert np.isfinite(answer).all()
    assert 1e-3 < np.abs(answer).max() < 1e3


def layer_widths(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """(in, out) of each layer, from its weight."""
    weights = {each.name: list(each.dims) for each in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in LAYERS:
            continue
        dims = weights[node.input[1]]
        if node.op_type == "Conv":
            group = next((each.i for each in node.attribute if each.name == "group"), 1)
            found.append((dims[1] * group, dims[0]))
        else:
            found.append((dims[1], dims[0]) if node.op_type == "Gemm" else (dims[0], dims[1]))
    return found


def test_shared_weights_are_stored_once_and_never_in_a_fan() -> None:
    linear = LayerShape(operator="linear")
    count = {
        mirrored: sum(
            each.name.startswith("weight")
            for each in chain(
                linear, 8, 16, layers=4, mirrored=mirrored, opset=20, shared=True
            ).graph.initializer
        )
        for mirrored in (True, False)
    }
    assert count == {True: 2, False: 4}


def test_a_side_that_cannot_be_pruned_has_its_width_alone() -> None:
    first, wide = layer(shape(16), 3, 16, free="out"), layer(shape(8), 64, 64)
    head = layer(LayerShape(operator="linear"), 64, 10, free="in")
    found = {grid.shape: grid for grid in grids([first, wide, head], 8)}
    assert found[first.shape].chains == ()
    assert found[first.shape].fans == ((3, 8), (3, 16))
    assert {point[1] for point in found[head.shape].chains} == {10}
    every = range(8, 65, 8)
    pairs = found[wide.shape].chains
    assert {frozenset(pair) for pair in pairs} == {frozenset((a, b)) for a in every for b in every}
    assert len(pairs) == 36  # a chain for each pair, whichever comes first


def test_widths_that_go_together_are_measured_together() -> None:
    depthwise = layer(shape(groups=0), 64, 64)
    grouped = layer(shape(groups=4), 32, 64)
    found = {grid.shape: grid for grid in grids([depthwise, grouped], 8)}
    assert all(a == b for a, b in found[depthwise.shape].chains)
    assert found[grouped.shape].chains == ((32, 64),)


def test_a_channel_that_takes_many_inputs_is_measured_at_its_multiples() -> None:
    flat = layer(LayerShape(operator="linear"), 49 * 32, 10, free="in", times=49)
    (grid,) = grids([flat], 8)
    assert [point[0] for point in grid.chains] == [8 * 49, 16 * 49, 24 * 49, 32 * 49]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    st.sampled_from([1, 4, 8]),
)
def test_grids_reach_every_layers_full_width(sizes: list[tuple[int, int]], block: int) -> None:
    layers = [layer(shape(), 8 * ins, 8 * outs) for ins, outs in sizes]
    (grid,) = grids(layers, block)
    for side in (0, 1):
        widths = {point[side] for point in grid.chains} | {p[1 - side] for p in grid.chains}
        assert max(widths) >= max(8 * each[side] for each in sizes)
    assert all(width % block == 0 for point in grid.chains for width in point)
    assert len(set(grid.chains)) == len(grid.chains)


def test_many_shapes_get_coarser_grids() -> None:
    layers = [layer(shape(size), 256, 256) for size in range(4, 24)]
    found = grids(layers, 8)
    few = sum(len(grid.chains) for grid in found)
    assert len(found[0].chains) < len(grids(layers[:1], 8)[0].chains)
    assert few <= POINTS


def test_finer_widths_come_between_where_there_are_few_blocks() -> None:
    (narrow,) = grids([layer(shape(), 64, 64)], 16, 8)
    assert {width for pair in narrow.chains for width in pair} == set(range(8, 65, 8))
    (wide,) = grids([layer(shape(), 256, 256)], 16, 8)
    widths = {width for pair in wide.chains for width in pair}
    assert len(widths) == 8
    assert {width % 16 for width in widths} == {0}


def test_the_block_is_looked_for_in_the_middle_of_the_network() -> None:
    sizes = [layer(shape(size, activation="Relu"), 32, 32) for size in (32, 16, 8)]
    pointwise = layer(shape(16, kernel=(1, 1), padding=(0, 0, 0, 0)), 512, 512)
    found = probe_graphs.block_shape([*sizes, pointwise])
    assert found == shape(16, activation="Relu")
    linear = layer(LayerShape(operator="linear"), 8, 8)
    assert probe_graphs.block_shape([linear]) is None


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-int8"])
def test_a_folder_is_written_whole_and_reads_back(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_graphs, "BLOCK_WIDTHS", range(8, 10))
    x86 = load_target("x86")
    layers = [
        layer(shape(activation="Relu"), 16, 16),
        layer(shape(stride=(2, 2), activation="HardSwish"), 16, 8),
    ]
    folder = tmp_path / "probe"
    planned, block = grids(layers, 8), probe_graphs.block_grid(layers)
    plan = write_folder(folder, planned, block, target=x86, runtime=runtime, network="two")
    assert read_plan(folder) == plan
    assert [each.mirrored for each in plan.shapes] == [True, False]
    assert plan.block is not None
    assert [point.out_width for point in plan.block.points] == [8, 9]
    # 8 to 8 is in the grid and in the block's probe: one pair of chains
    shared = next(p for p in plan.shapes[0].points if (p.in_width, p.out_width) == (8, 8))
    assert plan.block.points[0].chains == shared.chains
    assert len(plan.files) == 2 * (3 + 2 + 1)
    made = {chain for each in plan.shapes for point in each.points for chain in point.chains}
    for each in made:
        runner = x86.open(folder / each.artifact, runtime, 1)
        read = np.random.default_rng(1).standard_normal(each.input_shape, dtype=np.float32)
        answer = runner.run(read)["logits"]
        assert np.isfinite(answer).all()
        runner.close()
        if runtime.endswith("int8"):
            kinds = x86.layer_precisions(folder / each.artifact, runtime)
            assert set(kinds.values()) == {"int8"}
