"""The exact choice of widths: brute force over small networks finds nothing better."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.models import build
from greenprune.pruning import budget, surgery
from greenprune.pruning.blocks import Block, removable_blocks
from greenprune.pruning.cost import Cost, count
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.limits import Limit, parse_all
from greenprune.pruning.optimise import (
    ROUNDING,
    Choice,
    Ints,
    Prices,
    Term,
    choose,
    exact_prices,
)
from greenprune.pruning.program import stdout_to_stderr
from greenprune.pruning.scores import Scores

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 10, 3, padding=1)
        self.third = nn.Conv2d(10, 6, 3, stride=2)
        self.out = nn.Linear(6 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        return self.out(torch.flatten(x, 1))  # type: ignore[no-any-return]


class Branch(nn.Module):
    """A residual block with one group of its own."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inside, 3, padding=1)
        self.conv2 = nn.Conv2d(inside, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv2(torch.relu(self.conv1(x)))))


class Mixer(nn.Module):
    """A residual block that concatenates, and has layers on the stream alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.square = nn.Conv2d(width, width, 1)
        self.left = nn.Conv2d(width, 4, 1)
        self.right = nn.Conv2d(width, 6, 1)
        self.back = nn.Conv2d(10, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.square(self.depthwise(x))
        y = torch.relu(torch.cat([self.left(y), self.right(y)], dim=1))
        return torch.relu(x + self.back(y))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = Branch(8, 6)
        self.two = Branch(8, 4)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(torch.relu(self.stem(x))))
        return self.out(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.mixer = Mixer(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(torch.relu(self.stem(x)))
        return self.out(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Concatenated(nn.Module):
    """Three branches read together by two layers, and part of the image with them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.middle = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 5, 1)
        self.join = nn.Conv2d(18, 6, 1)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.cat([self.left(x), self.middle(x), x, self.right(x)], dim=1))
        return self.out(torch.relu(self.join(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Separable(nn.Module):
    """Depthwise layers, one with a multiplier, read by pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.wider = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.last = nn.Conv2d(12, 9, 1)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(torch.relu(self.depthwise(torch.relu(self.stem(x)))))
        x = self.last(torch.relu(self.wider(torch.relu(x))))
        return self.out(torch.relu(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


NETWORKS = {each.__name__: each for each in (Plain, Residual, Mixed, Concatenated, Separable)}


@cache
def prepared(name: str) -> tuple[nn.Module, Analysis, dict[str, Block]]:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    return network, analyse(network, IMAGES), removable_blocks(network, IMAGES)


def some_scores(analysis: Analysis, seed: int) -> Scores:
    """Of different sizes, with ties and zeros."""
    generator = np.random.default_rng(seed)
    return {
        group.name: 10.0 ** generator.uniform(-1, 1) * np.round(generator.random(group.channels), 1)
        for group in analysis.groups
    }


def staircase(analysis: Analysis, seed: int) -> Prices:
    """Any table: costs that rise with both widths on the whole, in jumps, up and down."""
    generator = np.random.default_rng(seed)
    terms = []
    for layer in analysis.layers:
        shape = layer.in_width + 1, layer.out_width + 1
        table = np.multiply.outer(*(np.arange(size) for size in shape)) / math.prod(shape)
        table = table + generator.random(shape) * generator.choice([0.0, 0.1, 0.5])
        terms.append(
            Term(
                module=layer.module,
                in_width=layer.in_width,
                out_width=layer.out_width,
                in_groups=layer.in_groups,
                out_groups=layer.out_groups,
                cost=lambda ins, outs, table=table: table[ins, outs],
            )
        )
    return Prices(constant=0.1, terms=terms)


class Brute:
    """Every choice of a small network, priced without the code under test."""

    def __init__(
        self,
        analysis: Analysis,
        scores: Scores,
        prices: Mapping[str, Prices],
        multiple: int,
        keep: float,
        inner: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.choices = list(self._all(analysis, multiple, keep, inner))
        total = sum(values.sum() for values in scores.values())
        lost = [
            sum(
                np.sort(scores[group.name])[: group.channels - widths[group.name]].sum()
                for group in analysis.groups
            )
            for widths, _ in self.choices
        ]
        self.kept = 1 - np.array(lost) / (total or 1)
        self.costs = {
            name: np.array(
                [each.constant + sum(self._cost(t, *c) for t in each.terms) for c in self.choices]
            )
            for name, each in prices.items()
        }

    @staticmethod
    def _all(
        analysis: Analysis, multiple: int, keep: float, inner: Mapping[str, tuple[str, ...]]
    ) -> Iterator[tuple[dict[str, int], tuple[str, ...]]]:
        for states in itertools.product([False, True], repeat=len(inner)):
            gone = tuple(name for name, state in zip(inner, states, strict=True) if state)
            inside = {group for name in gone for group in inner[name]}
            options = []
            for group in analysis.groups:
                floor = max(1, math.ceil(keep * group.channels))
                fit = [w for w in range(1, group.channels) if w % multiple == 0 and w >= floor]
                options.append([0] if group.name in inside else [*fit, group.channels])
            for widths in itertools.product(*options):
                names = [group.name for group in analysis.groups]
                yield dict(zip(names, widths, strict=True)), gone

    @staticmethod
    def _cost(term: Term, widths: dict[str, int], gone: tuple[str, ...]) -> float:
        if any(term.module.startswith(f"{name}.") for name in gone):
            return 0.0
        ins, outs = (
            np.array([sum(t * widths[g] for g, t in groups.items()) + fixed])
            for groups, fixed in (
                (term.in_groups, term.in_width - _dense(term.in_groups)),
                (term.out_groups, term.out_width - _dense(term.out_groups)),
            )
        )
        return float(term.cost(ins, outs)[0])


CHANNELS: dict[str, int] = {}


def _dense(groups: Mapping[str, int]) -> int:
    return sum(times * CHANNELS[name] for name, times in groups.items())


def everything(
    name: str, seed: int, multiple: int, keep: float, depth: bool
) -> tuple[Analysis, Scores, dict[str, Prices], dict[str, Block], Brute]:
    _, analysis, found = prepared(name)
    blocks = found if depth else {}
    inner = {
        block: tuple(g.name for g in analysis.groups if g.name.startswith(f"{block}."))
        for block in blocks
    }
    scores = some_scores(analysis, seed)
    measured = {
        "latency_ms": staircase(analysis, seed + 1),
        "energy_mj": staircase(analysis, seed + 2),
    }
    CHANNELS.clear()
    CHANNELS.update({group.name: group.channels for group in analysis.groups})
    every = {**exact_prices(analysis), **measured}
    return analysis, scores, measured, blocks, Brute(analysis, scores, every, multiple, keep, inner)


def test_the_networks_are_what_the_tests_speak_of() -> None:
    groups = {name: [g.name for g in prepared(name)[1].groups] for name in NETWORKS}

    assert groups["Residual"] == ["stem", "one.conv1", "two.conv1"]
    assert groups["Mixed"] == ["stem", "mixer.left", "mixer.right"]
    assert {name: list(prepared(name)[2]) for name in NETWORKS} == {
        "Plain": [],
        "Residual": ["one", "two"],
        "Mixed": ["mixer"],
        "Concatenated": [],
        "Separable": [],
    }
    layers = {layer.module: layer for layer in prepared("Concatenated")[1].layers}
    assert len(layers["join"].in_groups) == 3
    layers = {layer.module: layer for layer in prepared("Mixed")[1].layers}
    assert layers["mixer.square"].in_groups == layers["mixer.square"].out_groups == {"stem": 1}


@given(
    st.sampled_from(sorted(NETWORKS)),
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.3, 0.5]),
    st.booleans(),
    st.dictionaries(
        st.sampled_from(["macs", "params", "latency_ms", "energy_mj"]),
        st.floats(0.0, 1.0),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=30, deadline=None)
def test_brute_force_finds_nothing_better(
    name: str, seed: int, multiple: int, keep: float, depth: bool, tight: dict[str, float]
) -> None:
    """Each limit lies between the least and the most that the quantity takes."""
    analysis, scores, prices, blocks, brute = everything(name, seed, multiple, keep, depth)
    ranges = {q: (brute.costs[q].min(), brute.costs[q].max()) for q in tight}
    most = {q: ranges[q][0] + tight[q] * (ranges[q][1] - ranges[q][0]) for q in tight}
    limits = [Limit(quantity=q, value=float(value)) for q, value in most.items()]  # type: ignore[arg-type]
    fits = np.all([brute.costs[q] <= most[q] * (1 + ROUNDING) for q in most], axis=0)

    def found() -> Choice:
        return choose(
            analysis,
            scores,
            limits,
            prices=prices,
            width_multiple=multiple,
            keep_at_least=keep,
            blocks=blocks,
            gap=0.0,
        )

    if not fits.any():
        with pytest.raises(PruningError, match="not all at once"):
            found()
        return
    choice = found()
    assert choice.importance_kept == pytest.approx(brute.kept[fits].max(), abs=2e-6)
    widths = {
        group.name: group.channels - len(choice.removed.get(group.name, ()))
        for group in analysis.groups
    }
    for block in choice.removed_blocks:
        widths.update({g: 0 for g in widths if g.startswith(f"{block}.")})
    place = brute.choices.index((widths, choice.removed_blocks))
    assert choice.importance_kept == pytest.approx(brute.kept[place])
    for quantity, value in choice.predicted.items():
        assert value == pytest.approx(brute.costs[quantity][place])
        assert value <= most.get(quantity, np.inf) * (1 + ROUNDING)
    for group, channels in choice.removed.items():
        kept = np.delete(scores[group], channels)
        assert scores[group][list(channels)].max() <= kept.min(), "the lowest go first"
    assert 0 <= choice.gap < 1e-4


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_what_is_predicted_is_what_is_left_of_the_real_network(name: str) -> None:
    network, analysis, blocks = prepared(name)
    scores = some_scores(analysis, 3)

    for share in (0.75, 0.5, 0.35):
        limits = parse_all([f"macs x{share}", "params x0.8"])
        choice = choose(
            analysis, scores, limits, width_multiple=1, keep_at_least=0.1, blocks=blocks
        )
        smaller = surgery.compact(network, analysis, choice.removed)
        for block in choice.removed_blocks:
            surgery.remove_block(smaller, block)
        left = count(smaller, IMAGES)
        assert Cost(macs=int(choice.predicted["macs"]), params=int(choice.predicted["params"])) == (
            left
        )
        whole = count(network, IMAGES)
        assert choice.dense == {"macs": whole.macs, "params": whole.params}
        assert left.macs <= share * whole.macs
        assert left.params <= 0.8 * whole.params


@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 10_000), st.floats(0.2, 1.0))
@settings(max_examples=25, deadline=None)
def test_never_worse_than_the_greedy_choice_at_the_same_macs(
    name: str, seed: int, share: float
) -> None:
    _, analysis, _ = prepared(name)
    scores = some_scores(analysis, seed)
    try:
        greedy = budget.choose(analysis, scores, macs=share, width_multiple=2)
    except PruningError:
        assume(False)
    total = sum(values.sum() for values in scores.values())
    kept = 1 - sum(scores[group][list(gone)].sum() for group, gone in greedy.items()) / total

    choice = choose(
        analysis, scores, [Limit(quantity="macs", share=share)], width_multiple=2, gap=0.0
    )

    assert choice.importance_kept >= kept - 2e-6


def in_proportion(analysis: Analysis) -> Scores:
    """Every channel scores one."""
    return {group.name: np.ones(group.channels) for group in analysis.groups}


def test_a_block_goes_where_that_is_cheaper_than_width() -> None:
    """Layers that cost the same at any width: only depth saves."""
    _, analysis, blocks = prepared("Residual")
    flat = [
        Term(
            module=layer.module,
            in_width=layer.in_width,
            out_width=layer.out_width,
            in_groups=layer.in_groups,
            out_groups=layer.out_groups,
            cost=lambda ins, outs: np.ones(len(ins)),
        )
        for layer in analysis.layers
    ]
    prices = {"latency_ms": Prices(constant=0.0, terms=flat)}
    limits = parse_all(["latency_ms <= 4"])  # of the six layers, two are in each block

    def chosen(**own: float) -> Choice:
        return choose(
            analysis,
            in_proportion(analysis),
            limits,
            prices=prices,
            width_multiple=1,
            blocks=blocks,
            block_importance=own,
        )

    least = chosen()
    assert least.removed_blocks == ("two",)  # 4 channels inside, and not 6
    assert least.removed == {}
    assert least.importance_kept == pytest.approx(14 / 18)
    assert least.predicted["latency_ms"] == 4

    other = chosen(two=100.0)
    assert other.removed_blocks == ("one",)
    assert other.importance_kept == pytest.approx(1 - 6 / (18 + 96))

    with pytest.raises(PruningError, match=r"6 \(100\.0% of the dense\).*or allow blocks to go"):
        choose(analysis, in_proportion(analysis), limits, prices=prices, width_multiple=1)


def test_a_block_stays_where_width_is_cheaper_and_where_nothing_is_asked() -> None:
    _, analysis, blocks = prepared("Residual")
    scores = in_proportion(analysis)
    scores["stem"] = np.full(8, 1e-3)

    mild = choose(analysis, scores, parse_all(["macs x0.7"]), width_multiple=1, blocks=blocks)
    nothing = choose(analysis, scores, [], width_multiple=1, blocks=blocks)

    assert mild.removed_blocks == nothing.removed_blocks == ()
    assert list(mild.removed) == ["stem"]
    assert nothing.removed == {}
    assert nothing.importance_kept == 1


def test_a_block_that_the_analysis_does_not_account_for_stays() -> None:
    _, analysis, blocks = prepared("Residual")
    strange = {
        name: Block(branches=block.branches, saves=Cost(macs=block.saves.macs + 1, params=1))
        for name, block in blocks.items()
    }

    with pytest.raises(PruningError, match="no block may go"):
        choose(analysis, in_proportion(analysis), parse_all(["macs x0.1"]), blocks=strange)


def test_dead_channels_go_though_nothing_asks_for_it_but_not_where_that_costs_more() -> None:
    _, analysis, _ = prepared("Plain")
    scores = in_proportion(analysis)
    scores["first"][[1, 2, 5]] = 0.0

    def dearer_when_narrow(ins: Ints, outs: Ints) -> np.ndarray:
        return np.where(outs < 6, 10.0, 1.0)

    term = Term(
        module="first",
        in_width=3,
        out_width=8,
        in_groups={},
        out_groups={"first": 1},
        cost=dearer_when_narrow,
    )
    prices = {"latency_ms": Prices(constant=0.0, terms=[term])}

    freely = choose(analysis, scores, [], width_multiple=1)
    priced = choose(analysis, scores, [], prices=prices, width_multiple=1)

    assert freely.removed == {"first": (1, 2, 5)}
    assert priced.removed == {"first": (1, 2)}
    assert freely.importance_kept == priced.importance_kept == 1


def test_the_order_of_what_is_given_changes_nothing_and_runs_repeat() -> None:
    _, analysis, blocks = prepared("Residual")
    scores = some_scores(analysis, 5)
    prices = {"latency_ms": staircase(analysis, 6), "energy_mj": staircase(analysis, 7)}
    limits = parse_all(["latency x0.8", "energy x0.8", "macs x0.6"])

    def backwards(content: Mapping[str, object]) -> dict[str, object]:
        return dict(reversed(list(content.items())))

    once = choose(analysis, scores, limits, prices=prices, width_multiple=1, blocks=blocks)
    again = choose(analysis, scores, limits, prices=prices, width_multiple=1, blocks=blocks)
    other = choose(
        analysis,
        backwards(scores),  # type: ignore[arg-type]
        limits[::-1],
        prices=backwards(prices),  # type: ignore[arg-type]
        width_multiple=1,
        blocks=backwards(blocks),  # type: ignore[arg-type]
    )

    assert once.removed == again.removed == other.removed
    assert once.removed_blocks == again.removed_blocks == other.removed_blocks
    assert once.importance_kept == other.importance_kept


def test_where_all_widths_are_too_many_it_goes_from_coarse_to_fine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, analysis, _ = prepared("Plain")
    scores, limits = some_scores(analysis, 8), parse_all(["macs x0.5"])
    exact = choose(analysis, scores, limits, width_multiple=1, gap=0.0)
    monkeypatch.setattr("greenprune.pruning.optimise.MOST_VARIABLES", 120)

    coarse = choose(analysis, scores, limits, width_multiple=1)

    assert coarse.predicted["macs"] <= 0.5 * coarse.dense["macs"]
    assert 0.9 * exact.importance_kept <= coarse.importance_kept <= exact.importance_kept + 1e-9
    assert coarse.importance_kept * (1 + coarse.gap) == pytest.approx(1.0), "nothing is proven"


def test_limits_out_of_reach_name_the_smallest_that_can_be_reached() -> None:
    analysis, scores, prices, _, brute = everything("Plain", 1, 2, 0.5, False)
    limits = parse_all(["latency_ms <= 0.01", "macs x0.01", "params x1"])

    with pytest.raises(PruningError) as caught:
        choose(analysis, scores, limits, prices=prices, width_multiple=2, keep_at_least=0.5)

    message = str(caught.value)
    for quantity in ("latency_ms", "macs", "params"):
        least = brute.costs[quantity].min()
        assert f"the smallest {quantity} that can be reached is {least:.7g} (" in message
    assert "'latency_ms <= 0.01' allows 0.01" in message
    assert "multiples of 2, at least 50% of every group is kept and no block may go" in message
    assert "not all at once" not in message
    assert message.endswith(
        "Raise the budget, lower prune.width_multiple or prune.keep_at_least, or allow blocks to go"
    )


def test_the_smallest_that_can_be_reached_is_reached() -> None:
    analysis, scores, prices, blocks, brute = everything("Mixed", 4, 2, 0.3, True)
    for quantity in ("macs", "latency_ms"):
        least = float(brute.costs[quantity].min())
        limit = Limit(quantity=quantity, value=least)  # type: ignore[arg-type]

        choice = choose(
            analysis,
            scores,
            [limit],
            prices=prices,
            width_multiple=2,
            keep_at_least=0.3,
            blocks=blocks,
        )

        assert choice.predicted[quantity] == pytest.approx(least, rel=1e-12)


def test_what_has_no_price_or_no_finite_one_is_refused() -> None:
    _, analysis, _ = prepared("Plain")
    scores = in_proportion(analysis)
    limits = parse_all(["latency x0.5"])
    with pytest.raises(PruningError, match=r"'latency x0\.5'.*\(macs, params\).*got latency_ms"):
        choose(analysis, scores, limits)

    term = Term(
        module="second",
        in_width=8,
        out_width=10,
        in_groups={"first": 1},
        out_groups={"second": 1},
        cost=lambda ins, outs: np.where(outs == 4, np.nan, 1.0),
    )
    prices = {"latency_ms": Prices(constant=0.0, terms=[term])}
    with pytest.raises(PruningError, match=r"'second': expected a finite cost at .* 4 outputs"):
        choose(analysis, scores, limits, prices=prices, width_multiple=2)


def test_a_network_without_groups_has_one_choice() -> None:
    _, analysis, _ = prepared("Plain")
    none = analysis.without({group.name: "frozen" for group in analysis.groups})

    choice = choose(none, {}, parse_all(["macs x1"]))

    assert choice.removed == {}
    assert choice.importance_kept == 1
    with pytest.raises(PruningError, match=r"\(100\.0% of the dense\)"):
        choose(none, {}, parse_all(["macs x0.99"]))


def test_what_c_code_prints_stays_out_of_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_to_stderr():
        ctypes.CDLL(None).printf(b"a line of a library's own\n")
    print("ours")

    captured = capfd.readouterr()
    assert captured.out == "ours\n"
    assert captured.err == "a line of a library's own\n"


def test_a_real_residual_network_within_three_budgets_at_once() -> None:
    torch.manual_seed(0)
    network = build("greenprune.models:resnet20", {}).eval()
    example = torch.randn(2, 3, 32, 32)
    analysis = analyse(network, example)
    blocks = removable_blocks(network, example)
    limits = parse_all(["macs x0.5", "params x0.6", "latency x0.6"])
    scores = {
        group.name: np.random.default_rng(0).random(group.channels) * len(group.producers)
        for group in analysis.groups
    }
    prices = {"latency_ms": staircase(analysis, 9)}

    choice = choose(analysis, scores, limits, prices=prices, blocks=blocks)

    smaller = surgery.compact(network, analysis, choice.removed)
    for block in choice.removed_blocks:
        surgery.remove_block(smaller, block)
    assert count(smaller, example) == Cost(
        macs=int(choice.predicted["macs"]), params=int(choice.predicted["params"])
    )
    for limit in limits:
        assert limit.share is not None
        assert choice.predicted[limit.quantity] <= limit.share * choice.dense[limit.quantity]
    assert choice.gap <= 1e-3
