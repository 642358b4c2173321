"""Cutting until the budgets hold: the measurement has the last word."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from greenprune import schema
from greenprune.errors import BudgetError, PruningError
from greenprune.pruning import limits, optimise, within
from greenprune.pruning.cost import count
from greenprune.pruning.graph import Analysis, analyse

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = Residual(16), Residual(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(torch.relu(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def analysis(network: nn.Module) -> Analysis:
    return analyse(network, EXAMPLE)


def by_macs(network: nn.Module, analysis: Analysis) -> dict[str, optimise.Prices]:
    """Milliseconds that are a millionth of the MACs."""
    exact = optimise.exact_prices(analysis)["macs"]
    terms = [
        optimise.Term(
            module=term.module,
            in_width=term.in_width,
            out_width=term.out_width,
            in_groups=term.in_groups,
            out_groups=term.out_groups,
            cost=lambda ins, outs, cost=term.cost: cost(ins, outs) * 1e-6,
        )
        for term in exact.terms
    ]
    return {"latency_ms": optimise.Prices(constant=exact.constant * 1e-6, terms=terms)}


def measuring(law: Callable[[float], float], seen: list[float]) -> within.Measure:
    """A device whose milliseconds follow from the MACs by ``law``."""

    def measure(dense: nn.Module, pruned: nn.Module) -> dict[str, tuple[float, float]]:
        both = [law(count(each, EXAMPLE).macs * 1e-6) for each in (dense, pruned)]
        seen.append(both[1] / both[0])
        return {"latency_ms": (both[0], both[1])}

    return measure


def scores_of(analysis: Analysis) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {g.name: generator.uniform(0.5, 1.5, g.channels) for g in analysis.groups}


def cut(network: nn.Module, analysis: Analysis, *texts: str, **others: object) -> within.Decision:
    terms = within.Terms(
        limits=limits.parse_all(texts),
        width_multiple=int(others.pop("width_multiple", 1)),  # type: ignore[call-overload]
        keep_at_least=float(others.pop("keep_at_least", 0.05)),  # type: ignore[arg-type]
        way=float(others.pop("way", 1.0)),  # type: ignore[arg-type]
        blocks=bool(others.pop("blocks", False)),
    )
    return within.decide(
        terms,
        network,
        network,
        analysis,
        scores_of(analysis),
        EXAMPLE,
        **({"price": by_macs} | others),  # type: ignore[arg-type]
    )


def left(network: nn.Module, analysis: Analysis, found: within.Decision) -> nn.Module:
    return found.apply(network, analysis, EXAMPLE).network


def test_without_a_device_the_prediction_is_held(network: nn.Module, analysis: Analysis) -> None:
    found = cut(network, analysis, "latency x0.5", "params <= 6000")
    share = count(left(network, analysis, found), EXAMPLE).macs / count(network, EXAMPLE).macs
    assert 0.4 < share <= 0.5
    assert count(left(network, analysis, found), EXAMPLE).params <= 6000
    assert not found.measured
    assert found.tries == 1
    assert found.choice.predicted["latency_ms"] == pytest.approx(
        count(left(network, analysis, found), EXAMPLE).macs * 1e-6
    )


@pytest.mark.parametrize("law", [lambda ms: ms + 0.2, lambda ms: ms**2, lambda ms: ms**0.7])
def test_the_measured_network_is_within(
    network: nn.Module, analysis: Analysis, law: Callable[[float], float]
) -> None:
    """A device that pays more, or less, for what is left than the table says."""
    seen: list[float] = []
    found = cut(network, analysis, "latency x0.6", measure=measuring(law, seen))
    measured = found.measured["latency_ms"]
    assert measured.value <= measured.allowed
    assert measured.value == pytest.approx(
        law(count(left(network, analysis, found), EXAMPLE).macs * 1e-6)
    )
    # the nearest that was seen within the limit, and no more given up than had to be
    assert measured.value >= 0.85 * measured.allowed
    assert len(seen) <= within.TRIES


def test_an_absolute_limit_is_in_the_devices_own_milliseconds(
    network: nn.Module, analysis: Analysis
) -> None:
    dense = 3 * count(network, EXAMPLE).macs * 1e-6
    found = cut(
        network, analysis, f"latency_ms <= {0.5 * dense}", measure=measuring(lambda ms: 3 * ms, [])
    )
    measured = found.measured["latency_ms"]
    assert measured.allowed == pytest.approx(0.5 * dense)
    assert 0.4 * dense < measured.value <= 0.5 * dense


def by_macs_and_params(network: nn.Module, analysis: Analysis) -> dict[str, optimise.Prices]:
    """The same, and millijoules that are a thousandth of the parameters."""
    exact = optimise.exact_prices(analysis)["params"]
    terms = [
        dataclasses.replace(term, cost=lambda ins, outs, cost=term.cost: cost(ins, outs) * 1e-3)
        for term in exact.terms
    ]
    joules = optimise.Prices(constant=exact.constant * 1e-3, terms=terms)
    return {**by_macs(network, analysis), "energy_mj": joules}


@pytest.mark.parametrize(("milliseconds", "millijoules"), [(0.6, 0.8), (0.8, 0.5), (0.5, 0.5)])
def test_both_of_the_devices_quantities_are_held_as_measured(
    network: nn.Module, analysis: Analysis, milliseconds: float, millijoules: float
) -> None:
    """Each is on a scale of its own, which the table does not tell."""

    def measure(dense: nn.Module, pruned: nn.Module) -> dict[str, tuple[float, float]]:
        counts = [count(each, EXAMPLE) for each in (dense, pruned)]
        return {
            "latency_ms": tuple(0.1 + each.macs * 1e-6 for each in counts),
            "energy_mj": tuple((each.params * 1e-3) ** 0.7 for each in counts),
        }

    asked = (f"latency x{milliseconds}", f"energy x{millijoules}")
    found = cut(network, analysis, *asked, price=by_macs_and_params, measure=measure)
    assert set(found.measured) == {"latency_ms", "energy_mj"}
    assert 0.85 <= found.over <= 1
    told = measure(network, left(network, analysis, found))
    for quantity, share in (("latency_ms", milliseconds), ("energy_mj", millijoules)):
        assert found.measured[quantity].value == told[quantity][1] <= share * told[quantity][0]


@pytest.mark.parametrize("seed", range(4))
def test_noise_does_not_hold_it_up(network: nn.Module, analysis: Analysis, seed: int) -> None:
    """Two choices may come out the wrong way round; then it goes on below both."""
    random = np.random.default_rng(seed)
    seen: list[float] = []

    def law(milliseconds: float) -> float:
        return milliseconds * float(random.uniform(0.9, 1.1))

    found = cut(network, analysis, "latency x0.5", measure=measuring(law, seen))
    assert found.over <= 1
    assert len(seen) <= within.TRIES


def test_the_wrong_way_round_is_noise() -> None:
    """What was predicted to cost less was measured to cost more: the next aim is below both."""
    seen = [(1.11, 0.98), (0.907, 1.004)]
    assert within._aim(seen) < 0.907
    assert within._aim([*seen, seen[-1]]) < 0.907


def test_what_no_choice_meets_is_refused_with_what_was_measured(
    network: nn.Module, analysis: Analysis
) -> None:
    with pytest.raises(
        PruningError, match=r"latency x0\.5.*nearest at latency_ms .*where .* allowed"
    ):
        cut(network, analysis, "latency x0.5", measure=measuring(lambda ms: 10 + ms, []))


def test_a_step_goes_part_of_the_way(network: nn.Module, analysis: Analysis) -> None:
    shares = [
        count(left(network, analysis, cut(network, analysis, "macs x0.25", way=way)), EXAMPLE).macs
        / count(network, EXAMPLE).macs
        for way in (0.25, 0.5, 1.0)
    ]
    assert all(more > less for more, less in pairwise(shares))
    assert 0.4 < shares[1] <= 0.5
    assert shares[2] <= 0.25


def test_blocks_go_whole_where_that_is_allowed(network: nn.Module, analysis: Analysis) -> None:
    found = cut(network, analysis, "macs x0.2", blocks=True, keep_at_least=0.6)
    assert found.choice.removed_blocks
    assert count(left(network, analysis, found), EXAMPLE).macs <= 0.2 * count(network, EXAMPLE).macs
    with pytest.raises(PruningError, match="or allow blocks to go"):
        cut(network, analysis, "macs x0.2", keep_at_least=0.6)


def test_a_block_too_many_comes_back(network: nn.Module, analysis: Analysis) -> None:
    """Both blocks go by the prices, and no channel; measured, one is enough."""
    dense = count(network, EXAMPLE).macs * 1e-6
    measure = measuring(lambda ms: (ms / dense) ** 1.2, [])
    asked = {"blocks": True, "keep_at_least": 1.0}
    found = cut(network, analysis, "latency x0.48", **asked, measure=measure)
    assert len(found.choice.removed_blocks) == 1
    assert found.over <= 1


def test_a_wider_choice_is_found_beyond_one_that_comes_back(
    network: nn.Module, analysis: Analysis
) -> None:
    """Where choices are few, an aim further up may lead to the choice that is known already."""
    dense = count(network, EXAMPLE).macs * 1e-6

    def law(milliseconds: float) -> float:
        return (milliseconds / dense) ** 1.6

    def share(found: within.Decision) -> float:
        return law(count(left(network, analysis, found), EXAMPLE).macs * 1e-6)

    coarse = {"width_multiple": 8, "keep_at_least": 0.5}
    all_choices = [
        cut(network, analysis, f"latency x{percent / 100}", **coarse) for percent in range(35, 101)
    ]
    kept = [each.choice.importance_kept for each in all_choices if share(each) <= 0.6]
    found = cut(network, analysis, "latency x0.6", **coarse, measure=measuring(law, []))
    assert found.over <= 1
    assert found.choice.importance_kept == pytest.approx(max(kept))


def test_a_limit_that_is_not_measured_may_hold_it_down(
    network: nn.Module, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no looser aim for what is measured leads to more, and none is tried."""
    seen: list[float] = []
    asked: list[int] = []
    choose = optimise.choose

    def spy(*arguments: Any, **named: Any) -> optimise.Choice:
        asked.append(len(arguments[2]))
        return choose(*arguments, **named)

    monkeypatch.setattr(optimise, "choose", spy)
    measure = measuring(lambda ms: ms, seen)
    found = cut(network, analysis, "macs x0.5", "latency x0.9", measure=measure)
    assert found.over < 0.6
    assert len(seen) == 1
    assert asked == [2, 2, 1], "once more, and once without the limit that is measured"


def test_a_decision_is_read_back_as_it_was(network: nn.Module, analysis: Analysis) -> None:
    asked = {"blocks": True, "keep_at_least": 0.6, "measure": measuring(lambda ms: ms, [])}
    found = cut(network, analysis, "latency x0.3", **asked)
    assert all(found.gone)
    text = json.dumps(schema.encode(found))
    assert schema.decode(json.loads(text), within.Decision, "a file", PruningError) == found


def test_what_cannot_be_reached_is_found_without_a_device(
    network: nn.Module, analysis: Analysis
) -> None:
    terms = within.Terms(limits=limits.parse_all(["latency x0.01"]), width_multiple=8)
    within.check_reachable(terms, network, analysis, EXAMPLE, {})  # not priced yet
    with pytest.raises(PruningError, match="latency"):
        within.check_reachable(terms, network, analysis, EXAMPLE, by_macs(network, analysis))


def test_a_limit_that_the_prices_call_out_of_reach_is_measured(
    network: nn.Module, analysis: Analysis
) -> None:
    """A device that gains more from narrow networks than its prices say."""
    asked, floor = "latency x0.2", 0.5
    with pytest.raises(BudgetError) as refused:
        cut(network, analysis, asked, keep_at_least=floor)
    assert refused.value.smallest["latency_ms"] > 0
    seen: list[float] = []
    measure = measuring(lambda ms: ms**2, seen)
    found = cut(network, analysis, asked, keep_at_least=floor, measure=measure)
    assert found.over <= 1
    assert seen[0] <= 0.2
    steep = measuring(lambda ms: ms**0.5, seen)
    with pytest.raises(PruningError, match="one choice was measured, the nearest at latency_ms"):
        cut(network, analysis, asked, keep_at_least=floor, measure=steep)
    with pytest.raises(BudgetError, match="params"):  # that is no matter of measuring
        cut(network, analysis, asked, "params <= 10", keep_at_least=floor, measure=measure)


def test_the_least_is_measured_before_a_limit_is_given_up(
    network: nn.Module, analysis: Analysis
) -> None:
    """The first choice pays so much more than it should that the next aim is below every price."""
    dense = count(network, EXAMPLE).macs * 1e-6
    seen: list[float] = []

    def law(milliseconds: float) -> float:
        return milliseconds * (1.6 if 0.3 < milliseconds / dense < 1 else 1)

    asked = {"keep_at_least": 0.5, "measure": measuring(law, seen)}
    found = cut(network, analysis, "latency x0.35", **asked)
    assert seen[0] > 0.5
    assert found.over <= 1
    assert len(seen) <= within.TRIES


def test_what_a_measured_network_has_shown_is_not_refused(
    network: nn.Module, analysis: Analysis
) -> None:
    prices = by_macs(network, analysis)

    def check(*texts: str) -> None:
        terms = within.Terms(limits=limits.parse_all(texts), width_multiple=8)
        shown = {"latency_ms": (20.0, 2.0)}
        within.check_reachable(terms, network, analysis, EXAMPLE, prices, shown)

    check("latency x0.1")
    check("latency_ms <= 2")
    for text in ("latency x0.099", "latency_ms <= 0.001"):
        with pytest.raises(BudgetError, match=text.replace(".", r"\.")):
            check(text)
