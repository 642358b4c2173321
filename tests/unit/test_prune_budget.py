"""What of a network a budget is held to: its layers as priced, its head on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="pruning is the host's")

import torch
from torch import Tensor, nn

from greenprune import prune_budget
from greenprune.adaptive.selector import ScoredNetwork
from greenprune.errors import MeasurementError
from greenprune.harness import cost_table
from greenprune.harness.environment import versions
from greenprune.pruning.graph import analyse
from greenprune.pruning.layer_shapes import PricedLayer, shapes_of
from greenprune.recipe import Recipe
from greenprune.registry import load_target

EXAMPLE = torch.zeros(2, 3, 16, 16)


class Twice(nn.Module):
    """One layer called at two sizes, and one in groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.widen = nn.Conv2d(3, 4 * groups, 1)
        self.grouped = nn.Conv2d(4 * groups, 4 * groups, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        small = nn.functional.avg_pool2d(self.shared(x), 2)
        answer: Tensor = self.grouped(self.widen(self.shared(small)))
        return answer


def layers_of(network: nn.Module) -> tuple[PricedLayer, ...]:
    network.eval()
    return shapes_of(network, EXAMPLE, analyse(network, EXAMPLE))


def test_each_call_of_what_is_left_is_priced_as_it_was() -> None:
    whole, left = layers_of(Twice(groups=4)), layers_of(Twice(groups=3))
    found = prune_budget.as_priced(left, whole)
    assert [layer.shape for layer in found] == [layer.shape for layer in whole]
    shared = [layer.shape.input_size for layer in found if layer.module == "shared"]
    assert shared == [(16, 16), (8, 8)]
    (grouped,) = (layer for layer in found if layer.module == "grouped")
    assert (grouped.shape.groups, grouped.out_width) == (4, 12)


def test_a_head_is_measured_where_a_selector_could_read_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job: Any = SimpleNamespace(recipe=Recipe(), data=None)
    monkeypatch.setattr(prune_budget.parts, "example_of", lambda data: EXAMPLE)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    scored = prune_budget._with_head(job, nn.Sequential(*body, nn.Linear(8, 5)).eval())
    assert isinstance(scored, ScoredNetwork)
    logits, score = scored(EXAMPLE)
    assert (logits.shape, score.shape) == ((2, 5), (2,))
    for unreadable in (nn.Sequential(*body[:2]), nn.Sequential(nn.ReLU())):  # a map; no layer
        assert prune_budget._with_head(job, unreadable.eval()) is unreadable


def test_what_whole_networks_have_shown_is_told_by_quantity() -> None:
    """A budget that these meet is not refused by the prices."""
    milliseconds = {"layer_us": 0.0, "slope": 1.0, "dense_ms": 4.0, "narrowest_ms": 1.0}
    joules = {"dense_mj": 8.0, "narrowest_mj": 3.0}

    def shown(correction: dict[str, float]) -> dict[str, tuple[float, float]]:
        table: Any = SimpleNamespace(correction=correction)
        return prune_budget._shown(table)

    assert shown({}) == {}
    assert shown(milliseconds) == {"latency_ms": (4.0, 1.0)}
    assert shown(milliseconds | joules) == {"latency_ms": (4.0, 1.0), "energy_mj": (8.0, 3.0)}


@pytest.mark.skipif(not load_target("x86").is_here(), reason="no x86-64 processor")
def test_a_carried_table_has_the_threads_that_sessions_have_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = cost_table.CostPoint(
        in_width=8, out_width=8, latency_us=5.0, latency_us_low=5.0, latency_us_high=5.0
    )
    shape = cost_table.LayerShape(operator="linear")
    device = load_target("x86")
    table = cost_table.CostTable(
        target="x86",
        runtime="onnxruntime",
        threads=3,
        machine=cost_table.describe_machine(device),
        versions=dict(versions()),
        block_width=8,
        block_probe=(),
        costs=(cost_table.ShapeCosts(shape=shape, mirrored=False, points=(point,)),),
    )
    cost_table.write(table, tmp_path / "table.json")
    job: Any = SimpleNamespace(recipe=Recipe())
    monkeypatch.setattr(prune_budget, "session_threads", lambda threads: threads or 3)
    assert prune_budget._carried(job, tmp_path / "table.json", ()) == table
    monkeypatch.setattr(prune_budget, "session_threads", lambda threads: threads or 4)
    with pytest.raises(MeasurementError, match="of threads '4', it is of '3'"):
        prune_budget._carried(job, tmp_path / "table.json", ())
