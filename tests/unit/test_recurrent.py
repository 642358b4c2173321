"""Surgery of recurrent layers: a unit goes from every gate, layer and direction, with the proof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from greenprune.errors import ProofError
from greenprune.onnx_export import export_onnx
from greenprune.pruning import cost, record, surgery
from greenprune.pruning.graph import Analysis, analyse

IMAGE = (1, 2, 1, 5)
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Reader(nn.Module):
    """A convolution whose columns are the steps of a recurrent layer, and a linear layer."""

    def __init__(
        self, cell: str, channels: int, hidden: int, read: str = "output", **options: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, channels, (1, 3), padding=(0, 1))
        self.recurrent = CELLS[cell](channels, hidden, **options)
        self.read = read
        width = hidden * (2 if self.recurrent.bidirectional else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.recurrent.batch_first
        y = torch.relu(self.conv(x))
        steps = [y[:, None, :, 0, n] if first else y[None, :, :, 0, n] for n in range(5)]
        states = self.recurrent(torch.cat(steps, dim=1 if first else 0))
        if self.read == "output":
            return self.out(states[0].mean(dim=1 if first else 0))
        last = states[1][0] if isinstance(self.recurrent, nn.LSTM) else states[1]
        if self.recurrent.bidirectional:
            return self.out(torch.cat([last[-2], last[-1]], dim=1))
        return self.out(last[-1])


def widths(analysis: Analysis) -> dict[str, int]:
    return {group.name: group.channels for group in analysis.groups}


def some(width: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, width - 1), unique=True, max_size=width - 1)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_compact_equals_masked_and_costs_what_was_predicted(data: st.DataObject) -> None:
    torch.manual_seed(0)
    channels, hidden = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 6))
    model = Reader(
        data.draw(st.sampled_from([*CELLS])),
        channels,
        hidden,
        data.draw(st.sampled_from(["output", "state"])),
        num_layers=data.draw(st.integers(1, 2)),
        bidirectional=data.draw(st.booleans()),
        batch_first=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    example = torch.randn(IMAGE)
    analysis = analyse(model, example)
    assert widths(analysis) == {"conv": channels, "recurrent": hidden}
    removed = {"conv": data.draw(some(channels)), "recurrent": data.draw(some(hidden))}
    assert surgery.prove(model, analysis, example, removed) <= 1e-10
    compact = surgery.compact(model, analysis, removed)
    counts = {name: len(gone) for name, gone in removed.items()}
    assert analysis.predict_cost(counts) == cost.count(compact, example)
    layer = compact.recurrent
    assert (layer.input_size, layer.hidden_size) == (
        channels - counts["conv"],
        hidden - counts["recurrent"],
    )


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3), ("rnn", 1)])
def test_a_unit_owns_a_row_in_every_gate_and_its_columns(cell: str, gates: int) -> None:
    model = Reader(cell, 3, 4, num_layers=2, bidirectional=True, batch_first=True)
    analysis = analyse(model, torch.randn(IMAGE))
    group = next(group for group in analysis.groups if group.name == "recurrent")
    held = {(part.parameter, part.dim): part.indices for part in group.parameters}
    rows = np.arange(4)[:, None] + 4 * np.arange(gates)
    both = np.arange(4)[:, None] + 4 * np.arange(2)
    for place in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            np.testing.assert_array_equal(held["recurrent." + f"{name}_{place}", 0], rows)
        np.testing.assert_array_equal(held[f"recurrent.weight_hh_{place}", 1][:, 0], np.arange(4))
    np.testing.assert_array_equal(held["recurrent.weight_ih_l1", 1], both)
    np.testing.assert_array_equal(held["out.weight", 1], both)
    assert {part.module for part in group.consumers} == {"out"}
    (inputs,) = (s for g in analysis.groups if g.name == "conv" for s in g.consumers)
    assert inputs.module == "recurrent"
    np.testing.assert_array_equal(inputs.indices[:, 0], np.arange(3))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_pruned_recurrent_network_is_saved_rebuilt_and_pruned_again(
    tmp_path: Path, cell: str
) -> None:
    source = tmp_path / "mine.py"
    source.write_text(f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.{cell.upper()}(3, 6, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        return self.out(self.recurrent(x)[0].mean(dim=1))

def network():
    return Net()
""")
    described = record.NetworkRecord.of(f"{source}:network", {}, (7, 3))
    from greenprune.models import build

    network, example = build(described.factory), torch.randn(2, 7, 3)
    for removed in ({"recurrent": [1, 4]}, {"recurrent": [0]}):
        analysis = analyse(network, example)
        described = described.pruned(analysis, removed)
        network = surgery.prune_channels(network, example, removed)
    record.save_network(tmp_path / "saved", network, described)
    again, _ = record.load_network(tmp_path / "saved")
    assert again.recurrent.hidden_size == 3
    with torch.no_grad():
        torch.testing.assert_close(again(example), network.eval()(example))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_compact_network_agrees_with_its_onnx_graph(
    tmp_path: Path, cell: str, layers: int
) -> None:
    model = Reader(cell, 4, 6, num_layers=layers, bidirectional=True, batch_first=True)
    removed = {"conv": [1], "recurrent": [0, 5]}
    compact = surgery.prune_channels(model, torch.randn(IMAGE), removed)
    export_onnx(compact, torch.randn(3, *IMAGE[1:]), tmp_path / "net.onnx", ["logits"])


def frozen_because(forward: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> str:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LSTM(3, 6, batch_first=True)
            self.recurrent = nn.LSTM(6, 4, batch_first=True, **options)
            self.out = nn.Linear(2 if options else 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    analysis = analyse(Net(), torch.randn(1, 5, 3))
    assert "recurrent" not in widths(analysis)
    return {item.name: item.reason for item in analysis.frozen}["recurrent"]


def test_what_is_frozen_and_why() -> None:
    def plain(net: nn.Module, x: Tensor) -> Tensor:
        return net.out(net.recurrent(net.first(x)[0])[0].sum(dim=1))

    def given_state(net: nn.Module, x: Tensor) -> Tensor:
        states = net.first(x)
        start = states[1][0][:, :, :4]
        return net.out(net.recurrent(states[0], (start, start))[0].sum(dim=1))

    assert "proj_size" in frozen_because(plain, proj_size=2)
    assert "initial state" in frozen_because(given_state)

    def whole_tuple(net: nn.Module, x: Tensor) -> Tensor:
        return net.out(torch.stack(net.recurrent(net.first(x)[0])[1]).sum(dim=(0, 1)))

    assert "stack" in frozen_because(whole_tuple)


def test_steps_may_be_the_network_input_and_the_units_still_go() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(3, 5, batch_first=True)
            self.out = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.recurrent(x)[1][0])

    compact = surgery.prune_channels(Net(), torch.randn(1, 7, 3), {"recurrent": [1, 3]})
    assert compact.recurrent.weight_hh_l0.shape == (9, 3)


def test_the_proof_finds_a_gate_that_was_forgotten() -> None:
    model = Reader("lstm", 3, 4, batch_first=True)
    analysis = analyse(model, torch.randn(IMAGE))
    group = next(group for group in analysis.groups if group.name == "recurrent")
    for part in group.parameters:
        if part.parameter == "recurrent.bias_hh_l0":
            part.indices[:] = np.roll(part.indices, 1, axis=0)
    with pytest.raises(ProofError, match="relative difference"):
        surgery.prove(model, analysis, torch.randn(IMAGE), {"recurrent": [2]})
