"""Scores against slow loops, and what must hold for any network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune.errors import DataError, PruningError
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.plots import scores_svg
from greenprune.pruning.ranks import matrix_ranks
from greenprune.pruning.scores import Scores, measure, spearman


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
        joins = len(group.producers) - 1  # each reads the channel as well
        scores[group.name] *= 1 + joins / len(group.consumers)
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

    found = measure(network, analysis, images, batch_size=batch_size).scores

    assert_equal_scores(found, slow_drp(network, analysis, images))
    assert all(np.ptp(values) > 0.01 for values in found.values()), "channels differ"


def test_each_consumer_has_one_share_to_give(network: Small, images: Tensor) -> None:
    """Where every input of its consumers is prunable, a group's scores add up to their number."""
    found = measure(network, analyse(network, images), images).scores

    assert found["stem"].sum() == pytest.approx(2.0), "left and right read it"
    assert found["left"].sum() == pytest.approx(2.0), "so does the addition of left and right"
    for name in ("last", "hidden"):
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

    found = measure(network, analysis, images).scores

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

    found = measure(network, analyse(network, images), images).scores

    for name, dead in (("stem", 2), ("hidden", 4)):
        assert found[name][dead] == pytest.approx(0.0, abs=1e-12)
        assert (np.delete(found[name], dead) > 0).all()


def test_a_channel_that_nobody_weighs_scores_zero(network: Small, images: Tensor) -> None:
    with torch.no_grad():
        network.last.weight[:, 1] = 0.0

    assert measure(network, analyse(network, images), images).scores["left"][1] == 0.0


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

    found = measure(network, analysis, images).scores["0"]

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

    found = measure(network, analysis, images).scores

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
def test_a_linear_layer_on_rows_of_tokens_is_scored_by_its_channels(width: int) -> None:
    """Its channels are the last dimension; 20 pixels of width make as many tokens as channels."""
    network = scatter(Tokens())
    images = torch.randn(8, 3, 4, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        network.get_parameter("first.weight")[3] = 0.0
        network.get_parameter("first.bias").fill_(100.0)
    analysis = analyse(network, images)

    found = measure(network, analysis, images).scores["first"]

    assert found[3] == pytest.approx(0.0, abs=1e-12), "a constant channel"
    assert (np.delete(found, 3) > 0).all()


def test_scoring_leaves_the_network_as_it_was(network: Small, images: Tensor) -> None:
    network.train()
    network.norm.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}

    found = measure(network, analyse(network, images), images).scores

    assert network.left.training
    assert not network.norm.training, "a frozen BatchNorm stays frozen"
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    network.eval()
    assert_equal_scores(found, slow_drp(network, analyse(network, images), images))


def test_magnitude_is_the_filters_energy_as_a_share_of_its_layer(
    network: Small, images: Tensor
) -> None:
    found = measure(network, analyse(network, images), images, method="magnitude").scores

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

    found = measure(network, analyse(network, images), images, method="magnitude").scores

    energies = network[2].weight.detach().double().square().sum(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(found["2"], energies / energies.sum())


def test_random_is_determined_by_its_seed(network: Small, images: Tensor) -> None:
    analysis = analyse(network, images)

    first, again, other = (
        measure(network, analysis, images, method="random", seed=seed).scores for seed in (1, 1, 2)
    )

    for group in analysis.groups:
        assert first[group.name].shape == (group.channels,)
        np.testing.assert_array_equal(first[group.name], again[group.name])
        assert (first[group.name] != other[group.name]).any()


METHODS = ["drp", "drp_rank", "magnitude", "bn_scale", "taylor", "hrank", "fpgm", "random"]


def normed(images: Tensor) -> tuple[nn.Module, Analysis]:
    """Every group has a BatchNorm; the last linear layer reads pooled values."""
    network = scatter(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        )
    )
    return network, analyse(network, images)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_every_channel_and_leaves_the_network_alone(
    images: Tensor, method: str
) -> None:
    network, analysis = normed(images)
    state = {name: value.clone() for name, value in network.state_dict().items()}

    found = measure(network, analysis, images, method=method, targets=torch.arange(10) % 3).scores

    assert {name: values.shape for name, values in found.items()} == {"0": (6,), "3": (5,)}
    assert all((values >= 0).all() and np.ptp(values) > 0 for values in found.values())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_drp_rank_puts_the_rank_of_what_is_read_in_the_place_of_its_dispersion(
    images: Tensor,
) -> None:
    network, analysis = normed(images)
    with torch.no_grad():
        maps = network[:3](images)
    ranks = np.array([[int(torch.linalg.matrix_rank(c)) for c in image] for image in maps])
    norms = network[3].weight.detach().double().square().sum(dim=(0, 2, 3)).sqrt().numpy()
    energy = (ranks.mean(axis=0) * norms) ** 2

    found = measure(network, analysis, images, method="drp_rank").scores

    np.testing.assert_allclose(found["0"], energy / energy.sum())


def test_hrank_is_the_rank_behind_the_activation_whatever_reads_it(images: Tensor) -> None:
    network, analysis = normed(images)
    found = measure(network, analysis, images, method="hrank").scores
    for name, end in (("0", 3), ("3", 6)):
        with torch.no_grad():
            maps = network[:end](images)
        ranks = np.array([[int(torch.linalg.matrix_rank(c)) for c in image] for image in maps])
        mean = ranks.mean(axis=0)
        np.testing.assert_allclose(found[name], mean / mean.sum())


def test_hrank_looks_behind_an_addition(network: Small, images: Tensor) -> None:
    with torch.no_grad():
        stem = torch.relu(network.norm(network.stem(images)))
        maps = torch.relu(network.left(stem) + network.right(stem))
    ranks = np.array([[int(torch.linalg.matrix_rank(c)) for c in image] for image in maps])
    mean = ranks.mean(axis=0)

    found = measure(network, analyse(network, images), images, method="hrank").scores

    np.testing.assert_allclose(found["left"], 2 * mean / mean.sum())


def test_taylor_is_the_slope_of_each_images_loss_along_a_gate(images: Tensor) -> None:
    """A gate g times the channel: |dL/dg| at g = 1, by finite differences in float64."""
    network, analysis = normed(images)
    network, images = network.double(), images.double()
    targets = torch.arange(len(images)) % 3

    found = measure(network, analysis, images, method="taylor", targets=targets).scores["0"]

    def losses(channel: int, gate: float) -> Tensor:
        maps = network[:3](images).clone()
        maps[:, channel] *= gate
        return nn.functional.cross_entropy(network[3:](maps), targets, reduction="none")

    with torch.no_grad():
        slopes = [
            float(((losses(c, 1 + 1e-6) - losses(c, 1 - 1e-6)) / 2e-6).abs().mean())
            for c in range(6)
        ]
    np.testing.assert_allclose(found, slopes, rtol=1e-4)


def test_taylor_follows_the_loss_that_it_is_given(images: Tensor) -> None:
    network, analysis = normed(images)
    found = measure(
        network,
        analysis,
        images,
        method="taylor",
        targets=torch.zeros(len(images)),
        loss=lambda outputs, targets: (outputs[:, 0] * 0 + targets).mean(),
    ).scores
    assert all((values == 0).all() for values in found.values())


def test_bn_scale_is_the_share_of_the_scales(images: Tensor) -> None:
    network, analysis = normed(images)
    scale = network[1].weight.detach().double().abs().numpy()
    found = measure(network, analysis, images, method="bn_scale").scores
    np.testing.assert_allclose(found["0"], scale / scale.sum())


def test_fpgm_finds_the_filter_that_others_can_replace(images: Tensor) -> None:
    network, analysis = normed(images)
    with torch.no_grad():
        network[0].weight[4] = network[0].weight[[0, 1, 2, 3, 5]].mean(dim=0)

    found = measure(network, analysis, images, method="fpgm").scores["0"]

    filters = network[0].weight.detach().double().flatten(1)
    distances = np.array([float((filters - each).norm(dim=1).sum()) for each in filters])
    np.testing.assert_allclose(found, distances / distances.sum())
    assert found.argmin() == 4


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_what_a_recurrent_layer_reads_counts_by_its_input_weights(layer: type[nn.Module]) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, (8, 3), padding=(0, 1))
            self.rnn = layer(4, 5, batch_first=True, bidirectional=True)
            self.out = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            columns = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
            return self.out(self.rnn(columns)[0].mean(1))  # type: ignore[no-any-return]

    network = scatter(Reader())
    images = torch.randn(6, 1, 8, 12, generator=torch.Generator().manual_seed(3))
    analysis = analyse(network, images)
    if "conv" not in {group.name for group in analysis.groups}:
        pytest.fail("the convolution before a recurrent layer is prunable")
    with torch.no_grad():
        spread = torch.relu(network.get_submodule("conv")(images)).flatten(2).std(2, correction=0)
    weights = [network.get_parameter(f"rnn.weight_ih_l0{end}").detach() for end in ("", "_reverse")]
    norms = torch.cat(weights).norm(dim=0)
    energy = ((spread.mean(0) * norms) ** 2).double().numpy()

    found = measure(network, analysis, images).scores

    np.testing.assert_allclose(found["conv"], energy / energy.sum(), rtol=1e-5)
    for method in ("drp_rank", "magnitude", "fpgm", "hrank", "taylor"):
        others = measure(
            network, analysis, images, method=method, targets=torch.arange(6) % 3
        ).scores
        assert all(np.isfinite(values).all() for values in others.values())


# How many images


def test_images_are_added_until_the_order_is_stable(network: Small) -> None:
    one = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    alike = one + 0.01 * torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    analysis = analyse(network, alike[:2])

    found = measure(network, analysis, alike, method="hrank")

    assert found.images == 64, "32 images and 32 more agree"
    assert found.stability.keys() == found.scores.keys()
    assert np.mean(list(found.stability.values())) >= 0.99
    for name, values in measure(network, analysis, alike[:64], method="hrank").scores.items():
        np.testing.assert_array_equal(found.scores[name], values)


def test_all_images_are_used_where_the_order_never_settles(network: Small) -> None:
    """The first half is of another kind than the second."""
    images = torch.randn(90, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    images[32:] = images[32:] * torch.tensor([0.0, 5.0, 0.1]).view(3, 1, 1)
    found = measure(network, analyse(network, images), images)
    assert found.images == 90
    assert min(found.stability.values()) < 1


def test_few_images_are_used_whole_and_nothing_is_said_of_stability(
    network: Small, images: Tensor
) -> None:
    found = measure(network, analyse(network, images), images)
    assert (found.images, found.stability) == (10, {})
    assert measure(network, analyse(network, images), images, method="magnitude").images == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 1, 2], [1, 2, 3], 3**0.5 / 2),
        ([5, 5], [7, 7], 1.0),
        ([5, 5], [1, 2], 0.0),
    ],
)
def test_spearman(first: list[float], second: list[float], expected: float) -> None:
    assert spearman(np.array(first), np.array(second)) == pytest.approx(expected)


# Ranks


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    rank=st.integers(0, 12),
    noise=st.sampled_from([0.0, 1e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 1e-3]),
    scale=st.sampled_from([1e-35, 1e-20, 1.0, 1e18]),
    seed=st.integers(0, 2**31),
)
def test_ranks_are_those_of_torch_one_by_one(
    height: int, width: int, rank: int, noise: float, scale: float, seed: int
) -> None:
    """Near the threshold too, where most of these are."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(20, height, rank, generator=generator)
    maps = low @ torch.randn(20, rank, width, generator=generator)
    maps = torch.relu(maps + noise * torch.randn(maps.shape, generator=generator))
    maps[::2] = -maps[::2] + 2 * noise
    maps = maps * scale

    found = matrix_ranks(maps)

    assert found.tolist() == [int(torch.linalg.matrix_rank(each)) for each in maps]


def test_ranks_keep_the_leading_shape_and_refuse_nan() -> None:
    maps = torch.eye(4).expand(2, 3, 4, 4).clone()
    maps[0, 1, 2] = 0
    assert matrix_ranks(maps).tolist() == [[4, 3, 4], [4, 4, 4]]
    assert matrix_ranks(maps.double()).tolist() == [[4, 3, 4], [4, 4, 4]]
    assert matrix_ranks(maps[:0]).shape == (0, 3)
    maps[1, 1, 1, 1] = torch.nan
    with pytest.raises(PruningError, match="NaN or infinity"):
        matrix_ranks(maps)


# The plot


def test_the_plot_has_a_panel_for_each_group_and_a_line_for_each_cut(
    network: Small, images: Tensor
) -> None:
    pytest.importorskip("matplotlib")
    found = measure(network, analyse(network, images), images)
    page = scores_svg(found, {"mild": {"stem": (0, 1)}, "aggressive": {}}, "drp")
    assert page.count("<svg") == 1
    for text in ("stem", "left", "last", "hidden", "mild", "aggressive", "drp, 10 images"):
        assert text in page, text


# Bad input


def test_an_unknown_method_is_refused(network: Small, images: Tensor) -> None:
    with pytest.raises(PruningError, match="'best' is unknown; known: drp, drp_rank, magnitude"):
        measure(network, analyse(network, images), images, method="best")


def test_what_a_method_needs_is_named(network: Small, images: Tensor) -> None:
    analysis = analyse(network, images)
    with pytest.raises(PruningError, match=r"'bn_scale' needs a BatchNorm .* 'left' has none"):
        measure(network, analysis, images, method="bn_scale")
    with pytest.raises(PruningError, match=r"'taylor' .* needs the images' targets"):
        measure(network, analysis, images, method="taylor")
    with pytest.raises(DataError, match="expected 10 targets, one for each image, got 9"):
        measure(network, analysis, images, method="taylor", targets=torch.zeros(9).long())


@pytest.mark.parametrize("method", ["drp", "hrank", "magnitude"])
def test_weights_that_are_not_finite_are_refused_by_name(
    network: Small, images: Tensor, method: str
) -> None:
    analysis = analyse(network, images)
    with torch.no_grad():
        network.last.weight[0, 0, 0, 0] = torch.nan

    with pytest.raises(PruningError, match=r"'last\.weight' holds NaN"):
        measure(network, analysis, images, method=method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:0], r"N of 1 or more, found torch.float32 \[0, 3, 8, 8\]"),
        (lambda x: (x * 10).byte(), r"float32 \[N, ...\], N of 1 or more, found torch.uint8"),
        (lambda x: x[:, :1], r"images of shape \[1, 8, 8\]: .* to have 3 channels"),
        (lambda x: x[:, :, :7, :7].repeat(1, 1, 2, 2), r"images of shape \[3, 14, 14\]"),
        (lambda x: x / 0, "calibration images hold NaN or infinity"),
    ],
)
def test_bad_calibration_images_are_refused(
    network: Small, images: Tensor, change: Callable[[Tensor], Tensor], message: str
) -> None:
    analysis = analyse(network, images)
    with pytest.raises(DataError, match=message):
        measure(network, analysis, change(images))


def test_scores_that_overflow_are_refused(network: Small, images: Tensor) -> None:
    analysis = analyse(network, images)
    with torch.no_grad():
        network.stem.weight.fill_(3e38)
    with pytest.raises(PruningError, match=r"not finite|NaN or infinity"):
        measure(network, analysis, images)
