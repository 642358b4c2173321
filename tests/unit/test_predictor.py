"""Predicted cost: exact where a device's cost is a known bilinear function of the widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from greenprune import cost_tables
from greenprune.errors import MeasurementError
from greenprune.harness.cost_table import CostPoint, CostTable, LayerShape, ShapeCosts
from greenprune.models import resnet20
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.layer_shapes import PricedLayer, shapes_of
from greenprune.pruning.predictor import Predictor, learn
from greenprune.pruning.probe_graphs import grids

BLOCK = 8


def true_cost(shape: LayerShape, in_width: Any, out_width: Any) -> Any:
    """Microseconds of a device that there is not: bilinear, and the same for a mirror."""
    pixels = shape.input_size[0] * shape.input_size[1] * shape.kernel[0] * shape.kernel[1]
    product = out_width if shape.groups == 0 else in_width * out_width
    return 1.5 + pixels * product / 5e3 + 0.01 * (in_width + out_width)


def made_table(layers: tuple[PricedLayer, ...]) -> CostTable:
    return CostTable(
        target="x86",
        runtime="onnxruntime",
        threads=1,
        machine={},
        versions={},
        block_width=1,
        block_probe=(),
        costs=tuple(
            ShapeCosts(
                shape=grid.shape,
                mirrored=bool(grid.chains),
                points=tuple(
                    point(ins, outs, true_cost(grid.shape, ins, outs))
                    for ins, outs in (*grid.chains, *grid.fans)
                ),
            )
            for grid in grids(layers, BLOCK)
        ),
    )


def point(in_width: int, out_width: int, cost: float) -> CostPoint:
    return CostPoint(
        in_width=in_width,
        out_width=out_width,
        latency_us=cost,
        latency_us_low=cost,
        latency_us_high=cost,
        energy_uj=3 * cost,
        energy_uj_low=cost,
        energy_uj_high=4 * cost,
    )


def analysed(
    make: Callable[[], nn.Module], size: tuple[int, ...]
) -> tuple[Analysis, tuple[PricedLayer, ...]]:
    network, example = make().eval(), torch.zeros(size)
    analysis = analyse(network, example)
    return analysis, shapes_of(network, example, analysis)


def mobile() -> nn.Module:
    """Widening, depthwise at two strides, narrowing, and convolutions in groups."""

    def unit(inputs: int, outputs: int, kernel: int, **options: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU6()]

    return nn.Sequential(
        *unit(3, 16, 3, stride=2),
        *unit(16, 96, 1),
        *unit(96, 96, 3, groups=96),
        *unit(96, 24, 1),
        *unit(24, 144, 1),
        *unit(144, 144, 3, groups=144, stride=2),
        *unit(144, 32, 1),
        *unit(32, 32, 3, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


@pytest.mark.parametrize(("make", "size"), [(resnet20, 16), (mobile, 32)])
def lost_at_random(analysis: Analysis, count: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """At most half of every group; the first choice loses nothing."""
    random = np.random.default_rng(seed)
    found = {
        group.name: random.integers(0, group.channels // 2 + 1, count) for group in analysis.groups
    }
    for each in found.values():
        each[0] = 0
    return found


def left(width: int, groups: Mapping[str, int], lost: Mapping[str, NDArray[np.int64]]) -> Any:
    return width - sum(lost[group] * times for group, times in groups.items())


def test_a_convolution_that_has_lost_groups_costs_in_proportion() -> None:
    """The table knows it as it was."""
    _, layers = analysed(mobile, (1, 3, 32, 32))
    table = made_table(layers)
    (whole,) = (layer for layer in layers if layer.shape.groups == 4)
    cut = replace(whole, in_width=24, out_width=24)
    (found,) = Predictor([cut], table).latency_ms({})
    assert found == pytest.approx(true_cost(whole.shape, 32, 32) * 24 / 32 / 1000)
    with pytest.raises(MeasurementError, match="4 groups"):
        Predictor([replace(whole, in_width=64, out_width=64)], table)


@pytest.mark.parametrize(("make", "size"), [(resnet20, 16), (mobile, 32)])
def test_predictions_are_the_sum_of_the_layers_at_their_widths(
    make: Callable[[], nn.Module], size: int
) -> None:
    analysis, layers = analysed(make, (1, 3, size, size))
    predictor = Predictor(layers, made_table(layers))
    lost = lost_at_random(analysis, 20, seed=0)
    expected = np.zeros(20)
    for layer in layers:
        ins = left(layer.in_width, layer.in_groups, lost)
        outs = left(layer.out_width, layer.out_groups, lost)
        if layer.shape.groups > 1:  # in proportion to its groups
            whole = true_cost(layer.shape, layer.in_width, layer.out_width)
            expected += whole * outs / layer.out_width
        else:
            expected += true_cost(layer.shape, ins, outs)
    assert predictor.latency_ms(lost) == pytest.approx(expected / 1000, rel=1e-9)
    assert predictor.energy_mj(lost) == pytest.approx(3 * expected / 1000, rel=1e-9)
    assert predictor.latency_ms({}) == pytest.approx(expected[:1] / 1000, rel=1e-9)


def test_prices_add_up_to_the_prediction_with_its_correction() -> None:
    analysis, layers = analysed(mobile, (1, 3, 32, 32))
    table = replace(made_table(layers), correction={"layer_us": 20.0, "slope": 0.8})
    predictor = Predictor(layers, table)
    lost = lost_at_random(analysis, 4, seed=1)
    prices = predictor.prices()
    for name, predicted in (
        ("latency_ms", predictor.latency_ms(lost)),
        ("energy_mj", predictor.energy_mj(lost)),
    ):
        total = prices[name].constant + np.zeros(4)
        for term in prices[name].terms:
            ins = left(term.in_width, term.in_groups, lost) + np.zeros(4, dtype=np.int64)
            outs = left(term.out_width, term.out_groups, lost) + np.zeros(4, dtype=np.int64)
            total += term.cost(ins, outs)
        assert total == pytest.approx(predicted, rel=1e-12)
    whole = 0.02 * len(layers)
    assert predictor.latency_ms(lost) == pytest.approx(whole + 0.8 * predictor.summed_ms(lost))


def test_a_layer_that_is_gone_takes_its_part_of_the_intercept_along() -> None:
    _, layers = analysed(mobile, (1, 3, 32, 32))
    plain = Predictor(layers, made_table(layers))
    table = replace(made_table(layers), correction={"layer_us": 20.0, "slope": 1.0})
    term = next(each for each in Predictor(layers, table).prices()["latency_ms"].terms)
    same = next(each for each in plain.prices()["latency_ms"].terms)
    ins, outs = np.array([term.in_width, 0]), np.array([term.out_width, 0])
    assert term.cost(ins, outs) - same.cost(ins, outs) == pytest.approx([0.02, 0.0])


def test_without_a_meter_there_is_no_price_in_joules() -> None:
    """Nor where it failed during one layer."""

    def without(costs: ShapeCosts) -> ShapeCosts:
        gap = {"energy_uj": None, "energy_uj_low": None, "energy_uj_high": None}
        return replace(costs, points=tuple(replace(each, **gap) for each in costs.points))

    _, layers = analysed(mobile, (1, 3, 32, 32))
    table = made_table(layers)
    assert set(Predictor(layers, table).prices()) == {"latency_ms", "energy_mj"}
    first, *others = table.costs
    plain = replace(table, costs=tuple(without(costs) for costs in table.costs))
    failed = replace(table, meter="rapl", costs=(without(first), *others))
    for each, told in ((plain, "without a meter"), (failed, "its meter, rapl, failed")):
        predictor = Predictor(layers, each)
        assert list(predictor.prices()) == ["latency_ms"]
        with pytest.raises(MeasurementError, match=told):
            predictor.energy_mj({})


def test_below_the_smallest_measured_width_nothing_is_saved() -> None:
    def plain() -> nn.Module:
        first = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 5, 1))

    analysis, layers = analysed(plain, (1, 3, 16, 16))
    predictor = Predictor(layers, made_table(layers))
    left = np.array([16, 8, 5, 1])
    found = predictor.latency_ms({each.name: each.channels - left for each in analysis.groups})
    assert found[0] > found[1]
    assert found[1] == found[2] == found[3] > 0


def test_what_the_table_lacks_is_told_at_once() -> None:
    _, layers = analysed(mobile, (1, 3, 32, 32))
    table = made_table(layers)
    without = replace(table, costs=table.costs[1:])
    with pytest.raises(MeasurementError, match=r"lacks this layer: 3x3 convolution of 32x32"):
        Predictor(layers, without)
    _, other = analysed(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)), (1, 3, 9, 9))
    with pytest.raises(MeasurementError, match="lacks this layer"):
        Predictor(other, table)
    narrow = replace(layers[0], out_width=10 * layers[0].out_width)
    with pytest.raises(MeasurementError, match="largest that was measured"):
        Predictor((narrow,), table)


@given(
    intercept=st.floats(0, 5),
    slope=st.floats(0.2, 3),
    seed=st.integers(0, 1000),
    outliers=st.integers(0, 4),
)
def test_a_line_is_learned_in_spite_of_outliers(
    intercept: float, slope: float, seed: int, outliers: int
) -> None:
    random = np.random.default_rng(seed)
    summed = random.uniform(1, 10, 30)
    measured = (intercept + slope * summed) * random.uniform(0.99, 1.01, 30)
    measured[:outliers] *= 3
    found = learn(summed, measured)
    predicted = found["intercept_us"] / 1000 + found["slope"] * summed
    errors = np.abs(predicted - measured)[outliers:] / measured[outliers:]
    assert np.median(errors) < 0.03


def test_a_correction_is_never_below_zero() -> None:
    summed = np.array([1.0, 2.0, 3.0])
    steep = learn(summed, 2 * summed - 1.5)
    assert steep["intercept_us"] == 0
    assert steep["slope"] > 0
    falling = learn(summed, np.array([3.0, 2.5, 2.0]))
    assert falling["slope"] == 0
    assert 2000 <= falling["intercept_us"] <= 3000
    for wrong in ([1.0], [1.0, 2.0, -3.0], [1.0, float("nan"), 2.0]):
        with pytest.raises(MeasurementError, match="two networks or more"):
            learn(summed[: len(wrong)], wrong)


def plain() -> nn.Module:
    parts: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def taught_by(
    measured: Callable[[float], float], keep_at_least: float = 0.2, joules: bool = False
) -> tuple[Predictor, list[float], list[float]]:
    """A predictor taught where networks take what ``measured`` makes of their sums; with what they
    took, and what it predicts of them."""
    network, example = plain().eval(), torch.zeros(2, 3, 32, 32)
    analysis = analyse(network, example)
    layers = shapes_of(network, example, analysis)
    table = made_table(layers)
    chosen, took = [], []

    def measure(networks: Mapping[str, nn.Module]) -> dict[str, tuple[float, float | None]]:
        for pruned in networks.values():
            lost = {
                group.name: group.channels
                - len(pruned.get_submodule(group.producers[0].module).weight)
                for group in analysis.groups
            }
            chosen.append(lost)
            took.append(measured(float(Predictor(layers, table).summed_ms(lost)[0])))
        return {
            name: (ms, 2 * ms if joules else None) for name, ms in zip(networks, took, strict=True)
        }

    table = cost_tables.taught(
        table,
        network,
        analysis,
        layers,
        width_multiple=BLOCK,
        keep_at_least=keep_at_least,
        measure=measure,
    )
    predictor = Predictor(layers, table)
    return predictor, took, [float(predictor.latency_ms(lost)[0]) for lost in chosen]


def test_whole_networks_teach_a_line() -> None:
    predictor, took, predicted = taught_by(lambda summed: 0.3 + 0.8 * summed)
    assert len(took) == 4
    assert took == sorted(took, reverse=True), "the dense network first, the narrowest last"
    np.testing.assert_allclose(predicted, took, rtol=1e-6)
    told = predictor.table.correction
    assert (told["dense_ms"], told["narrowest_ms"]) == (took[0], took[-1])


def test_joules_of_the_widest_and_the_narrowest_are_kept_where_they_are_measured() -> None:
    predictor, took, _ = taught_by(lambda summed: summed, joules=True)
    told = predictor.table.correction
    assert (told["dense_mj"], told["narrowest_mj"]) == (2 * took[0], 2 * took[-1])
    assert "dense_mj" not in taught_by(lambda summed: summed)[0].table.correction


def test_no_network_teaches_that_no_budget_can_lead_to() -> None:
    _, took, _ = taught_by(lambda summed: summed, keep_at_least=0.75)
    assert len(took) == 2
