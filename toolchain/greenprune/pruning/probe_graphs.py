"""The graphs that a cost table is measured with: chains of one layer, in a folder for the device.

A layer is measured in the company that it has in a network. Where it keeps the size, layers follow
each other, each with its mirror (in and out exchanged) in turn: what is measured is the mean of the
two. Where it changes the size, or reads the network's own input, the chain is a *fan*: layers with
weights of their own read one input, and each adds the sum so far to its answer before the
activation. That measures one addition more than the layer alone, which ONNX Runtime and OpenVINO
fuse into the convolution, as they do with a residual one; TensorRT may merge convolutions of one
input, so that there a fan is less sure.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from greenprune import storage
from greenprune.errors import MissingPackageError
from greenprune.harness.cost_plan import (
    ARTIFACTS,
    PLAN,
    Chain,
    ProbePlan,
    ProbePoint,
    ProbeShape,
)
from greenprune.harness.cost_table import LayerShape
from greenprune.progress import Advance, progress
from greenprune.pruning.layer_shapes import PricedLayer, macs
from greenprune.registry import Build, Target, split_runtime
from greenprune.schema import encode

if TYPE_CHECKING:
    import onnx

REPEATS = (4, 12)
"""Layers of a point's two chains."""
HEAVY_WEIGHTS = 16_000_000
"""From so many weights on a layer streams them from memory, whether or not another layer has the
same: its chains are of ``HEAVY_REPEATS`` layers, which share them, and fit into memory."""
HEAVY_REPEATS = (2, 4)
POINTS = 200
"""A network's grids have at most so many points, as long as a side has ``LEAST_WIDTHS``: what can
be measured in about ten minutes."""
MOST_WIDTHS, LEAST_WIDTHS = 8, 3
"""Of a side of a grid. Cost is close to bilinear in the two widths, which interpolation follows
exactly; where it is not, at small widths, a grid of even ratios has most of its points."""
NARROWEST = 1 / 8
"""Share of its own width from which on a layer is measured; narrower ones are taken to cost as
much, which overestimates them."""
BLOCK_WIDTHS = range(4, 41)
TAIL_WIDTH = 4
CALIBRATION = 8
SEED = 0
IR_VERSION = 9
"""Of opset 19 and 20; ONNX Runtime reads it from 1.15 on."""
RECTIFIERS = ("Relu", "Clip", "HardSwish", "Silu", "Gelu", "LeakyRelu")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """At which widths a shape is measured, (in, out)."""

    shape: LayerShape
    chains: tuple[tuple[int, int], ...]
    """Measured in turn with their mirrors, so each pair once."""
    fans: tuple[tuple[int, int], ...]


def grids(layers: Iterable[PricedLayer], block: int, fine: int | None = None) -> tuple[Grid, ...]:
    """A grid of widths for each distinct shape of a network.

    A side that can be pruned goes from :data:`NARROWEST` to the full width in multiples of
    ``block``, in ratios as even as these allow, with as many widths as :data:`POINTS` allows; where
    there are fewer blocks, multiples of ``fine`` come between. One that cannot be pruned has its
    widths alone. Convolutions in groups are measured at their own width.

    Args:
        layers: see :func:`~greenprune.pruning.layer_shapes.shapes_of`.
        block: that the device's kernels come in.
        fine: what widths will be chosen of; None: of blocks.
    """
    steps = (block, fine or block)
    members: dict[LayerShape, list[PricedLayer]] = {}
    for layer in layers:
        members.setdefault(layer.shape, []).append(layer)
    found: tuple[Grid, ...] = ()
    for most in range(MOST_WIDTHS, LEAST_WIDTHS - 1, -1):
        found = tuple(_grid(shape, group, steps, most) for shape, group in members.items())
        if sum(len(grid.chains) + len(grid.fans) for grid in found) <= POINTS:
            break
    return found


def _grid(shape: LayerShape, layers: list[PricedLayer], steps: tuple[int, int], most: int) -> Grid:
    chains: dict[tuple[int, int], None] = {}
    for point in _points([layer for layer in layers if layer.in_turn], steps, most):
        if point[::-1] not in chains:
            chains[point] = None
    fans = _points([layer for layer in layers if not layer.in_turn], steps, most)
    return Grid(
        shape=shape,
        chains=tuple(chains),
        fans=tuple(each for each in fans if each not in chains and each[::-1] not in chains),
    )


def _points(layers: list[PricedLayer], steps: tuple[int, int], most: int) -> list[tuple[int, int]]:
    if not layers:
        return []
    groups = layers[0].shape.groups
    if groups > 1:
        return sorted({(layer.in_width, layer.out_width) for layer in layers})
    outputs = _values([(layer.out_width, layer.out_groups) for layer in layers], steps, most)
    if groups == 0:
        return [(width, width) for width in outputs]
    inputs = _values([(layer.in_width, layer.in_groups) for layer in layers], steps, most)
    return list(itertools.product(inputs, outputs))


def _values(
    sides: list[tuple[int, dict[str, int]]], steps: tuple[int, int], most: int
) -> list[int]:
    """Widths of one side of a grid, from the width and the groups of each of its layers."""
    fixed = {width for width, groups in sides if not groups}
    free = {width for width, groups in sides if groups}
    if not free:
        return sorted(fixed)
    times = min(min(groups.values()) for _, groups in sides if groups)
    step, fine = (math.lcm(each, times) for each in steps)
    lowest = min(max(1, round(NARROWEST * min(free) / fine)) * fine, *free)
    even = np.geomspace(lowest, max(free), most)[1:-1]
    inner = {int(step * round(width / step)) for width in even}
    values = sorted({lowest, max(free)} | {each for each in inner if lowest < each < max(free)})
    while len(values) < most:  # small widths fell together: into the largest ratio
        gaps = sorted(itertools.pairwise(values), key=lambda gap: gap[0] / gap[1])
        middles = (_between(*gap, each) for each in (step, fine) for gap in gaps)
        middle = next(filter(None, middles), None)
        if middle is None:
            break
        values = sorted([*values, middle])
    return sorted({*values, *fixed})


def _between(low: int, high: int, step: int) -> int | None:
    """The multiple of ``step`` nearest to the geometric mean; None: there is none between."""
    first, last = low // step + 1, (high - 1) // step
    if first > last:
        return None
    return step * min(max(round(math.sqrt(low * high) / step), first), last)


def block_shape(layers: Iterable[PricedLayer]) -> LayerShape | None:
    """The shape to find the block width by: of the stride-1 convolutions that keep their size, 3x3
    ones if there are any, at the middle one of their sizes, the one with the most MACs."""
    kept: dict[LayerShape, int] = {}
    for layer in layers:
        shape = layer.shape
        if shape.operator == "convolution" and shape.groups == 1 and layer.in_turn:
            cost = macs(shape, layer.in_width, layer.out_width)
            kept[shape] = kept.get(shape, 0) + cost
    found = [shape for shape in kept if shape.kernel == (3, 3)] or list(kept)
    if not found:
        return None
    sizes = sorted({math.prod(shape.input_size) for shape in found})
    middle = [each for each in found if math.prod(each.input_size) == sizes[len(sizes) // 2]]
    return max(middle, key=lambda shape: kept[shape])


def block_grid(layers: Iterable[PricedLayer]) -> Grid | None:
    """What the block width is found by: one shape at every width, in = out; None where the network
    has no convolution that tells it."""
    shape = block_shape(layers)
    every = tuple((width, width) for width in BLOCK_WIDTHS)
    return Grid(shape=shape, chains=every, fans=()) if shape else None


def write_folder(
    folder: Path,
    planned: Sequence[Grid],
    block: Grid | None,
    *,
    target: Target,
    runtime: str,
    network: str,
) -> ProbePlan:
    """Write the folder that a device measures a cost table from; it appears whole or not at all.

    Args:
        folder: to write; one that is there is replaced.
        planned: the table's points; see :func:`grids`.
        block: see :func:`block_grid`.
        target: compiles the graphs, here.
        runtime: by :func:`greenprune.registry.runtime_name`; in int8 every chain is quantised with
            random inputs of its own.
        network: what people call the network.

    Raises:
        TargetError: the target has no such runtime, or refuses a graph.
        StorageError: the folder cannot be written.
        MissingPackageError: onnx is not installed.
    """
    every = (*planned, *([block] if block else []))
    total = sum(len(grid.chains) + len(grid.fans) for grid in every)
    with (
        storage.atomic_folder(folder) as temporary,
        tempfile.TemporaryDirectory() as scratch,
        progress(f"graphs for {runtime}", total) as advance,
    ):
        writer = _Writer(temporary, Path(scratch), target, runtime, advance)
        probes = [writer.shape(grid) for grid in every]
        plan = ProbePlan(
            target=target.name,
            runtime=runtime,
            network=network,
            shapes=tuple(probes[: len(planned)]),
            block=probes[-1] if block else None,
            files={
                path.relative_to(temporary).as_posix(): storage.sha256(path)
                for path in sorted((temporary / ARTIFACTS).rglob("*"))
                if path.is_file()
            },
        )
        storage.write_json(temporary / PLAN, encode(plan))
    return plan


class _Writer:
    """Compiles chains into a folder, each of them once."""

    def __init__(
        self, folder: Path, scratch: Path, target: Target, runtime: str, advance: Advance
    ) -> None:
        self.folder, self.scratch, self.target = folder, scratch, target
        self.runtime, self.precision = split_runtime(runtime)
        self.advance = advance
        self.made: dict[tuple[Any, ...], Chain] = {}

    def shape(self, grid: Grid) -> ProbeShape:
        """All points of a grid."""
        chains = [self._point(grid.shape, *point, mirrored=True) for point in grid.chains]
        fans = [self._point(grid.shape, *point, mirrored=False) for point in grid.fans]
        return ProbeShape(shape=grid.shape, mirrored=bool(grid.chains), points=tuple(chains + fans))

    def _point(
        self, shape: LayerShape, in_width: int, out_width: int, *, mirrored: bool
    ) -> ProbePoint:
        heavy = _weights(shape, in_width, out_width) >= HEAVY_WEIGHTS
        chains = []
        for layers in HEAVY_REPEATS if heavy else REPEATS:
            key = (shape, in_width, out_width, layers, mirrored)
            if key not in self.made:
                self.made[key] = self._compile(*key, shared=heavy)
            chains.append(self.made[key])
        self.advance()
        return ProbePoint(in_width=in_width, out_width=out_width, chains=tuple(chains))

    def _compile(
        self,
        shape: LayerShape,
        in_width: int,
        out_width: int,
        layers: int,
        mirrored: bool,
        *,
        shared: bool,
    ) -> Chain:
        import onnx

        model = chain(
            shape,
            in_width,
            out_width,
            layers=layers,
            mirrored=mirrored,
            opset=self.target.capabilities.opset,
            shared=shared,
        )
        graph = self.scratch / "chain.onnx"
        onnx.save(model, graph)
        read = input_shape(shape, in_width)
        random = np.random.default_rng(SEED)
        calibration = random.standard_normal((CALIBRATION, *read[1:]), dtype=np.float32)
        build = Build(
            runtime=self.runtime,
            precision=self.precision,
            calibration=calibration if self.precision == "int8" else None,
        )
        name = f"{len(self.made):04}-{in_width}-{out_width}-{layers}"
        made = self.target.compile(graph, build, self.folder / ARTIFACTS, name)
        return Chain(
            layers=layers, artifact=made.relative_to(self.folder).as_posix(), input_shape=read
        )


def input_shape(shape: LayerShape, in_width: int) -> tuple[int, ...]:
    """What a layer reads, with a batch of 1."""
    if shape.operator == "convolution":
        return (1, in_width, *shape.input_size)
    positions = shape.input_size[0]
    return (1, in_width) if positions == 1 else (1, positions, in_width)


def _weights(shape: LayerShape, in_width: int, out_width: int) -> int:
    return out_width * (in_width // (shape.groups or in_width)) * math.prod(shape.kernel)


def chain(
    shape: LayerShape,
    in_width: int,
    out_width: int,
    *,
    layers: int,
    mirrored: bool,
    opset: int,
    shared: bool = False,
) -> onnx.ModelProto:
    """A graph of so many layers of one shape, checked: batch 1, static shapes, random weights.

    A small layer of its own ends each chain, and drops out of the slope: in low precision, what no
    layer reads is left in floating point, which in a fan would be every addition.

    Weights are drawn so that activations keep a size of about 1: neither infinite nor denormal,
    which would be slow.

    Args:
        shape: of the layers; each is followed by its activation.
        in_width: channels or features that the first layer reads.
        out_width: and writes.
        layers: how many.
        mirrored: one after the other, in and out exchanged in turn; else a fan.
        opset: of ONNX.
        shared: in a mirrored chain, layers of the same widths have the same weights. (In a fan they
            would be one layer to a runtime that looks for common subexpressions.)

    Raises:
        MissingPackageError: onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as error:
        raise MissingPackageError("onnx", "host") from error

    graph = _Graph(shape)
    tensor = "input"
    for number in range(layers):
        widths = (out_width, in_width) if mirrored and number % 2 else (in_width, out_width)
        weights = graph.weights(*widths, number % 2 if shared and mirrored else number)
        if mirrored:
            tensor = graph.activation(graph.layer(tensor, widths[0], weights))
        else:
            answer = graph.layer("input", in_width, weights)
            tensor = graph.activation(graph.node("Add", answer, tensor) if number else answer)
    graph.tail(tensor, in_width if mirrored and layers % 2 == 0 else out_width)
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, input_shape(shape, in_width)),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, _output_shape(shape)),
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "chain", ends[:1], ends[1:], graph.constants),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _output_shape(shape: LayerShape) -> tuple[int, ...]:
    if shape.operator == "convolution":
        return (1, TAIL_WIDTH, 1, 1)
    return input_shape(shape, TAIL_WIDTH)


class _Graph:
    """Nodes and constants, as they are added."""

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(SEED)
        self.known: set[str] = set()

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, list(inputs), [f"{name}_out"], name=name, **attributes)
        )
        return f"{name}_out"

    def constant(self, name: str, value: NDArray[np.float32]) -> str:
        from onnx import numpy_helper

        if name not in self.known:
            self.known.add(name)
            self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weights(self, in_width: int, out_width: int, number: int) -> tuple[str, str]:
        """Names of weight and bias; drawn where there are none of that number."""
        names = (f"weight_{number}", f"bias_{number}")
        if names[0] in self.known:
            return names
        shape = self.shape
        read = in_width // (shape.groups or in_width)
        size = (
            (out_width, read, *shape.kernel)
            if shape.operator == "convolution"
            else ((out_width, in_width) if shape.input_size[0] == 1 else (in_width, out_width))
        )
        gain = 2.0 if shape.activation in RECTIFIERS else 1.0
        deviation = np.float32(math.sqrt(gain / (read * math.prod(shape.kernel))))
        weight = deviation * self.random.standard_normal(size, dtype=np.float32)
        bias = np.float32(0.1) * self.random.standard_normal(out_width, dtype=np.float32)
        return self.constant(names[0], weight), self.constant(names[1], bias)

    def layer(self, tensor: str, in_width: int, weights: tuple[str, str]) -> str:
        shape = self.shape
        if shape.operator == "convolution":
            return self.node(
                "Conv",
                tensor,
                *weights,
                kernel_shape=shape.kernel,
                strides=shape.stride,
                dilations=shape.dilation,
                pads=shape.padding,
                group=shape.groups or in_width,
            )
        if shape.input_size[0] == 1:
            return self.node("Gemm", tensor, *weights, transB=1)
        return self.node("Add", self.node("MatMul", tensor, weights[0]), weights[1])

    def tail(self, tensor: str, width: int) -> None:
        """The end of a chain of this width: a mean over positions and a 1x1 layer."""
        linear = self.shape.operator == "linear"
        size = (TAIL_WIDTH, width) if linear else (TAIL_WIDTH, width, 1, 1)
        weight = self.random.standard_normal(size, dtype=np.float32) / np.float32(math.sqrt(width))
        if not linear:
            self.node("Conv", self.node("GlobalAveragePool", tensor), self.constant("tail", weight))
        elif self.shape.input_size[0] == 1:
            self.node("Gemm", tensor, self.constant("tail", weight), transB=1)
        else:
            self.node("MatMul", tensor, self.constant("tail", weight.T))
        self.nodes[-1].output[0] = "logits"

    def activation(self, tensor: str) -> str:
        kind = self.shape.activation
        if not kind:
            return tensor
        if kind == "Silu":
            return self.node("Mul", tensor, self.node("Sigmoid", tensor))
        if kind == "Clip":
            limits = [self.constant(f"limit_{top}", np.array(top, np.float32)) for top in (0, 6)]
            return self.node("Clip", tensor, *limits)
        attributes = {
            "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5},
            "LeakyRelu": {"alpha": 0.01},
        }
        return self.node(kind, tensor, **attributes.get(kind, {}))
