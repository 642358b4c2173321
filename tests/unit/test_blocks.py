"""Residual blocks that are removed whole: which they are, and the proof."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune.errors import ProofError, PruningError
from greenprune.models import resnet20
from greenprune.pruning import blocks, cost, surgery

IMAGE = torch.randn(2, 3, 16, 16)


class Residual(nn.Module):
    """A block written as a function of a convolution."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def around(block: nn.Module) -> nn.Sequential:
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 3), block, *tail)


def test_blocks_of_a_resnet_are_those_with_an_identity_beside_them() -> None:
    model = resnet20()
    found = surgery.removable_blocks(model, IMAGE)
    expected = [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert list(found) == [name for name in expected if name not in ("layer2.0", "layer3.0")]
    assert found["layer1.2"].branches == ("layer1.2.bn2",)
    names = ["layer1.0", "layer1.1", "layer3.2"]
    assert surgery.prove_blocks(model, IMAGE, names) <= 1e-10

    before = cost.count(model, IMAGE)
    for name in names:
        surgery.remove_block(model, name)
    after = cost.count(model, IMAGE)
    assert before.macs - after.macs == sum(found[name].saves.macs for name in names)
    assert before.params - after.params == sum(found[name].saves.params for name in names)
    assert list(surgery.removable_blocks(model, IMAGE)) == [n for n in found if n not in names]


def test_a_removed_block_is_the_block_whose_last_module_gives_zero() -> None:
    """Checked against the network's own forward, not the traced one."""
    model = resnet20().eval()
    (branch,) = surgery.removable_blocks(model, IMAGE)["layer2.1"].branches
    hook = model.get_submodule(branch).register_forward_hook(lambda m, a, out: out * 0)
    with torch.no_grad():
        expected = model(IMAGE)
        hook.remove()
        surgery.remove_block(model, "layer2.1")
        torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, x: x + net.norm(net.conv(x)),
        lambda net, x: F.hardswish(torch.add(net.norm(net.conv(x)), x)),
        lambda net, x: net.conv(x).add_(x).sigmoid(),
        lambda net, x: net.drop(x + F.dropout(net.conv(x), 0.5, net.training)),
        lambda net, x: (lambda y: y + net.norm(y))(x + net.conv(x)),
    ],
)
def test_forms_of_blocks(compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = around(Residual(compute))
    assert list(surgery.removable_blocks(model, IMAGE)) == ["1"]
    assert surgery.prove_blocks(model, IMAGE, ["1"]) <= 1e-10
    surgery.remove_block(model, "1")
    assert not any(name.startswith("1.") for name, _ in model.named_parameters())
    assert model.get_submodule("1").training
    assert not model.eval().get_submodule("1").training
    assert model(IMAGE).shape == (2, 3)


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, x: net.norm(net.conv(x)),
        lambda net, x: net.norm(x + net.conv(x)),
        lambda net, x: x * net.conv(x),
        lambda net, x: x + x.relu(),
        lambda net, x: net.norm(x) + net.conv(x),
        lambda net, x: F.dropout(x + net.conv(x), 0.5, net.training),
        lambda net, x: torch.add(x, net.conv(x), alpha=2),
    ],
)
def test_what_is_no_block_stays(compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = around(Residual(compute))
    assert surgery.removable_blocks(model, IMAGE) == {}
    with pytest.raises(PruningError, match=r"'1'"):
        surgery.remove_block(model, "1")


def test_a_block_that_changes_its_input_in_place_is_left_out() -> None:
    """What is added to is the activation then, which goes with the branch."""
    model = around(Residual(lambda net, x: net.conv(x.relu_()) + x))
    assert surgery.removable_blocks(model, IMAGE) == {}


def test_a_block_called_twice_is_left_out() -> None:
    block = Residual(lambda net, x: x + net.conv(x))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), block, block, nn.Flatten(), nn.Linear(784, 3))
    assert surgery.removable_blocks(model, IMAGE) == {}


def test_a_block_without_modules_behind_its_branch_says_so() -> None:
    model = around(Residual(lambda net, x: x + net.conv(x) * 0.1))
    assert surgery.removable_blocks(model, IMAGE)["1"].branches == ("",)


def test_unknown_names() -> None:
    for name in ("", "layer9"):
        with pytest.raises(PruningError, match="expected the name of a residual block"):
            surgery.remove_block(resnet20(), name)


def test_the_proof_finds_a_block_that_was_removed_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the closing activation."""

    def identity(model: nn.Module, name: str) -> None:
        setattr(model, name, nn.Identity())

    model = around(Residual(lambda net, x: F.relu(x + net.conv(x))))
    monkeypatch.setattr(blocks, "remove_block", identity)
    with pytest.raises(ProofError, match="relative difference"):
        surgery.prove_blocks(model, IMAGE, ["1"])
