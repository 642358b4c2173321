"""Layers as a cost table knows them: shapes, activations, and widths that follow the groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.models import lenet5, resnet20, vgg16
from greenprune.pruning import surgery
from greenprune.pruning.graph import analyse
from greenprune.pruning.layer_shapes import PricedLayer, macs, output_size, shapes_of

torchvision = pytest.importorskip("torchvision")


class Net(nn.Module):
    """A network written as a function of its parts."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def conv(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def head(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3))


def joined() -> nn.Module:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        both = torch.cat([net.a(x), x, torch.sigmoid(net.b(x))], dim=1)
        return net.head(net.c(both))

    return Net(forward, a=conv(3, 8), b=conv(3, 16), c=conv(27, 6), head=head(6))


def grouped() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.ReLU(), conv(16, 8, groups=4), conv(8, 8, groups=8), conv(8, 5), head(5)
    )


def mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=4)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20, (1, 3, 16, 16)),
    "mobilenet": (mobilenet, (1, 3, 32, 32)),
    "vgg16": (vgg16, (1, 3, 32, 32)),
    "lenet5": (lenet5, (1, 1, 32, 32)),
    "joined": (joined, (1, 3, 8, 8)),
    "grouped": (grouped, (1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_the_analysis_own_and_widths_follow_the_groups(name: str) -> None:
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    network, example = make().eval(), torch.zeros(size)
    analysis = analyse(network, example)
    layers = shapes_of(network, example, analysis)
    assert {layer.module for layer in layers} == {layer.module for layer in analysis.layers}
    counted = sum(macs(each.shape, each.in_width, each.out_width) for each in layers)
    assert counted == sum(layer.macs for layer in analysis.layers)

    random = np.random.default_rng(1)
    lost = {group.name: int(random.integers(0, group.channels)) for group in analysis.groups}
    removed = {group: list(range(count)) for group, count in lost.items()}
    pruned = surgery.compact(network, analysis, removed)
    after = shapes_of(pruned, example, analyse(pruned, example))
    for before, found in zip(layers, after, strict=True):
        assert found.module == before.module
        assert found.shape.input_size == before.shape.input_size
        assert found.in_width == before.in_width - taken(before.in_groups, lost)
        assert found.out_width == before.out_width - taken(before.out_groups, lost)


def taken(groups: dict[str, int], lost: dict[str, int]) -> int:
    return sum(lost[group] * times for group, times in groups.items())


def only(network: nn.Module, size: tuple[int, ...] = (1, 4, 8, 8)) -> PricedLayer:
    network, example = nn.Sequential(network), torch.zeros(size)
    return shapes_of(network, example, analyse(network, example))[0]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (nn.ReLU(), "Relu"),
        (nn.ReLU6(), "Clip"),
        (nn.Hardswish(), "HardSwish"),
        (nn.Hardsigmoid(), "HardSigmoid"),
        (nn.SiLU(), "Silu"),
        (nn.GELU(), "Gelu"),
        (nn.Tanh(), "Tanh"),
        (nn.LeakyReLU(), "LeakyRelu"),
        (nn.MaxPool2d(2), ""),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()), "Relu"),
        (nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), ""),
    ],
)
def test_the_activation_is_what_follows_behind_what_folds(after: nn.Module, expected: str) -> None:
    assert only(nn.Sequential(conv(4, 4), after)).shape.activation == expected


def test_functions_count_as_modules_do_and_an_addition_is_passed() -> None:
    residual = Net(lambda n, x: F.relu(n.b(n.a(x)) + x), a=conv(4, 4), b=nn.BatchNorm2d(4))
    assert only(residual).shape.activation == "Relu"
    assert only(Net(lambda n, x: n.a(x).relu_(), a=conv(4, 4))).shape.activation == "Relu"

    def swish(net: nn.Module, x: Tensor) -> Tensor:
        y = net.a(x)
        return y * torch.sigmoid(y)

    def gated(net: nn.Module, x: Tensor) -> Tensor:
        y = net.a(x)
        return y * torch.sigmoid(x)

    assert only(Net(swish, a=conv(4, 4))).shape.activation == "Silu"
    assert only(Net(gated, a=conv(4, 4))).shape.activation == ""


def test_shapes_say_what_the_modules_do() -> None:
    strided = only(nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)))
    assert strided.shape.kernel == (3, 5)
    assert strided.shape.padding == (1, 2, 1, 2)
    assert output_size(strided.shape) == (4, 4)
    same = only(nn.Conv2d(4, 6, 4, padding="same")).shape
    assert same.padding == (1, 1, 2, 2)
    assert output_size(same) == (8, 8)
    flat = only(nn.Conv1d(4, 6, 3, padding=1), (1, 4, 20)).shape
    assert (flat.kernel, flat.input_size, flat.padding) == ((1, 3), (1, 20), (0, 1, 0, 1))
    depthwise = only(nn.Conv2d(4, 4, 3, groups=4))
    assert (depthwise.shape.groups, depthwise.in_width) == (0, 4)
    tokens = only(nn.Linear(8, 3), (1, 5, 8)).shape
    assert tokens.input_size == (5, 1)


def test_a_layer_called_twice_is_two_and_fixed() -> None:
    network = Net(lambda n, x: n.a(F.relu(n.a(x))), a=conv(4, 4))
    example = torch.zeros(1, 4, 8, 8)
    layers = shapes_of(network, example, analyse(network, example))
    assert [layer.shape.activation for layer in layers] == ["Relu", ""]
    assert all(not layer.in_groups and not layer.out_groups for layer in layers)


def test_what_has_no_price_is_refused_where_its_widths_could_change() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.out(net.lstm(x)[0])

    network = Net(forward, lstm=nn.LSTM(4, 8, batch_first=True), out=nn.Linear(8, 3))
    example = torch.zeros(1, 6, 4)
    analysis = analyse(network, example)
    with pytest.raises(PruningError, match=r"'lstm'.*LSTM.*use a budget of macs"):
        shapes_of(network, example, analysis)
    kept = analysis.without({group.name: "kept" for group in analysis.groups})
    assert [layer.module for layer in shapes_of(network, example, kept)] == ["out"]
