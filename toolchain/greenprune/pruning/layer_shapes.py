"""What of each layer decides its cost on a device: its shape, and which groups give its widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from greenprune.errors import PruningError
from greenprune.harness.cost_table import LayerShape
from greenprune.pruning.graph import Analysis, LayerCost
from greenprune.pruning.walk import trace

PRICED = (nn.Conv1d, nn.Conv2d, nn.Linear)
ACTIVATIONS = {
    "relu": "Relu",
    "relu6": "Clip",
    "hardtanh": "Clip",
    "clamp": "Clip",
    "clip": "Clip",
    "hardswish": "HardSwish",
    "hardsigmoid": "HardSigmoid",
    "sigmoid": "Sigmoid",
    "silu": "Silu",
    "gelu": "Gelu",
    "tanh": "Tanh",
    "leakyrelu": "LeakyRelu",
}
"""Modules and functions, in lower case and without underscores, to the ONNX operator. ``Silu`` is
two of them, ``Sigmoid`` and ``Mul``."""
FOLDED = ("batchnorm", "dropout", "alphadropout", "identity", "stochasticdepth")
"""How what is gone from a compiled network is called; a digit and ``d`` may follow."""
ADDITIONS = ("add", "iadd")


@dataclass(frozen=True, kw_only=True)
class PricedLayer:
    """One call of a convolution or linear layer.

    ``in_groups`` and ``out_groups`` are those of :class:`~greenprune.pruning.graph.LayerCost`: how
    many of the layer's inputs and outputs one channel of a group takes. Here widths are the whole
    layer's, also where a convolution has groups: these give up inputs and outputs together.
    """

    module: str
    shape: LayerShape
    in_width: int
    out_width: int
    in_groups: dict[str, int]
    out_groups: dict[str, int]

    @property
    def together(self) -> bool:
        """Inputs and outputs only go together: a convolution in groups, or depthwise."""
        return self.shape.groups != 1

    @property
    def in_turn(self) -> bool:
        """Measured in turn with its mirror (in and out exchanged), so that every layer reads what
        another wrote. Not where the size changes, and not the network's first layer and its like:
        a mirror of 3 inputs and 64 outputs says little of it.
        """
        if self.shape.operator == "linear":
            return True
        keeps_size = output_size(self.shape) == self.shape.input_size
        return keeps_size and (bool(self.in_groups) or self.in_width == self.out_width)


def shapes_of(
    model: nn.Module, example_input: Tensor, analysis: Analysis
) -> tuple[PricedLayer, ...]:
    """Every call of a convolution (of one or two dimensions) or linear layer, in order.

    Other layers that cost MACs (recurrent, attention, transposed or 3-D convolution) are left out:
    their cost is part of what is the same for all choices of widths.

    Args:
        model: the network that ``analysis`` is of.
        example_input: [N, ...]; the first sample is run through the network.

    Raises:
        PruningError: the widths of such another layer depend on groups that can be pruned.
    """
    found = {layer.module: layer for layer in analysis.layers}
    evaluated, graph = trace(model, training=False)
    for name, layer in found.items():
        kind = evaluated.get_submodule(name)
        if not isinstance(kind, PRICED) and (layer.in_groups or layer.out_groups):
            groups = ", ".join(sorted({*layer.in_groups, *layer.out_groups}))
            raise PruningError(
                f"'{name}': budgets in milliseconds or joules are not available for a network in "
                f"which the widths of {type(kind).__name__} layers can be pruned (group {groups}); "
                "expected convolutions of one or two dimensions and linear layers; use a budget "
                "of macs or params, or keep these groups out of it"
            )
    calls = _Calls(evaluated, graph, found)
    with torch.no_grad():
        calls.run(example_input[:1])
    return tuple(calls.layers)


class _Calls(fx.Interpreter):
    """Runs the graph and writes down each call of a layer that has a price."""

    def __init__(self, model: nn.Module, graph: fx.Graph, costs: Mapping[str, LayerCost]) -> None:
        super().__init__(model, graph=graph)
        self.model = model
        self.costs = costs
        self.layers: list[PricedLayer] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and n.target in self.costs:
            module = self.model.get_submodule(str(n.target))
            if isinstance(module, PRICED):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                read = args[0] if args else kwargs["input"]
                activation = _activation(self.model, n)
                self.layers.append(_layer(module, self.costs[str(n.target)], read, activation))
        return super().run_node(n)


def _layer(
    module: nn.Conv1d | nn.Conv2d | nn.Linear, cost: LayerCost, read: Tensor, activation: str
) -> PricedLayer:
    if isinstance(module, nn.Linear):
        positions = read.numel() // read.shape[0] // module.in_features
        shape = LayerShape(operator="linear", input_size=(positions, 1), activation=activation)
    else:
        shape = _convolution_shape(module, read, activation)
    in_width, in_groups = cost.in_width, cost.in_groups
    if shape.groups != 1:  # the weight's input width is that of one group, which stays
        in_width = cost.in_width * cast("nn.Conv2d", module).groups
        in_groups = {
            group: times * in_width // cost.out_width for group, times in cost.out_groups.items()
        }
    return PricedLayer(
        module=cost.module,
        shape=shape,
        in_width=in_width,
        out_width=cost.out_width,
        in_groups=in_groups,
        out_groups=cost.out_groups,
    )


def _convolution_shape(module: nn.Conv1d | nn.Conv2d, read: Tensor, activation: str) -> LayerShape:
    """Of one dimension: as one of two whose height is 1, which is what runtimes make of it."""
    kernel, stride, dilation = (
        _pair(value) for value in (module.kernel_size, module.stride, module.dilation)
    )
    if module.padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        before = [each // 2 for each in total]
        padding = (before[0], before[1], total[0] - before[0], total[1] - before[1])
    else:
        given = (0, 0) if module.padding == "valid" else _pair(module.padding, short=0)
        padding = (*given, *given)
    depthwise = module.groups == module.in_channels == module.out_channels
    return LayerShape(
        operator="convolution",
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=0 if depthwise and module.groups > 1 else module.groups,
        input_size=_pair(read.shape[2:]),
        activation=activation,
    )


def _pair(value: Any, short: int = 1) -> tuple[int, int]:
    """Of height and width; ``short`` is the height where there is none."""
    sizes = [int(each) for each in value]
    return (short, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def output_size(shape: LayerShape) -> tuple[int, int]:
    """Height and width that a convolution writes; of a linear layer its positions, 1."""
    top, left, bottom, right = shape.padding
    height, width = (
        (size + pad - step * (kernel - 1) - 1) // stride + 1
        for size, pad, step, kernel, stride in zip(
            shape.input_size,
            (top + bottom, left + right),
            shape.dilation,
            shape.kernel,
            shape.stride,
            strict=True,
        )
    )
    return height, width


def macs(shape: LayerShape, in_width: int, out_width: int) -> int:
    """Multiply-accumulates of one call, for one sample."""
    height, width = output_size(shape)
    per_output = in_width // (shape.groups or in_width) * shape.kernel[0] * shape.kernel[1]
    return height * width * out_width * per_output


def _activation(model: nn.Module, layer: fx.Node) -> str:
    """What follows a layer behind all that folds away and, passed through, a residual addition."""
    node = layer
    while True:
        users = list(node.users)
        names = sorted(_name(model, user) for user in users)
        if names == ["mul", "sigmoid"] and all(
            source is node or _name(model, source) == "sigmoid"
            for user in users
            for source in user.all_input_nodes
        ):
            return "Silu"
        if len(users) != 1:
            return ""
        if names[0] in ACTIVATIONS:
            return ACTIVATIONS[names[0]]
        if names[0] not in ADDITIONS and names[0].rstrip("123d") not in FOLDED:
            return ""
        node = users[0]


def _name(model: nn.Module, node: fx.Node) -> str:
    """What a node calls, in lower case and without underscores."""
    if node.op == "call_module":
        name = type(model.get_submodule(str(node.target))).__name__
    elif callable(node.target):
        name = node.target.__name__
    else:
        name = str(node.target)
    return name.replace("_", "").lower()
