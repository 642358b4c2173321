"""The constant that a removed channel leaves is put where it was read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from greenprune.pruning import surgery
from greenprune.pruning.folding import fold_means
from greenprune.pruning.graph import analyse

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Read by a plain, a depthwise and a grouped convolution and by a linear layer; no padding."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 6, 3, bias=bias)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=bias)
        self.grouped = nn.Conv2d(6, 8, 1, groups=2, bias=bias)
        self.hidden = nn.Linear(8 * 4, 10, bias=bias)
        self.out = nn.Linear(10, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = torch.relu(self.grouped(torch.relu(self.depthwise(x))))
        return self.out(torch.relu(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]


def seeded(*, bias: bool = True) -> Net:
    torch.manual_seed(1)
    return Net(bias=bias).double().eval()


def make_constant(layer: nn.Module, channel: int, value: float) -> None:
    """A dead filter with a bias, which is what a plain sparse regulariser leaves behind."""
    with torch.no_grad():
        layer.weight[channel] = 0  # type: ignore[index, operator]
        layer.bias[channel] = value  # type: ignore[index, operator]


def cut(network: nn.Module, removed: dict[str, list[int]]) -> tuple[nn.Module, tuple[str, ...]]:
    analysis = analyse(network, IMAGES.double())
    compact = surgery.compact(network, analysis, removed)
    return compact, fold_means(compact, network, analysis, removed, IMAGES.double())


@pytest.mark.parametrize("layer", ["first", "hidden"])
def test_a_constant_channel_without_padding_is_folded_exactly(layer: str) -> None:
    network = seeded()
    make_constant(network.get_submodule(layer), 2, 0.7)

    compact, gained = cut(network, {layer: [2]})

    assert gained == ()
    torch.testing.assert_close(compact(IMAGES.double()), network(IMAGES.double()))


def test_without_folding_the_next_layer_is_shifted() -> None:
    network = seeded()
    make_constant(network.first, 2, 0.7)
    analysis = analyse(network, IMAGES.double())

    compact = surgery.compact(network, analysis, {"first": [2]})

    assert (compact(IMAGES.double()) - network(IMAGES.double())).abs().max() > 1e-3


def test_through_a_depthwise_layer_the_constant_is_folded_where_it_is_read_last() -> None:
    """What the depthwise layer writes is as constant; the grouped one reads it."""
    network = seeded()
    # A group of the grouped convolution is one structure: channels 0 to 2 go together.
    for channel in (0, 1, 2):
        make_constant(network.second, channel, 0.3 + channel)
    analysis = analyse(network, IMAGES.double())
    group = next(g for g in analysis.groups if any(p.module == "second" for p in g.producers))
    channel = next(
        row
        for row in range(group.channels)
        if 0 in next(p for p in group.producers if p.module == "second").indices[row]
    )

    compact, _ = cut(network, {group.name: [channel]})

    # the outputs of the group that is gone were constants too: all of it ends in `hidden`
    torch.testing.assert_close(compact(IMAGES.double()), network(IMAGES.double()))


def test_a_layer_without_bias_gains_one_and_is_named() -> None:
    network = seeded(bias=False)
    make_constant(network.first, 5, -0.2)  # behind the ReLU a zero: nothing to fold
    make_constant(network.first, 6, 1.1)

    compact, gained = cut(network, {"first": [5, 6]})

    assert gained == ("second",)
    torch.testing.assert_close(compact(IMAGES.double()), network(IMAGES.double()))


def test_a_channel_that_varies_is_folded_on_average() -> None:
    """The consumer's mean output over the images is kept."""
    network = seeded()
    seen: list[Tensor] = []

    compact, _ = cut(network, {"first": [1, 4]})

    for each in (network, compact):
        handle = each.get_submodule("second").register_forward_hook(
            lambda module, given, found: seen.append(found.mean(dim=(0, 2, 3)))
        )
        each(IMAGES.double())
        handle.remove()
    # no padding, but border pixels are read less often than inner ones
    assert (seen[0] - seen[1]).abs().max() < 0.05 * seen[0].abs().max() + 0.02


def test_nothing_removed_changes_nothing() -> None:
    network = seeded()

    compact, gained = cut(network, {})

    assert gained == ()
    assert torch.equal(compact(IMAGES.double()), network(IMAGES.double()))
