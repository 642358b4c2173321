"""One-off training with gates, from gated networks to compact ones without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune import models, training
from greenprune.data import Data, Split
from greenprune.errors import PruningError
from greenprune.models import resnet20
from greenprune.pruning import cost, gates, proof, record, surgery
from greenprune.pruning.gated import Gated, binary
from greenprune.pruning.gates import GateSettings
from greenprune.pruning.settling import settle

SETTINGS = GateSettings(
    epochs=8, gated_epochs=6, batch_size=16, learning_rate=0.05, width_multiple=1
)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Net(nn.Module):
    """Two residual blocks between a stem and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.first = Block(width)
        self.second = Block(width)
        self.head = nn.Linear(width * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.max_pool2d(self.second(self.first(x)), 2)
        return self.head(x.flatten(1))


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_data(count: int = 256) -> Data:
    """Two classes: is the upper half brighter than the lower."""
    inputs = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, 0, :4].sum((1, 2)) > inputs[:, 0, 4:].sum((1, 2))).long()
    split = Split(inputs=inputs, targets=targets)
    return Data(
        train=split,
        development=split,
        selector=split,
        certification=split,
        test=split,
        class_names=("dark", "bright"),
        preprocessing=None,
        fingerprint="made",
    )


DATA = make_data()
IMAGES = DATA.train.inputs


def settled_by(gated: Gated, opened: Tensor, probability: Tensor, settings: GateSettings) -> Tensor:
    return settle(
        gated, opened, probability, macs=settings.macs, width_multiple=settings.width_multiple
    )


def settled_at_random(gated: Gated, seed: int, settings: GateSettings) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    opened = torch.rand(sum(gated.sizes), generator=generator)
    return settled_by(gated, opened, opened, settings)


def test_a_binary_gate_is_exact_and_its_gradient_is_the_probability_s() -> None:
    probability = torch.rand(1000, requires_grad=True)
    found = binary(probability)
    assert set(found.tolist()) == {0.0, 1.0}
    assert torch.equal(found == 1, probability >= 0.5)
    (3 * found).sum().backward()
    assert torch.equal(probability.grad, torch.full((1000,), 3.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("factory", "arguments", "shape"),
    [
        ("lenet5", {"convolutions": [4, 6], "hidden": [12, 8]}, (1, 32, 32)),
        ("resnet20", {}, (3, 8, 8)),
        ("crnn", {"height": 28, "hidden": 8, "cell": "gru"}, (1, 28, 28)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_compact_network_is_the_gated_one_with_fixed_gates(
    factory: str, arguments: dict[str, Any], shape: tuple[int, ...], seed: int
) -> None:
    """In float64, from weights moved at random; and its cost is what the gates said."""
    model = models.build(f"greenprune.models:{factory}", arguments)
    example = torch.randn(2, *shape)
    settings = replace(SETTINGS, macs=0.4)
    built = gates.build(model, example, settings)
    settled = settled_at_random(built, seed, settings)
    gated, moved = proof.reference(built, example)
    assert isinstance(gated, Gated)
    gated.fixed = settled
    compact, _, _, removed = gates.cut(gated, settled, moved)
    assert proof.check_equal(gated, compact, moved) <= 1e-10
    assert removed
    share = cost.count(compact, moved).macs / cost.count(model, example).macs
    assert share == pytest.approx(float(built.share(settled)), abs=1e-9)
    assert share <= 0.4


def test_gates_depend_on_the_input_and_leave_no_trace() -> None:
    model = make_net().eval()
    before = model(IMAGES)
    gated = gates.build(model, IMAGES, SETTINGS).eval()
    assert not torch.equal(gated(IMAGES), before)  # some are shut for some images
    assert 0 < float(gates.polarization(gated.means().detach())) < 0.25
    assert gated.probabilities().std(dim=0).min() > 0
    gated.fixed = torch.ones(sum(gated.sizes), dtype=torch.bool)
    torch.testing.assert_close(gated(IMAGES), before)
    torch.testing.assert_close(model(IMAGES), before, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recurrent_units_have_no_gates() -> None:
    model = models.build("greenprune.models:crnn", {"height": 28, "hidden": 8, "cell": "lstm"})
    gated = gates.build(model, torch.randn(2, 1, 28, 28), SETTINGS)
    assert list(gated.ungated) == ["recurrent"]
    assert "inside" in gated.ungated["recurrent"]


def test_one_training_meets_the_target_and_gates_come_to_agree() -> None:
    model = make_net()
    gated = gates.build(model, IMAGES, SETTINGS).eval()
    gated(IMAGES)
    start = float(gates.polarization(gated.means().detach()))
    outcome = gates.train(model, DATA, SETTINGS, seed=0)
    assert outcome.polarization < start
    assert outcome.gated_macs == pytest.approx(0.5, abs=0.15)
    share = cost.count(outcome.network, IMAGES[:1]).macs / cost.count(model, IMAGES[:1]).macs
    assert share == pytest.approx(outcome.macs, abs=1e-9)
    assert 0.4 < share <= 0.5
    outputs = training.predict(outcome.network, DATA.test, None)
    assert training.accuracy(outputs, DATA.test.targets).mean() > 0.9
    assert len(outcome.history.loss) == 6
    assert len(outcome.settled_history.loss) == 2
    assert not any(module._forward_pre_hooks for module in outcome.network.modules())


def test_widths_land_on_multiples() -> None:
    gated = gates.build(resnet20(), torch.randn(2, 3, 8, 8), replace(SETTINGS, width_multiple=8))
    settings = replace(SETTINGS, width_multiple=8, macs=0.3)
    for seed in range(3):
        settled = settled_at_random(gated, seed, settings)
        widths = [int(part.sum()) for part in settled.split(gated.sizes)]
        assert all(width % 8 == 0 and width for width in widths[: len(gated.groups)])
        assert float(gated.share(settled)) <= 0.3


def test_settling_follows_the_gates_where_they_meet_the_target() -> None:
    gated = gates.build(make_net(), IMAGES, SETTINGS)
    generator = torch.Generator().manual_seed(1)
    opened = (torch.rand(sum(gated.sizes), generator=generator) < 0.7).double()
    opened[-2:] = 1
    macs = float(gated.share(opened))
    settled = settled_by(gated, opened, opened, replace(SETTINGS, macs=macs + 0.001))
    assert torch.equal(settled, opened == 1)


def test_settling_turns_the_gates_that_are_nearest_the_threshold() -> None:
    gated = gates.build(make_net(), IMAGES, SETTINGS)
    probability = torch.full((sum(gated.sizes),), 0.9)
    probability[0] = 0.51
    opened = torch.ones_like(probability)
    dense = torch.ones(sum(gated.sizes), dtype=torch.bool)
    one_shut = dense.clone()
    one_shut[0] = False
    settings = replace(SETTINGS, macs=float(gated.share(one_shut)))
    assert torch.equal(settled_by(gated, opened, probability, settings), one_shut)
    # and back: far below the target, what is shut most narrowly is opened
    settings = replace(SETTINGS, macs=0.9)
    opened = torch.where(torch.arange(len(opened)) < 8, (torch.arange(8) < 1).float().sum(), 1.0)
    opened[1:8], probability[1:8], probability[5] = 0.0, 0.1, 0.4
    found = settled_by(gated, opened, probability, replace(settings, macs=0.4))
    assert found[5]
    assert found[:8].sum() < 8
    assert 0.4 * 0.8 < float(gated.share(found)) <= 0.4


def test_expected_macs_are_those_of_the_analysis() -> None:
    gated = gates.build(resnet20(), torch.randn(2, 3, 16, 16), SETTINGS)
    settled = torch.ones(sum(gated.sizes), dtype=torch.bool)
    block = list(gated.blocks).index("layer2.1")
    settled[len(settled) - len(gated.blocks) + block] = False
    saved = gated.blocks["layer2.1"].saves.macs
    whole = cost.count(gated.network, torch.randn(1, 3, 16, 16)).macs
    assert float(gated.share(settled)) == pytest.approx(1 - saved / whole, abs=1e-12)
    means = torch.full((len(settled),), 0.7, requires_grad=True)
    gated.share(means).backward()
    assert means.grad is not None
    assert (means.grad > 0).all()


class Useless(nn.Module):
    """A block whose branch only disturbs: noise of its own, whatever the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.noise = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.noise(self.conv(x)))


def test_a_useless_block_goes_whole_and_the_record_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = useless_net()
    settings = replace(SETTINGS, macs=0.6)
    described = record.NetworkRecord.of(f"{__file__}:useless_net", {}, (1, 8, 8))
    outcome = gates.train(model, DATA, settings, seed=0)
    assert outcome.removed_blocks == ("second",)
    assert isinstance(model.get_submodule("second"), Useless)  # it was left uncut
    record.save_network(tmp_path, outcome.network, outcome.record(described))
    loaded, _ = record.load_network(tmp_path)
    assert not any("gate" in name for name in loaded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), outcome.network(IMAGES), rtol=0, atol=0)


def useless_net() -> Net:
    model = Net()
    model.second = Useless(8)  # type: ignore[assignment]
    with torch.no_grad():
        model.second.conv.weight.mul_(5)
    return model


def test_blocks_can_be_left_alone() -> None:
    gated = gates.build(make_net(), IMAGES, replace(SETTINGS, blocks=False))
    assert gated.blocks == {}


def test_a_training_that_was_killed_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, epochs=3, gated_epochs=2)
    expected = gates.train(make_net(), DATA, settings, seed=0).network.state_dict()
    write = training._write_checkpoint
    for stop in (1, 3):  # in the gated part, then in the settled one
        written = 0

        def interrupted(*arguments: Any, at: int = stop) -> None:
            nonlocal written
            written += 1
            write(*arguments)
            if written == at:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop)
        folder.mkdir()
        monkeypatch.setattr(training, "_write_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gates.train(make_net(), DATA, settings, seed=0, checkpoint=folder / "x.safetensors")
        monkeypatch.setattr(training, "_write_checkpoint", write)
        found = gates.train(make_net(), DATA, settings, seed=0, checkpoint=folder / "x.safetensors")
        for name, value in found.network.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_refusals() -> None:
    for macs in (0.0, 1.0, -1.0):
        with pytest.raises(PruningError, match="above 0 and below 1"):
            gates.build(make_net(), IMAGES, replace(SETTINGS, macs=macs))
    with pytest.raises(PruningError, match=r"stay at least; raise the target"):
        gates.build(make_net(), IMAGES, replace(SETTINGS, macs=0.1, width_multiple=8))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(PruningError, match="no channels that gates could be put on"):
        gates.build(flat, IMAGES, SETTINGS)
    with pytest.raises(PruningError, match="gated_epochs of at most epochs = 8, got 9"):
        gates.train(make_net(), DATA, replace(SETTINGS, gated_epochs=9), seed=0)


def test_a_custom_loss_is_trained() -> None:
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        return F.cross_entropy(outputs, targets)

    gates.train(make_net(), DATA, replace(SETTINGS, epochs=2, gated_epochs=1), seed=0, loss=loss)
    assert seen == [16] * 32


def test_what_a_removed_block_held_together_is_found_again() -> None:
    """Channels are known by who writes them, whatever the groups are called after the block."""
    model = resnet20()
    example = torch.randn(2, 3, 8, 8)
    gated = gates.build(model, example, SETTINGS)
    settled = torch.ones(sum(gated.sizes), dtype=torch.bool)
    settled[len(settled) - len(gated.blocks)] = False  # layer1.0
    settled[3] = False  # of the stream
    compact, blocks, _, removed = gates.cut(gated, settled, example)
    assert blocks == ("layer1.0",)
    assert removed == {"conv1": (3,)}
    assert "layer1.0.conv1" not in dict(surgery.explain(compact, example).analysis.shapes)
