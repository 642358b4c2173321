"""The selector: MSP at the start, shipped only where it helps, one graph with its network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune.adaptive import selector
from greenprune.adaptive.selector import (
    MspNetwork,
    ScoredNetwork,
    SelectorHead,
    SelectorResult,
    harm_coverage_area,
    tap,
)
from greenprune.errors import PruningError, WeightsError
from greenprune.models import lenet5
from greenprune.recipe import SelectorSettings

FEATURES, CLASSES = 6, 4
QUICK = SelectorSettings(hidden=16, epochs=100)


def answers(count: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator)
    return features, scale * torch.randn(count, CLASSES, generator=generator)


def moved_head(seed: int = 0) -> SelectorHead:
    """A head whose correction is not zero and which standardises."""
    torch.manual_seed(seed)
    head = SelectorHead(FEATURES, CLASSES, 8)
    for value in head.parameters():
        nn.init.normal_(value)
    head.mean.normal_()
    head.std.uniform_(0.5, 2.0)
    return head.eval()


def msp(logits: Tensor) -> Tensor:
    return torch.softmax(logits.double(), dim=1).amax(dim=1)


@given(
    st.lists(
        st.lists(st.floats(-200, 200, width=32), min_size=3, max_size=3), min_size=1, max_size=8
    )
)
@settings(max_examples=50, deadline=None)
def test_an_untrained_head_is_msp_also_for_saturated_logits(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    head = SelectorHead(2, 3, 4)

    score = head(torch.zeros(len(rows), 2), logits)

    assert score.dtype == torch.float32
    assert torch.allclose(score.double(), msp(logits), rtol=2e-6, atol=0)


def test_saturated_answers_keep_their_order_before_the_sigmoid() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0], [80.0, 0.0, 0.0], [1e4, -1e4, 0.0]])

    inputs, msp_logit = SelectorHead(1, 3, 4).describe(torch.zeros(3, 1), logits)

    assert torch.isfinite(inputs).all()
    assert torch.allclose(msp_logit[:2], torch.tensor([100.0, 80.0]) - np.log(2.0))
    assert msp_logit[2] == 1e4


def test_the_heads_inputs_are_features_top_logits_and_the_softmaxs_shape() -> None:
    features, logits = answers(5, seed=1)

    inputs, msp_logit = SelectorHead(FEATURES, CLASSES, 8).describe(features, logits)

    p = np.sort(torch.softmax(logits.double(), 1).numpy(), axis=1)[:, ::-1]
    expected = np.column_stack(
        [
            features.numpy(),
            np.sort(logits.numpy(), axis=1)[:, ::-1][:, :3],
            p[:, 0],
            p[:, 0] - p[:, 1],
            -(p * np.log(p)).sum(axis=1),
            np.log(np.exp(logits.double().numpy()).sum(axis=1)),
        ]
    )
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(msp_logit.numpy(), np.log(p[:, 0] / (1 - p[:, 0])), rtol=1e-4)


def test_two_classes_are_enough() -> None:
    logits = torch.tensor([[0.0, 2.0], [-50.0, 50.0]])

    score = SelectorHead(1, 2, 4)(torch.zeros(2, 1), logits)

    assert torch.allclose(score.double(), msp(logits))


def test_the_score_of_an_input_does_not_depend_on_its_batch() -> None:
    features, logits = answers(32, seed=2)
    head = moved_head()

    together = head(features, logits)
    alone = torch.cat([head(features[i : i + 1], logits[i : i + 1]) for i in range(32)])

    assert together.std() > 0.05
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)


def slow_area(scores: NDArray[np.float64], harm: NDArray[np.float64]) -> float:
    """For each coverage, count the harmed among the accepted; then average over coverages."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    shares = [sum(harm[i] for i in ranked[:k]) / len(harm) for k in range(1, len(harm) + 1)]
    return float(sum(shares) / len(shares))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_harm_coverage_area_against_brute_force(items: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in items])
    harm = np.array([float(harmed) for _, harmed in items])

    assert harm_coverage_area(scores, harm) == pytest.approx(slow_area(scores, harm))


def test_harm_coverage_area_by_hand() -> None:
    harm = np.array([0.0, 0.0, 0.0, 1.0])

    assert harm_coverage_area(np.array([4.0, 3.0, 2.0, 1.0]), harm) == pytest.approx(1 / 16)
    assert harm_coverage_area(np.array([1.0, 2.0, 3.0, 4.0]), harm) == pytest.approx(4 / 16)
    assert harm_coverage_area(np.array([0.1, 0.2, 0.3, np.nan]), harm) == pytest.approx(1 / 16)
    assert harm_coverage_area(np.arange(4.0), np.zeros(4)) == 0.0


def revealed(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first feature says where the aggressive network is wrong; its logits do not."""
    features, logits = answers(count, seed)
    harm = features[:, 0] > 0.8
    return features, logits, torch.ones(count), 1.0 - harm.float()


def hidden(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Harm that only MSP says something about; features are noise."""
    features, logits = answers(count, seed)
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1))
    harm = draws > msp(logits)
    return features, logits, torch.ones(count), 1.0 - harm.float()


@pytest.fixture(scope="module")
def shipped() -> SelectorResult:
    """Trained where features reveal harm."""
    return selector.train(*revealed(500, seed=3), QUICK, seed=0)


def test_the_head_is_shipped_where_features_reveal_harm(shipped: SelectorResult) -> None:
    assert shipped.head is not None
    assert shipped.area_head < 0.5 * shipped.area_msp
    assert "; better in 95%" in shipped.reason
    features, logits, _, aggressive = revealed(500, seed=4)
    with torch.no_grad():
        scores = shipped.head(features, logits).double()
    harm = (1.0 - aggressive).double().numpy()
    fresh = harm_coverage_area(scores.numpy(), harm)
    assert fresh < 0.5 * harm_coverage_area(msp(logits).numpy(), harm), "on new inputs too"


@pytest.mark.parametrize("seed", range(3))
def test_msp_is_shipped_where_features_are_noise(seed: int) -> None:
    data = hidden(500, seed=10 + seed)

    made = selector.train(*data, QUICK, seed=seed)

    assert made.head is None
    assert "not better" in made.reason
    scores = msp(data[1])
    assert set(made.thresholds) & set(scores.float().double().tolist()), "thresholds are MSP's"
    assert made.thresholds[0] <= scores.max() + 1e-6
    accepted = [float((scores >= value).double().mean()) for value in made.thresholds]
    assert accepted[0] < 0.05
    assert accepted[-1] > 0.95


@pytest.mark.parametrize("harmed", [0.0, 1.0])
def test_msp_is_shipped_where_there_is_nothing_to_learn(harmed: float) -> None:
    features, logits = answers(100, seed=5)

    made = selector.train(
        features, logits, torch.full((100,), harmed), torch.zeros(100), QUICK, seed=0
    )

    assert made.head is None
    assert "too few" in made.reason or "not better" in made.reason
    assert made.area_head == pytest.approx(made.area_msp)


def test_an_answer_harms_only_where_mild_is_better() -> None:
    """Where both are wrong, or aggressive alone is right, going on to mild gains nothing."""
    features, logits = answers(200, seed=6)
    mild = torch.zeros(200)
    aggressive = (torch.arange(200) % 2).float()

    made = selector.train(features, logits, mild, aggressive, QUICK, seed=0)

    assert (made.head, made.area_msp) == (None, 0.0)


def test_thresholds_are_strict_to_loose_and_of_the_shipped_score(shipped: SelectorResult) -> None:
    assert shipped.head is not None
    assert len(shipped.thresholds) > 50
    assert list(shipped.thresholds) == sorted(set(shipped.thresholds), reverse=True)
    features, logits, _, _ = revealed(500, seed=3)
    with torch.no_grad():
        scores = shipped.head(features, logits).double()
    assert scores.min() <= shipped.thresholds[-1]
    assert shipped.thresholds[0] <= scores.max()
    accepted = [float((scores >= value).double().mean()) for value in shipped.thresholds]
    assert accepted[0] < 0.05, "the strictest accepts next to nothing"
    assert accepted[-1] > 0.95


def test_training_is_determined_by_its_seed_and_leaves_the_global_generator() -> None:
    data = revealed(200, seed=7)
    state = torch.get_rng_state()

    first, again, other = (selector.train(*data, QUICK, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(torch.get_rng_state(), state)
    assert first.head is not None
    assert again.head is not None
    assert other.head is not None
    assert selector.to_bytes(first.head) == selector.to_bytes(again.head)
    assert (first.thresholds, first.reason) == (again.thresholds, again.reason)
    assert selector.to_bytes(first.head) != selector.to_bytes(other.head)


def test_bytes_round_trip() -> None:
    features, logits = answers(8, seed=8)
    head, other = moved_head(0), moved_head(1)
    assert not torch.equal(head(features, logits), other(features, logits))

    selector.from_bytes(other, selector.to_bytes(head))

    assert torch.equal(head(features, logits), other(features, logits))


@pytest.mark.parametrize("content", [b"", b"garbage", selector.to_bytes(SelectorHead(2, 4, 8))])
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(WeightsError, match=r"selector\.safetensors"):
        selector.from_bytes(SelectorHead(FEATURES, CLASSES, 8), content)


def test_tap_gives_the_last_linears_input_and_the_same_logits() -> None:
    torch.manual_seed(0)
    network = lenet5().eval()
    images = torch.randn(3, 1, 32, 32)
    seen: list[Tensor] = []
    handle = network.fc3.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    expected = network(images)
    handle.remove()

    logits, features = tap(network)(images)

    assert torch.equal(logits, expected)
    assert features.shape == (3, 64)
    assert torch.equal(features, seen[0])


def test_tap_shares_the_networks_weights() -> None:
    network = lenet5().eval()
    tapped = tap(network)
    with torch.no_grad():
        network.fc3.bias.add_(1.0)
    images = torch.randn(2, 1, 32, 32)

    assert torch.equal(tapped(images)[0], network(images))


def test_tap_pools_what_a_convolution_reads_that_classifies() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
    network = nn.Sequential(body, nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(3, 1, 8, 8)

    logits, features = tap(network)(images)

    assert torch.equal(logits, network(images))
    assert torch.allclose(features, body(images).mean(dim=(2, 3)))


class Residual(nn.Module):
    """Its output is a sum: no one layer is the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [Residual(), nn.Sequential(nn.Flatten(), nn.ReLU())])
def test_tap_refuses_a_network_without_a_classifier(network: nn.Module) -> None:
    with pytest.raises(PruningError, match=r"expected an nn\.Linear or nn\.Conv2d"):
        tap(network)


def test_tap_refuses_a_network_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(PruningError, match="cannot be traced"):
        tap(Branching())


def test_a_scored_network_answers_as_its_two_parts() -> None:
    torch.manual_seed(0)
    network, images = lenet5(num_classes=CLASSES).eval(), torch.randn(5, 1, 32, 32)
    head = SelectorHead(64, CLASSES, 8)
    nn.init.normal_(head.correction.weight)

    logits, score = ScoredNetwork(network, head).eval()(images)

    tapped, features = tap(network)(images)
    assert torch.equal(logits, tapped)
    assert torch.equal(score, head(features, tapped))
    assert score.shape == (5,)
    assert not torch.allclose(score.double(), msp(logits), atol=1e-3)


def test_an_msp_network_answers_as_its_network_and_an_untrained_head() -> None:
    torch.manual_seed(0)
    network, images = lenet5(num_classes=CLASSES).eval(), torch.randn(5, 1, 32, 32)

    logits, score = MspNetwork(network)(images)

    assert torch.equal(logits, network(images))
    untrained = ScoredNetwork(network, SelectorHead(64, CLASSES, 8)).eval()
    assert torch.allclose(score, untrained(images)[1], rtol=2e-6)
    assert torch.allclose(score.double(), msp(logits))
