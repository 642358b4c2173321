"""MACs and parameters against published figures and small layers counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.models import resnet20, resnet56, vgg16
from greenprune.pruning.cost import Cost, count, per_layer
from greenprune.pruning.graph import analyse
from greenprune.pruning.surgery import compact


@pytest.mark.parametrize(
    ("factory", "macs", "params"),
    [(resnet56, 125_485_696, 853_018), (vgg16, 313_463_808, 14_991_946)],
)
def test_published_networks(factory: type[nn.Module], macs: int, params: int) -> None:
    assert count(factory(), torch.randn(3, 3, 32, 32)) == Cost(macs=macs, params=params)


def test_inner_widths_of_hrankplus() -> None:
    """ResNet-56, inner widths 9/19/38: 73,360,000 MACs and 506,446 parameters."""
    model, example = resnet56(), torch.randn(1, 3, 32, 32)
    analysis = analyse(model, example)
    kept = {16: 9, 32: 19, 64: 38}
    removed = {
        group.name: range(kept[group.channels], group.channels)
        for group in analysis.groups
        if group.name.endswith("conv1") and group.name != "conv1"
    }
    expected = Cost(macs=73_360_000, params=506_446)
    assert count(compact(model, analysis, removed), example) == expected
    assert analysis.predict_cost({name: len(gone) for name, gone in removed.items()}) == expected


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 8), 6 * 4 * 9 * 16),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 8, 8), 8 * 9 * 64),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 8, 8), 4 * 6 * 4 * 64),
        (nn.Conv1d(4, 6, 3), (4, 10), 4 * 6 * 3 * 8),
        (nn.Linear(5, 7), (3, 5), 3 * 35),
        (nn.LSTM(5, 7, batch_first=True), (11, 5), 11 * 4 * 7 * (5 + 7)),
        (nn.GRU(5, 7, batch_first=True, bidirectional=True), (11, 5), 11 * 2 * 3 * 7 * (5 + 7)),
        (nn.BatchNorm2d(4), (4, 8, 8), 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int, batch: int) -> None:
    assert count(nn.Sequential(layer), torch.randn(batch, *shape)).macs == macs


def test_per_layer_is_in_order_and_counts_every_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(self.first(x)))

    assert list(per_layer(Twice(), torch.randn(1, 4)).items()) == [("first", 32), ("last", 8)]


def test_counting_leaves_the_network_alone() -> None:
    model = resnet20()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn1.running_mean.clone()
    count(model, torch.randn(1, 3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.bn1.running_mean, statistics)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_of_the_analysis_add_up() -> None:
    analysis = analyse(resnet20(), torch.randn(1, 3, 32, 32))
    assert sum(layer.macs for layer in analysis.layers) == analysis.predict_cost({}).macs
    layer = next(layer for layer in analysis.layers if layer.module == "layer2.0.conv2")
    assert (layer.out_width, layer.in_width) == (32, 32)
    assert layer.in_groups == {"layer2.0.conv1": 1}
    assert layer.out_groups == {"conv1": 1, "layer2.0.conv2": 1}


@pytest.mark.parametrize("counts", [{"nowhere": 1}, {"conv1": -1}, {"conv1": 17}])
def test_prediction_refuses_impossible_counts(counts: dict[str, int]) -> None:
    with pytest.raises(PruningError):
        analyse(resnet20(), torch.randn(1, 3, 32, 32)).predict_cost(counts)
