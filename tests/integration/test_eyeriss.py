"""Networks as the pipeline exports them, on the simulated Eyeriss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from greenprune import models
from greenprune.adaptive.selector import ScoredNetwork, SelectorHead, tap
from greenprune.onnx_export import export_onnx
from greenprune.pruning.cost import count
from greenprune.registry import Build, load_target
from greenprune.runtime.runners import verify_artifact
from greenprune_targets.eyeriss import simulate

pytest.importorskip("nn_dataflow", reason="pip install 'greenprune[eyeriss]'")


def test_resnet20_by_its_published_energy_and_our_own_count_of_macs(tmp_path: Path) -> None:
    network, example = models.resnet20().eval(), torch.randn(2, 3, 32, 32)
    graph = tmp_path / "dense.onnx"
    references = export_onnx(network, example, graph, ["logits"])
    target: Any = load_target("eyeriss")
    made = target.compile(graph, Build(runtime="onnxruntime"), tmp_path / "out", "dense")
    found = target.simulation(made)
    assert found.energy_mac_units == pytest.approx(351e6, abs=0.5e6)
    assert found.macs == count(network, example).macs
    assert len(found.layers) == 20
    verify_artifact(target, made, "onnxruntime", example.numpy(), references)


def test_the_selector_is_paid_too(tmp_path: Path) -> None:
    network = models.lenet5(convolutions=(2, 3), hidden=(8, 6)).eval()
    example = torch.randn(2, 1, 32, 32)
    bare, scored = tmp_path / "bare.onnx", tmp_path / "scored.onnx"
    export_onnx(network, example, bare, ["logits"])
    features = tap(network)(example)[1].shape[1]
    head = SelectorHead(features, classes=10, hidden=64)
    export_onnx(ScoredNetwork(network, head).eval(), example, scored, ["logits", "score"])
    alone, together = simulate(bare), simulate(scored)
    assert len(together.layers) == len(alone.layers) + 2
    assert alone.energy_mac_units is not None
    assert together.energy_mac_units is not None
    assert together.energy_mac_units > alone.energy_mac_units


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_recurrent_network(tmp_path: Path, cell: str) -> None:
    network = models.crnn(convolutions=(4, 4, 8), hidden=8, cell=cell, height=16).eval()
    example = torch.randn(2, 1, 16, 24)
    graph = tmp_path / "crnn.onnx"
    export_onnx(network, example, graph, ["logits"])
    found = simulate(graph)
    assert not found.not_mapped
    assert {layer.operation for layer in found.layers} == {"Conv", "Gemm", cell.upper()}
    assert found.macs == count(network, example).macs


def test_depthwise_and_transposed_convolutions_count_like_ours(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 6, 5, padding=2, groups=6),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 5),
    ).eval()
    example = torch.randn(2, 3, 16, 16)
    graph = tmp_path / "mixed.onnx"
    export_onnx(network, example, graph, ["logits"])
    assert simulate(graph).macs == count(network, example).macs
