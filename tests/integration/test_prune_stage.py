"""The prune stage by everything that a recipe can ask for, on the embedded digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from greenprune import api
from greenprune.errors import PruningError, RecipeError
from greenprune.pruning.record import load_network

SHORT = (
    "threads=1",
    "bench.meter=none",
    "train.epochs=2",
    "sparsify.epochs=1",
    "finetune.mild.epochs=0",
    "finetune.aggressive.epochs=0",
    "prune.images=64",
)


def pruned(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The command's answer, and what the prune stage found."""
    answer = api.prune(overrides=[*SHORT, *overrides], runs=folder)
    stage = json.loads((Path(answer["run"]) / "prune" / "stage.json").read_text())
    return answer, stage["results"]


def rebuilt(answer: dict[str, Any], variant: str) -> torch.nn.Module:
    network, _ = load_network(Path(answer["variants"][variant]["network"]))
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    return network


def test_scores_are_kept_and_the_best_correction_is_taken(tmp_path: Path) -> None:
    answer, found = pruned(tmp_path, "prune.method=taylor")

    for variant in ("mild", "aggressive"):
        tried = found[variant]["corrections"]
        assert set(tried) == {"none", "folded"}, "LeNet-5 has no BatchNorm"
        assert found[variant]["development_accuracy"] == max(tried.values())
        rebuilt(answer, variant)
    kept = json.loads((tmp_path / "lenet5-digits" / "prune" / "scores.json").read_text())
    assert kept["method"] == "taylor"
    assert 0 < kept["images"] <= 64
    assert {name: len(values) for name, values in kept["scores"].items()} == {
        "conv1": 16,
        "conv2": 32,
        "fc1": 128,
        "fc2": 64,
    }
    assert (tmp_path / "lenet5-digits" / "prune" / "scores.svg").read_text().startswith("<?xml")


def test_a_budget_in_parameters_cut_evenly(tmp_path: Path) -> None:
    answer, found = pruned(
        tmp_path,
        "prune.scope=uniform",
        "prune.mild.params=0.5",
        "prune.aggressive.params=0.1",
        "prune.width_multiple=1",
    )

    dense = found["mild"]["dense_widths"]
    assert found["mild"]["params_share"] <= 0.5
    assert found["aggressive"]["params_share"] <= 0.1
    shares = [width / dense[name] for name, width in found["aggressive"]["widths"].items()]
    assert max(shares) - min(shares) < 0.1
    rebuilt(answer, "aggressive")


def test_biases_of_folding_count_in_a_budget_of_parameters(tmp_path: Path) -> None:
    network = (
        "model.factory=greenprune.models:crnn",
        "model.arguments={height = 32, convolutions = [8, 16, 16], hidden = 16}",
        "prune.width_multiple=2",
        "prune.scope=uniform",
        "train.epochs=1",
    )
    _, found = pruned(tmp_path, *network)
    plain = {"none", "batchnorm"}
    assert set(found["aggressive"]["corrections"]) == {*plain, "folded", "folded, batchnorm"}

    answer, found = pruned(tmp_path, *network, "prune.mild.macs=1", "prune.mild.params=0.7")
    cut, described = load_network(Path(answer["variants"]["mild"]["network"]))
    added = sum(cut.get_parameter(f"{name}.bias").numel() for name in described.added_biases)
    params = sum(parameter.numel() for parameter in cut.parameters())
    share = (1 + 1e-9) * (params - added) / params * found["mild"]["params_share"]  # of the cut
    _, exact = pruned(tmp_path, *network, "prune.mild.macs=1", f"prune.mild.params={share}")

    assert exact["mild"]["params_share"] <= share
    assert set(exact["mild"]["corrections"]) == plain


def test_rates_for_each_group_unrounded(tmp_path: Path) -> None:
    answer, found = pruned(
        tmp_path,
        "prune.mild.rates={conv1 = 0.4}",
        "prune.aggressive.rates={conv1 = 0.4, fc1 = 0.7}",
    )

    assert found["mild"]["widths"] == {"conv1": 9, "conv2": 32, "fc1": 128, "fc2": 64}
    assert found["aggressive"]["widths"] == {"conv1": 9, "conv2": 32, "fc1": 38, "fc2": 64}
    assert rebuilt(answer, "aggressive").conv1.out_channels == 9


def test_gates_find_both_networks(tmp_path: Path) -> None:
    answer, found = pruned(
        tmp_path,
        "prune.method=gates",
        "prune.gates.epochs=2",
        "prune.gates.gated_epochs=1",
        "prune.gates.learning_rate=0.02",
    )

    assert found["mild"]["macs_share"] <= 0.6
    assert found["aggressive"]["macs_share"] <= 0.3
    for variant in ("mild", "aggressive"):
        network = rebuilt(answer, variant)
        assert set(dict(network.named_children())) == set(
            dict(rebuilt(answer, "dense").named_children())
        ), "no gate stays"
    assert not list((tmp_path / "lenet5-digits" / "checkpoints").glob("*.safetensors"))


def test_the_share_of_zero_filters_is_found(tmp_path: Path) -> None:
    answer, _ = pruned(tmp_path, "sparsify.zero_share=0.25")

    stage = json.loads((Path(answer["run"]) / "sparsify" / "stage.json").read_text())
    assert stage["results"]["zero_share"] == pytest.approx(0.25, abs=0.005)


def test_what_cannot_be_reached_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="the budget of 60% of the MACs and 1% of the param"):
        pruned(tmp_path, "prune.mild.params=0.01")
    with pytest.raises(PruningError, match="group 'conv9' is unknown; the groups of this network"):
        pruned(tmp_path, "prune.mild.rates={conv9 = 0.5}")
    with pytest.raises(RecipeError, match=r"prune\.mild\.rates"):
        pruned(tmp_path, "prune.mild.rates={conv1 = 1.0}")
    assert not (tmp_path / "lenet5-digits" / "train").exists()


def test_a_budget_that_changes_after_the_training_is_checked_before_the_next_one(
    tmp_path: Path,
) -> None:
    pruned(tmp_path)

    with pytest.raises(PruningError, match="cannot be reached"):
        pruned(tmp_path, "sparsify.epochs=2", "prune.mild.params=0.01")

    rows = (tmp_path / "lenet5-digits" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["stage"] == "sparsify-stopped"
