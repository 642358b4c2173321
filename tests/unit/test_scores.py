"""Scores against slow loops, and what must hold for any network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.scores import Scores, score


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads only slow such small networks down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Every kind of reader: convolutions, one behind two branches, a linear after a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 4, 3, padding=1)
        self.right = nn.Conv2d(6, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(4, 5, 3)
        self.hidden = nn.Linear(5 * 4, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.pool(torch.relu(self.left(x) + self.right(x)))
        x = torch.flatten(torch.relu(self.last(x)), 1)
        return self.out(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


def scatter(network: nn.Module, seed: int = 0) -> nn.Module:
    """Values and statistics as of a trained network: all different."""
    torch.manual_seed(seed)
    for value in network.parameters():
        nn.init.normal_(value, std=0.5)
    for name, value in network.named_buffers():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    return network.eval()


@pytest.fixture
def network() -> Small:
    torch.manual_seed(0)
    made = Small()
    scatter(made)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def inputs_of(network: nn.Module, images: Tensor) -> dict[str, NDArray[np.float64]]:
    """What every layer reads, image by image, float64."""
    seen: dict[str, list[NDArray[np.float64]]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(
                given[0][0].double().numpy()
            )
        )
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        for image in images:
            network(image[None])
    for handle in handles:
        handle.remove()
    return {name: np.stack(values) for name, values in seen.items()}


def share_of_each_input(layer: nn.Module, read: NDArray[np.float64]) -> NDArray[np.float64]:
    """One input channel after the other, one map after the other."""
    weight = layer.get_parameter("weight").detach().double().numpy()
    energies = []
    for channel in range(weight.shape[1]):
        if read.ndim == 4 and read[0, channel].size > 1:
            deviation = float(np.mean([np.std(image[channel]) for image in read]))
        else:
            deviation = float(np.std([image[channel].item() for image in read]))
        norm = float(np.sqrt(np.sum(weight[:, channel] ** 2)))
        energies.append((deviation * norm) ** 2)
    return np.array(energies) / sum(energies)


def slow_drp(network: nn.Module, analysis: Analysis, images: Tensor) -> Scores:
    read = inputs_of(network, images)
    scores = {group.name: np.zeros(group.channels) for group in analysis.groups}
    for group in analysis.groups:
        for consumer in group.consumers:
            shares = share_of_each_input(
                network.get_submodule(consumer.module), read[consumer.module]
            )
            for channel in range(group.channels):
                for place in consumer.indices[channel]:
                    scores[group.name][channel] += shares[place]
    return scores


def assert_equal_scores(found: Scores, expected: Scores) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_drp_is_the_slow_loop_in_batches_of_any_size(
    network: Small, images: Tensor, batch_size: int
) -> None:
    analysis = analyse(network, images)
    assert {group.name for group in analysis.groups} == {"stem", "left", "last", "hidden"}

    found = score(network, analysis, images, batch_size=batch_size)

    assert_equal_scores(found, slow_drp(network, analysis, images))
    assert all(np.ptp(values) > 0.01 for values in found.values()), "channels differ"


def test_each_consumer_has_one_share_to_give(network: Small, images: Tensor) -> None:
    """Where every input of its consumers is prunable, a group's scores add up to their number."""
    found = score(network, analyse(network, images), images)

    assert found["stem"].sum() == pytest.approx(2.0), "left and right read it"
    for name in ("left", "last", "hidden"):
        assert found[name].sum() == pytest.approx(1.0), name


def test_a_consumer_that_reads_other_things_too_gives_less_than_one(images: Tensor) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.last = nn.Conv2d(9, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([x, self.stem(x)], dim=1))  # type: ignore[no-any-return]

    network = scatter(Joined())
    analysis = analyse(network, images)

    found = score(network, analysis, images)

    assert_equal_scores(found, slow_drp(network, analysis, images))
    assert 0.1 < found["stem"].sum() < 0.99


def test_a_channel_with_constant_maps_scores_zero_and_the_others_do_not(
    network: Small, images: Tensor
) -> None:
    with torch.no_grad():
        network.norm.weight[2] = 0.0
        network.norm.bias.fill_(5.0)
        network.hidden.weight[4] = 0.0
        network.hidden.bias.fill_(100.0)  # no ReLU is off for all images

    found = score(network, analyse(network, images), images)

    for name, dead in (("stem", 2), ("hidden", 4)):
        assert found[name][dead] == pytest.approx(0.0, abs=1e-12)
        assert (np.delete(found[name], dead) > 0).all()


def test_a_channel_that_nobody_weighs_scores_zero(network: Small, images: Tensor) -> None:
    with torch.no_grad():
        network.last.weight[:, 1] = 0.0

    assert score(network, analyse(network, images), images)["left"][1] == 0.0


def test_grouped_convolutions_are_read_group_by_group(images: Tensor) -> None:
    """In a depthwise layer each filter reads the one channel before it."""
    network = scatter(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.Conv2d(6, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )
    )
    analysis = analyse(network, images)
    read = inputs_of(network, images)

    found = score(network, analysis, images)["0"]

    norms = network[1].weight.detach().double().flatten(1).norm(dim=1).numpy()
    spread = np.mean([[np.std(channel) for channel in image] for image in read["1"]], axis=0)
    depthwise = (norms * spread) ** 2
    pointwise = share_of_each_input(network[2], read["2"])
    np.testing.assert_allclose(found, depthwise / depthwise.sum() + pointwise, rtol=1e-4)


def test_single_values_are_dispersed_over_images(images: Tensor) -> None:
    """After global pooling a map is one value, which does not vary within itself."""
    network = scatter(
        nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(5, 4, 1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )
    )
    analysis = analyse(network, images)

    found = score(network, analysis, images)

    assert_equal_scores(found, slow_drp(network, analysis, images))
    assert found["0"].sum() == pytest.approx(1.0)


class Tokens(nn.Module):
    """Patches as rows of tokens, and a layer between two linear ones that read them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.second(torch.relu(self.first(x))).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [20, 8])
def test_a_linear_layer_on_rows_of_tokens_is_scored_by_its_channels_or_refused(width: int) -> None:
    """Its channels are the last dimension; 20 pixels of width make as many tokens as channels."""
    network = scatter(Tokens())
    images = torch.randn(8, 3, 4, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        network.get_parameter("first.weight")[3] = 0.0
        network.get_parameter("first.bias").fill_(100.0)
    analysis = analyse(network, images)
    assert [group.name for group in analysis.groups] == ["first"]

    try:
        found = score(network, analysis, images)["first"]
    except PruningError:
        return
    assert found[3] == pytest.approx(0.0, abs=1e-12), "a constant channel"
    assert (np.delete(found, 3) > 0).all()


def test_scoring_leaves_the_network_as_it_was(network: Small, images: Tensor) -> None:
    network.train()
    network.norm.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}

    found = score(network, analyse(network, images), images)

    assert network.left.training
    assert not network.norm.training, "a frozen BatchNorm stays frozen"
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    network.eval()
    assert_equal_scores(found, slow_drp(network, analyse(network, images), images))


def test_magnitude_is_the_filters_energy_as_a_share_of_its_layer(
    network: Small, images: Tensor
) -> None:
    found = score(network, analyse(network, images), images, method="magnitude")

    expected: Scores = {}
    writers = {
        "stem": (network.stem,),
        "left": (network.left, network.right),
        "last": (network.last,),
        "hidden": (network.hidden,),
    }
    for name, layers in writers.items():
        expected[name] = np.zeros(layers[0].weight.shape[0])
        for layer in layers:
            weight = layer.weight.detach().double().numpy()
            energies = np.array([np.sum(each**2) for each in weight])
            expected[name] += energies / energies.sum()
    assert_equal_scores(found, expected)


def test_magnitude_of_a_transposed_convolution_is_of_its_output_channels(images: Tensor) -> None:
    """Its weight is [in, out, height, width]."""
    network = scatter(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2),
            nn.ReLU(),
            nn.Conv2d(6, 2, 1),
        )
    )

    found = score(network, analyse(network, images), images, method="magnitude")

    energies = network[2].weight.detach().double().square().sum(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(found["2"], energies / energies.sum())


def test_random_is_determined_by_its_seed(network: Small, images: Tensor) -> None:
    analysis = analyse(network, images)

    first, again, other = (
        score(network, analysis, images, method="random", seed=seed) for seed in (1, 1, 2)
    )

    for group in analysis.groups:
        assert first[group.name].shape == (group.channels,)
        np.testing.assert_array_equal(first[group.name], again[group.name])
        assert (first[group.name] != other[group.name]).any()


def test_an_unknown_method_is_refused(network: Small, images: Tensor) -> None:
    with pytest.raises(PruningError, match="'taylor' is unknown; known: drp, magnitude, random"):
        score(network, analyse(network, images), images, method="taylor")


@pytest.mark.parametrize("method", ["drp", "magnitude"])
def test_scores_that_are_not_finite_are_refused(
    network: Small, images: Tensor, method: str
) -> None:
    analysis = analyse(network, images)
    with torch.no_grad():
        network.last.weight[0, 0, 0, 0] = torch.nan

    with pytest.raises(PruningError, match=f"{method} scores of group '.*' are not finite"):
        score(network, analysis, images, method=method)
