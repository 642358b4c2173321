"""A cost table from a network to a prediction: measured here, cached, carried back."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from greenprune import cost_tables
from greenprune.errors import MeasurementError, TargetError
from greenprune.harness import cost_plan, cost_probe, cost_table
from greenprune.harness.cost_table import CostTable
from greenprune.pruning import probe_graphs
from greenprune.pruning.graph import analyse
from greenprune.pruning.layer_shapes import PricedLayer, shapes_of
from greenprune.pruning.predictor import Predictor
from greenprune.registry import load_target

RUNTIME = "onnxruntime"


def priced(width: int) -> tuple[PricedLayer, ...]:
    network = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    ).eval()
    example = torch.zeros(1, 3, 32, 32)
    return shapes_of(network, example, analyse(network, example))


@pytest.fixture(autouse=True)
def few_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe for the block width takes most of the time."""
    monkeypatch.setattr(probe_graphs, "BLOCK_WIDTHS", range(7, 10))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CostTable]:
    """The table of one network, and the cache that it is in."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_graphs, "BLOCK_WIDTHS", range(7, 10))
        patch.setattr(cost_probe, "find_block", lambda points: 8)  # which noise may halve
        return cache, table(cache, priced(16))


def table(cache: Path, layers: tuple[PricedLayer, ...], runtime: str = RUNTIME) -> CostTable:
    return cost_tables.table_for(layers, target="x86", runtime=runtime, threads=1, cache=cache)


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("measured again")


def test_a_table_is_measured_and_prices_its_network(measured: tuple[Path, CostTable]) -> None:
    cache, found = measured
    assert (found.target, found.runtime, found.threads) == ("x86", RUNTIME, 1)
    assert {each.shape for each in found.costs} == {each.shape for each in priced(16)}
    assert Predictor(priced(16), found).latency_ms({}) > 0
    assert {path.suffix for path in cache.glob("*/[!.]*")} == {".json"}  # graphs, parts are gone


def test_a_cached_table_is_not_measured_again(
    measured: tuple[Path, CostTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, first = measured
    monkeypatch.setattr(probe_graphs, "write_folder", refuse)
    assert table(cache, priced(16)) == first
    assert table(cache, priced(16)[1:]) == first  # its layers are all there
    with pytest.raises(AssertionError, match="measured again"):
        table(cache, priced(24))  # wider than what was measured
    with pytest.raises(AssertionError, match="measured again"):
        cost_tables.table_for(
            priced(16), target="x86", runtime=RUNTIME, threads=1, cache=cache, grid_block=4
        )


def test_a_cached_table_without_the_joules_of_a_layer_is_measured_again(
    measured: tuple[Path, CostTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meter may fail during one layer alone."""
    cache, _ = measured
    own = tmp_path / "cache"
    shutil.copytree(cache, own)

    def metered(costs: cost_table.ShapeCosts) -> cost_table.ShapeCosts:
        points = tuple(
            replace(point, energy_uj=3.0, energy_uj_low=2.0, energy_uj_high=4.0)
            for point in costs.points
        )
        return replace(costs, points=points)

    paths = list(own.glob("*/*.json"))
    for path in paths:
        found = cost_table.read(path)
        cost_table.write(
            replace(found, meter="rapl", costs=tuple(metered(costs) for costs in found.costs)), path
        )
    asked = functools.partial(
        cost_tables.table_for, target="x86", runtime=RUNTIME, threads=1, cache=own, joules=True
    )
    monkeypatch.setattr(probe_graphs, "write_folder", refuse)
    whole = asked(priced(16))
    assert whole.meter == "rapl"
    for path in paths:
        found = cost_table.read(path)
        gap = tuple(found.costs[:-1]) + tuple(
            replace(
                costs,
                points=tuple(
                    replace(point, energy_uj=None, energy_uj_low=None, energy_uj_high=None)
                    for point in costs.points
                ),
            )
            for costs in found.costs[-1:]
        )
        cost_table.write(replace(found, costs=gap), path)
    with pytest.raises(AssertionError, match="measured again"):
        asked(priced(16))


def test_the_grid_has_multiples_of_the_block_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = functools.partial(cost_probe.measure, rounds=1)
    monkeypatch.setattr(cost_probe, "measure", measure)
    monkeypatch.setattr(cost_probe, "find_block", lambda points: 4)
    told = cost_tables.table_for(
        priced(16), target="x86", runtime=RUNTIME, threads=1, cache=tmp_path, grid_block=8
    )
    assert told.block_width == 4  # what was found is told, whatever is asked for
    assert [point.out_width for point in told.block_probe] == [7, 8, 9]
    # the last layer's four outputs cannot be pruned
    assert {point.out_width for each in told.costs for point in each.points} == {4, 8, 16}
    found = table(tmp_path, priced(16))
    assert found.block_width == 4
    assert {point.out_width for each in found.costs for point in each.points} == {4, 8, 12, 16}


def test_damaged_tables_in_the_cache_are_passed_over(
    measured: tuple[Path, CostTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, first = measured
    damaged = next(cache.glob("*/*.json")).with_name("0.json")
    damaged.write_text("{")
    monkeypatch.setattr(probe_graphs, "write_folder", refuse)
    assert table(cache, priced(16)) == first
    damaged.unlink()


def test_an_interrupted_measurement_keeps_its_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: Path, output: Path, **options: object) -> None:
        plans.append(cost_plan.read_plan(folder))
        raise KeyboardInterrupt

    plans: list[cost_plan.ProbePlan] = []
    monkeypatch.setattr(cost_probe, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, priced(8))
    monkeypatch.setattr(probe_graphs, "write_folder", refuse)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, priced(8))
    assert plans[0] == plans[1]


def test_a_table_that_was_carried_back_is_checked(
    measured: tuple[Path, CostTable], tmp_path: Path
) -> None:
    _, found = measured
    path = tmp_path / "table.json"
    cost_table.write(found, path)
    again = cost_tables.table_from_file(path, priced(16), target="x86", runtime=RUNTIME, threads=1)
    assert again == found
    assert cost_tables.table_from_file(path, priced(16), target="x86") == found
    for wrong, message in (
        ({"target": "arm"}, "target 'arm'"),
        ({"runtime": "openvino"}, "runtime 'openvino'"),
        ({"threads": 2}, "threads '2'"),
    ):
        with pytest.raises(MeasurementError, match=message):
            cost_tables.table_from_file(path, priced(16), **({"target": "x86"} | wrong))
    with pytest.raises(MeasurementError, match=r"table\.json: .*largest that was measured"):
        cost_tables.table_from_file(path, priced(32), target="x86")
    cost_table.write(replace(found, costs=found.costs[:-1]), path)
    with pytest.raises(MeasurementError, match=r"lacks this layer: linear layer"):
        cost_tables.table_from_file(path, priced(16), target="x86")


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    if load_target("jetson-orin-nano").is_here():
        pytest.skip("this is one")
    with pytest.raises(TargetError, match=r"greenprune-bench --cost-table FOLDER"):
        cost_tables.table_for(
            priced(8), target="jetson-orin-nano", runtime="tensorrt", cache=tmp_path
        )
