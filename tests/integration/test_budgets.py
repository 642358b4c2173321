"""Budgets in what this machine pays, through the pipeline: priced, chosen, measured."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from greenprune import (
    api,
    cost_tables,
    pipeline,
    prune_budget,
    prune_stage,
    stages,
    summary,
    whole_networks,
)
from greenprune.adaptive.selector import ScoredNetwork
from greenprune.errors import MeasurementError, PruningError
from greenprune.harness import cost_probe, cost_table
from greenprune.harness.race import PRESET, Race
from greenprune.pruning import probe_graphs, within
from greenprune.registry import load_target

pytestmark = pytest.mark.skipif(not load_target("x86").is_here(), reason="no x86-64 processor")

BLOCK = 4
"""That the probe finds."""
NETWORK = """
from torch import nn


def network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
"""


GROUPED = "nn.Conv2d(32, 32, 3, padding=1, groups=8)"


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A recipe of a small network; one round of the table, short races, a cache of its own."""
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    short = dataclasses.replace(PRESET, windows=3, window_seconds=0.1)
    monkeypatch.setattr(
        whole_networks,
        "race_networks",
        functools.partial(whole_networks.race_networks, preset=short),
    )
    monkeypatch.setattr(
        cost_tables.cost_probe, "measure", functools.partial(cost_probe.measure, rounds=1)
    )
    monkeypatch.setattr(probe_graphs, "BLOCK_WIDTHS", range(4, 6))
    monkeypatch.setattr(cost_probe, "find_block", lambda points: BLOCK)
    return [
        f'model.factory="{tmp_path / "net.py"}:network"',
        "threads=1",
        "train.epochs=1",
        "sparsify.epochs=0",
        "finetune.mild.epochs=1",
        "finetune.aggressive.epochs=1",
        'compile.runtimes=["onnxruntime"]',
        'prune.mild.budget=["macs x0.8"]',
    ]


def widths(variant: dict[str, Any]) -> list[int]:
    return list(variant["widths"].values())


def results_of(run: str, stage: str) -> dict[str, Any]:
    return json.loads((Path(run) / stage / "stage.json").read_text())["results"]


def test_a_budget_is_held_as_measured(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*overrides, 'prune.aggressive.budget=["latency x0.7", "params x0.7"]']
    made = api.prune(overrides=asked, runs=tmp_path / "runs", name="held")
    priced = results_of(made["run"], "price")
    assert (priced["runtime"], priced["block_width"]) == ("onnxruntime", BLOCK)
    found = results_of(made["run"], "prune")
    kept = [width for each in found.values() if isinstance(each, dict) for width in widths(each)]
    assert kept
    assert all(width % BLOCK == 0 for width in kept)
    assert any(width % 8 for width in kept), "the target's own multiple was taken"
    (step,) = found["aggressive"]["budget"]
    latency, quantities = step["measured"]["latency_ms"], step["quantities"]
    assert latency["allowed"] == pytest.approx(0.7 * latency["dense"])
    assert 0 < latency["measured"] <= latency["allowed"]
    assert 0 < quantities["latency_ms"]["predicted"] < quantities["latency_ms"]["dense"]
    params = quantities["params"]
    assert found["aggressive"]["params"] == params["predicted"] <= params["goal"]
    assert 0 < step["importance_kept"] < 1
    mild = found["mild"]["budget"][0]
    assert found["mild"]["macs"] == mild["quantities"]["macs"]["predicted"]
    assert mild["measured"] == {}

    carried = Path(made["run"]) / "price" / "table.json"
    first = cost_table.read(carried)

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the table is measured again")

    monkeypatch.setattr(cost_tables.cost_probe, "measure", never)
    again = [*overrides, 'prune.aggressive.budget=["latency x0.75"]']
    job = api.open_job(None, overrides=again, runs=tmp_path / "runs", name="held")
    pipeline.execute(job, stages.host_stages(job.recipe)[:2])
    tables = [first, cost_table.read(carried)]
    assert tables[0].costs == tables[1].costs
    for each in tables:
        assert each.correction["slope"] > 0
        assert each.correction["layer_us"] >= 0

    with pytest.raises(MeasurementError, match="expected a cost table of target 'arm'"):
        api.prune(
            overrides=[*asked, f'prune.cost_table="{carried}"', 'compile.target="arm"'],
            runs=tmp_path / "runs",
            name="held",
        )
    with pytest.raises(MeasurementError, match=r"of openvino, as compile\.runtimes"):
        api.prune(
            overrides=[*asked, f'prune.cost_table="{carried}"', 'compile.runtimes=["openvino"]'],
            runs=tmp_path / "runs",
            name="held",
        )
    with pytest.raises(PruningError, match=r"smallest latency_ms that can be reached is .*x0\.01"):
        api.prune(
            overrides=[*overrides, 'prune.aggressive.budget=["latency x0.01"]'],
            runs=tmp_path / "runs",
            name="held",
        )


def test_a_device_elsewhere_needs_its_table(tmp_path: Path, overrides: list[str]) -> None:
    asked = [*overrides, 'prune.aggressive.budget=["latency x0.7"]', 'compile.target="arm"']
    with pytest.raises(PruningError, match="greenprune cost-table"):
        api.prune(overrides=asked, runs=tmp_path / "runs", name="elsewhere")
    folder = api.cost_graphs(overrides=asked, output=tmp_path / "probe")
    assert (folder / "probe.json").is_file()
    with pytest.raises(MeasurementError, match="copy the folder to the device"):
        cost_probe.measure(folder, tmp_path / "table.json")
    # what a device elsewhere would bring back: the same chains, measured here
    here = api.cost_graphs(overrides=[*overrides, 'compile.target="x86"'], output=tmp_path / "here")
    table = cost_probe.measure(here, tmp_path / "table.json", rounds=1, threads=1)
    cost_table.write(dataclasses.replace(table, target="arm"), tmp_path / "table.json")
    made = api.prune(
        overrides=[*asked, f'prune.cost_table="{tmp_path / "table.json"}"'],
        runs=tmp_path / "runs",
        name="carried",
    )
    (step,) = results_of(made["run"], "prune")["aggressive"]["budget"]
    assert step["measured"] == {}
    found = step["quantities"]["latency_ms"]
    assert found["predicted"] <= found["goal"] == pytest.approx(0.7 * found["dense"])


def test_joules_that_no_meter_measures_are_refused_before_training(
    tmp_path: Path, overrides: list[str]
) -> None:
    asked = [*overrides, 'prune.aggressive.budget=["energy x0.7"]']
    with pytest.raises(PruningError, match=r"no joules.*ask for latency instead"):
        api.prune(overrides=asked, runs=tmp_path / "runs", name="joules")
    assert not (tmp_path / "runs" / "joules" / "train").exists()


def test_steps_of_a_network_with_groups_and_its_head(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step a convolution has fewer groups than the table knows; what is measured
    is what will be shipped, with the selector's head."""
    grouped = NETWORK.replace("nn.Conv2d(32, 32, 3, padding=1)", GROUPED, 1)
    (tmp_path / "net.py").write_text(grouped)
    raced: list[Mapping[str, nn.Module]] = []
    race_networks = whole_networks.race_networks

    def spy(target: str, networks: Mapping[str, nn.Module], *others: Any, **named: Any) -> Race:
        raced.append(networks)
        return race_networks(target, networks, *others, **named)

    monkeypatch.setattr(whole_networks, "race_networks", spy)
    asked = [
        *overrides,
        'prune.aggressive.budget=["latency x0.75"]',
        "prune.steps=2",
        "prune.between.epochs=1",
    ]
    made = api.prune(overrides=asked, runs=tmp_path / "runs", name="groups")
    first, second = results_of(made["run"], "prune")["aggressive"]["budget"]
    allowed = [step["measured"]["latency_ms"]["allowed"] for step in (first, second)]
    dense = [step["measured"]["latency_ms"]["dense"] for step in (first, second)]
    assert allowed[0] / dense[0] == pytest.approx(0.75**0.5)
    assert allowed[1] / dense[1] == pytest.approx(0.75)
    pairs = [networks for networks in raced if set(networks) == {"dense", "pruned"}]
    assert pairs
    assert all(isinstance(networks["pruned"], ScoredNetwork) for networks in pairs)
    assert not any(isinstance(networks["dense"], ScoredNetwork) for networks in pairs)


def test_steps_and_blocks(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual network, cut in two steps, of which the first may take a block; it is stopped
    between the two, and what was decided by then stands."""
    asked = [
        *(text for text in overrides if not text.startswith(("model.factory", "prune.mild"))),
        'model.factory="greenprune.models:resnet20"',
        "data.channels=3",
        "data.size=[8, 8]",
        "train.epochs=0",
        "finetune.mild.epochs=0",
        "finetune.aggressive.epochs=0",
        'prune.mild.budget=["macs x0.6"]',
        'prune.aggressive.budget=["macs x0.2"]',
        "prune.keep_at_least=0.5",
        "prune.blocks=true",
        "prune.steps=2",
        "prune.images=64",
        "prune.between.epochs=1",
    ]
    decide, decided = within.decide, []

    def spy(*arguments: Any, **named: Any) -> within.Decision:
        decided.append(decide(*arguments, **named))
        return decided[-1]

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(within, "decide", spy)
    with monkeypatch.context() as patch:
        patch.setattr(prune_stage, "_train_between", stop)
        with pytest.raises(KeyboardInterrupt):
            api.prune(overrides=asked, runs=tmp_path / "runs", name="steps")
    assert len(decided) == 2, "the blocks of the mild network, and its first step"
    kept = list((tmp_path / "runs" / "steps" / "checkpoints").glob("prune-*.json"))
    assert len(kept) == 2
    (damaged,) = (path for path in kept if "mild-blocks" in path.name)
    damaged.write_text("{")
    made = api.prune(overrides=asked, runs=tmp_path / "runs", name="steps")
    assert len(decided) == 7, "six, of which the damaged one twice"
    assert not [path for path in kept if path.exists()]
    assert json.loads((Path(made["run"]) / "prune" / "stage.json").read_text())["resumed"]
    mild = results_of(made["run"], "prune")["mild"]
    assert mild["budget"][0] == within.described(decided[1])
    found = results_of(made["run"], "prune")["aggressive"]
    first, second = found["budget"]
    assert first["quantities"]["macs"]["goal"] > second["quantities"]["macs"]["goal"]
    assert found["removed_blocks"], "blocks go before the first step, by the whole way's choice"
    assert not first["removed_blocks"]
    assert not second["removed_blocks"]
    shown = {
        row["step"]: row["removed_blocks"]
        for row in summary._budgets(results_of(made["run"], "prune"))
        if row["variant"] == "aggressive"
    }
    assert shown == {1: found["removed_blocks"], 2: found["removed_blocks"]}
    assert found["macs_share"] <= 0.2
    assert made["variants"]["aggressive"]["macs"] == found["macs"]
    assert prune_budget.STAGE not in {path.name for path in Path(made["run"]).iterdir()}
