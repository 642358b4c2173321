"""Who gives up how much: the budget is met, on whole blocks, from the lowest score up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.models import build
from greenprune.pruning import budget, surgery
from greenprune.pruning.budget import choose
from greenprune.pruning.cost import count
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.scores import Scores, measure


class Small(nn.Module):
    """A residual block, a layer of odd width and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inside = nn.Conv2d(16, 13, 3, padding=1)
        self.back = nn.Conv2d(13, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, 3, stride=2)
        self.hidden = nn.Linear(24 * 9, 20)
        self.out = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.back(torch.relu(self.inside(x))))
        x = torch.flatten(torch.relu(self.wide(x)), 1)
        return self.out(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NETWORK = Small().eval()
ANALYSIS = analyse(NETWORK, IMAGES)
DENSE = ANALYSIS.predict_cost({})
WIDTHS = {group.name: group.channels for group in ANALYSIS.groups}


def some_scores(analysis: Analysis, seed: int) -> Scores:
    """Of very different sizes, with ties."""
    generator = np.random.default_rng(seed)
    return {
        group.name: 10.0 ** generator.integers(-3, 3)
        * np.round(generator.random(group.channels), 1)
        for group in analysis.groups
    }


def counts(removed: budget.Removed) -> dict[str, int]:
    return {name: len(channels) for name, channels in removed.items()}


def test_the_groups_are_those_that_the_tests_speak_of() -> None:
    assert WIDTHS == {"stem": 16, "inside": 13, "wide": 24, "hidden": 20}


@given(
    st.integers(0, 1000),
    st.floats(0.05, 1.0),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([0.01, 0.1, 0.2, 0.5, 0.8]),
)
@settings(max_examples=100, deadline=None)
def test_whatever_is_asked_for_holds(seed: int, macs: float, multiple: int, keep: float) -> None:
    scores = some_scores(ANALYSIS, seed)
    try:
        removed = choose(ANALYSIS, scores, macs=macs, width_multiple=multiple, keep_at_least=keep)
    except PruningError:
        assert cheapest(multiple, keep) > macs * DENSE.macs, "no cut below the budget was left"
        return

    assert ANALYSIS.predict_cost(counts(removed)).macs <= macs * DENSE.macs
    for name, channels in removed.items():
        width = WIDTHS[name] - len(channels)
        assert width % multiple == 0, name
        assert width >= math.ceil(keep * WIDTHS[name]), name
        assert width >= 1, name
        assert list(channels) == sorted(set(channels))
        kept = np.delete(scores[name], channels)
        assert scores[name][list(channels)].max() <= kept.min(), "the lowest go first"


def cheapest(multiple: int, keep: float) -> int:
    """MACs with every group at the least width that is allowed."""
    least = {
        name: min(
            [w for w in range(multiple, width, multiple) if w >= math.ceil(keep * width)] or [width]
        )
        for name, width in WIDTHS.items()
    }
    return ANALYSIS.predict_cost({name: WIDTHS[name] - w for name, w in least.items()}).macs


@given(st.integers(0, 1000), st.floats(0.1, 0.9), st.sampled_from([1, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_no_more_is_cut_than_the_last_step_needs(seed: int, macs: float, multiple: int) -> None:
    """Some group's last block, put back, would break the budget."""
    scores = {name: values + 1e-6 for name, values in some_scores(ANALYSIS, seed).items()}
    assume(cheapest(multiple, 0.01) <= macs * DENSE.macs)

    removed = choose(ANALYSIS, scores, macs=macs, width_multiple=multiple, keep_at_least=0.01)

    gone = counts(removed)
    with_a_block_back = [
        ANALYSIS.predict_cost({**gone, name: max(0, count - multiple)}).macs
        for name, count in gone.items()
    ]
    assert any(cost > macs * DENSE.macs for cost in with_a_block_back)


def test_a_budget_of_all_removes_what_is_dead_alone() -> None:
    scores = {name: np.ones(width) for name, width in WIDTHS.items()}
    assert choose(ANALYSIS, scores, macs=1.0) == {}

    scores["stem"][[3, 5, 7]] = 0.0
    scores["hidden"][:] = 0.0

    dead = {"stem": (3, 5, 7), "hidden": tuple(range(16))}  # the floor keeps a fifth
    assert choose(ANALYSIS, scores, macs=1.0, width_multiple=1) == dead


def test_dead_channels_go_in_whole_blocks_beyond_the_budget() -> None:
    """Ten dead ones of 24: eight go, two stay for the sake of the block; none is given back."""
    scores = {name: np.ones(width) for name, width in WIDTHS.items()}
    scores["wide"][:10] = 0.0

    assert choose(ANALYSIS, scores, macs=0.999) == {"wide": tuple(range(8))}


def test_the_first_cut_loses_the_least_score_for_the_macs_that_it_saves() -> None:
    scores = {name: np.ones(width) for name, width in WIDTHS.items()}
    scores["wide"] = np.full(24, 1e-3)

    removed = choose(ANALYSIS, scores, macs=0.99)

    assert counts(removed) == {"wide": 8}


@pytest.mark.parametrize("cheapest_group", sorted(WIDTHS))
def test_the_price_of_a_cut_is_score_for_each_mac_that_it_saves(cheapest_group: str) -> None:
    """Scores in proportion to the MACs make all channels cost the same; one group is cheaper."""
    saved = {name: DENSE.macs - ANALYSIS.predict_cost({name: 1}).macs for name in WIDTHS}
    scores = {name: np.full(width, float(saved[name])) for name, width in WIDTHS.items()}
    scores[cheapest_group] *= 0.9

    macs = (DENSE.macs - saved[cheapest_group] + 0.5) / DENSE.macs
    removed = choose(ANALYSIS, scores, macs=macs, width_multiple=1)

    assert removed == {cheapest_group: (0,)}


def test_a_groups_next_cut_is_priced_by_what_it_loses_further() -> None:
    """Not by all that the group has lost so far, or every group would be cut a little."""
    saved = {name: DENSE.macs - ANALYSIS.predict_cost({name: 1}).macs for name in WIDTHS}
    scores = {name: np.full(width, 1.5 * saved[name]) for name, width in WIDTHS.items()}
    scores["wide"] /= 1.5

    macs = (DENSE.macs - 3 * saved["wide"] + 0.5) / DENSE.macs

    assert choose(ANALYSIS, scores, macs=macs, width_multiple=1) == {"wide": (0, 1, 2)}


def test_widths_count_every_output_that_a_channel_takes() -> None:
    """A depthwise layer of multiplier 2 has two outputs for each channel."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1)
    ).eval()
    analysis = analyse(network, IMAGES)
    removed = {"0": (1, 4)}

    compact = surgery.compact(network, analysis, removed)

    assert budget.widths(analysis, removed) == {"0": 6, "1": 12}
    assert [compact[0].out_channels, compact[1].out_channels] == [6, 12]


def test_ties_go_by_index_so_that_runs_repeat() -> None:
    scores = {name: np.ones(width) for name, width in WIDTHS.items()}
    scores["inside"] = np.zeros(13)

    assert choose(ANALYSIS, scores, macs=0.9)["inside"] == (0, 1, 2, 3, 4)


def test_a_dead_channel_goes_before_all_others() -> None:
    scores = {name: np.ones(width) for name, width in WIDTHS.items()}
    scores["stem"][11] = 0.0

    assert choose(ANALYSIS, scores, macs=0.999, width_multiple=1) == {"stem": (11,)}


@pytest.mark.parametrize(
    ("macs", "multiple", "keep"),
    [(0.01, 8, 0.2), (0.5, 8, 0.9), (0.5, 32, 0.01), (0.0001, 1, 0.01)],
)
def test_a_budget_out_of_reach_says_what_is_reached_and_what_to_do(
    macs: float, multiple: int, keep: float
) -> None:
    reached = cheapest(multiple, keep) / DENSE.macs

    with pytest.raises(PruningError) as caught:
        choose(
            ANALYSIS,
            some_scores(ANALYSIS, 1),
            macs=macs,
            width_multiple=multiple,
            keep_at_least=keep,
        )

    message = str(caught.value)
    assert f"{reached:.1%} of the MACs" in message
    assert f"multiples of {multiple}" in message
    assert "lower prune.width_multiple or prune.keep_at_least" in message


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_predicted_cost_is_that_of_the_network_that_is_really_pruned(data: st.DataObject) -> None:
    removed = {
        name: data.draw(st.sets(st.integers(0, width - 1), max_size=width - 1), label=name)
        for name, width in WIDTHS.items()
    }
    compact = surgery.compact(NETWORK, ANALYSIS, {k: sorted(v) for k, v in removed.items()})

    predicted = ANALYSIS.predict_cost({name: len(gone) for name, gone in removed.items()})

    assert predicted == count(compact, IMAGES)


@pytest.mark.parametrize(("factory", "shape"), [("lenet5", (1, 32, 32)), ("resnet20", (3, 32, 32))])
def test_a_real_network_meets_its_budget_when_it_is_really_pruned(
    factory: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network = build(f"greenprune.models:{factory}", {}).eval()
    example = torch.randn(2, *shape)
    analysis = analyse(network, example)
    scores = measure(network, analysis, example, method="magnitude").scores

    removed = choose(analysis, scores, macs=0.4)
    compact = surgery.prune_channels(network, example, removed)

    found = count(compact, example)
    assert found == analysis.predict_cost(counts(removed))
    assert found.macs <= 0.4 * count(network, example).macs
    modules = dict(compact.named_modules())
    for name, width in budget.widths(analysis, removed).items():
        assert modules[name].get_parameter("weight").shape[0] == width, name
    for name, width in budget.widths(analysis, {}).items():
        assert dict(network.named_modules())[name].get_parameter("weight").shape[0] == width
