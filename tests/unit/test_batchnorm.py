"""BatchNorm statistics, estimated anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from greenprune.pruning.batchnorm import reestimate


@pytest.fixture
def network() -> nn.Sequential:
    """Two BatchNorms, a dropout before each, statistics that are off."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Dropout(0.5),
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, momentum=0.3),
        nn.ReLU(),
        nn.Dropout2d(0.5),
        nn.Flatten(),
        nn.BatchNorm1d(5 * 4, momentum=None),
        nn.Linear(20, 2),
    )
    for layer in (made[2], made[6]):
        layer.running_mean.fill_(9.0)
        layer.running_var.fill_(9.0)
        layer.num_batches_tracked.fill_(77)
    return made


@pytest.fixture
def images() -> Tensor:
    return 2.0 * torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 0.5


def assert_statistics(layer: nn.Module, batches: list[Tensor]) -> None:
    """The plain mean, over batches, of the mean and of the unbiased variance."""
    flat = [batch.transpose(0, 1).flatten(1) for batch in batches]
    mean = torch.stack([values.mean(dim=1) for values in flat]).mean(dim=0)
    variance = torch.stack([values.var(dim=1) for values in flat]).mean(dim=0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)


def test_one_batch_gives_the_plain_mean_and_variance(
    network: nn.Sequential, images: Tensor
) -> None:
    reestimate(network, images)

    maps = network[1](images)
    assert_statistics(network[2], [maps])
    normalised = (maps - maps.mean(dim=(0, 2, 3), keepdim=True)) / (
        maps.var(dim=(0, 2, 3), keepdim=True, correction=0) + network[2].eps
    ).sqrt()
    assert_statistics(
        network[6], [(normalised * network[2].weight[:, None, None]).relu().flatten(1)]
    )


def test_batches_are_equal_and_count_the_same(network: nn.Sequential, images: Tensor) -> None:
    """13 images in batches of 6: 7 and 6, and no last batch of a single image."""
    images = torch.cat([images, images[:1] + 50.0])
    reestimate(network, images, batch_size=6)

    maps = network[1](images)
    assert_statistics(network[2], [maps[:7], maps[7:]])
    assert network[2].num_batches_tracked == 2


def test_fewer_images_than_a_batch_are_one_batch(network: nn.Sequential, images: Tensor) -> None:
    reestimate(network, images[:5], batch_size=64)

    assert_statistics(network[2], [network[1](images[:5])])


def test_nothing_but_statistics_changes_and_dropout_stays_off(
    network: nn.Sequential, images: Tensor
) -> None:
    network.train()
    before = copy.deepcopy(network)

    reestimate(network, images)

    assert not any(module.training for module in network.modules())
    assert [network[2].momentum, network[6].momentum] == [0.3, None]
    for name, value in before.named_parameters():
        assert torch.equal(network.get_parameter(name), value)
        assert network.get_parameter(name).requires_grad
    assert (network[0].p, network[4].p) == (0.5, 0.5)
    again = copy.deepcopy(network)
    reestimate(again, images)
    assert torch.equal(again[6].running_var, network[6].running_var), "nothing is drawn"


def test_without_batchnorm_nothing_changes(images: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)
    )
    before = copy.deepcopy(network.state_dict())

    reestimate(network, images)

    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
