from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from greenprune import models, sparsity
from greenprune.errors import TrainingError

IMAGE = torch.zeros(1, 1, 32, 32)


def sgd(model: nn.Module, rate: float, momentum: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


SMALL = torch.zeros(1, 1, 4, 4)


def prox_group(rows: Tensor, threshold: float) -> Tensor:
    """One filter at a time, from the textbook: argmin_x ½‖x − v‖² + t‖x‖₂."""
    result = torch.zeros_like(rows)
    for number, row in enumerate(rows):
        norm = float(row.norm())
        if norm > threshold:
            result[number] = row * (1 - threshold / norm)
    return result


@settings(max_examples=40, deadline=None)
@given(
    strength=st.floats(1e-4, 1.0),
    rate=st.floats(1e-3, 1.0),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
)
@pytest.mark.parametrize("method", sparsity.METHODS)
def test_the_step_is_the_proximal_map(
    method: str, strength: float, rate: float, momentum: float
) -> None:
    threshold = rate * strength / (1 - momentum)
    for model in (normed(), plain()):
        owner = model[1] if isinstance(model[1], nn.BatchNorm2d) else model[0]
        weight, bias = owner.weight.detach().clone(), owner.bias.detach().clone()
        others = [p.detach().clone() for p in model[-1].parameters()]
        penalty = sparsity.build(model, SMALL, method, strength)
        penalty.step(sgd(model, rate, momentum))
        rows = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
        if method.startswith("cbs"):
            rows = torch.cat([rows, bias[:, None]], 1)
        if method in ("cbs_l1", "l1"):
            expected = rows.sign() * (rows.abs() - threshold).clamp(min=0)
        else:
            factor = sqrt(rows.shape[1]) if owner is model[0] else 1.0
            expected = prox_group(rows, threshold * factor)
        if method.startswith("cbs"):
            torch.testing.assert_close(owner.bias.detach(), expected[:, -1])
            expected = expected[:, :-1]
        else:
            assert torch.equal(owner.bias, bias)
        torch.testing.assert_close(owner.weight.detach(), expected.reshape(weight.shape))
        assert all(torch.equal(a, b) for a, b in zip(others, model[-1].parameters(), strict=True))


def test_weights_and_bias_reach_zero_together_and_exactly() -> None:
    for model, owner in ((normed(), 1), (plain(), 0)):
        penalty = sparsity.build(model, SMALL, "cbs", 1.0)
        optimizer = sgd(model, 0.05)
        for _ in range(12):
            penalty.step(optimizer)
            weight, bias = model[owner].weight, model[owner].bias
            zero = weight.flatten(1).eq(0).all(1) if weight.ndim > 1 else weight == 0
            assert torch.equal(zero, bias == 0)
            assert penalty.zero_share() == pytest.approx(float(zero.float().mean()))
            assert all(torch.isfinite(p).all() for p in model.parameters())
        assert penalty.zero_share() > 0


def test_plain_methods_leave_the_bias_of_a_dead_filter() -> None:
    model = normed()
    penalty = sparsity.build(model, SMALL, "group", 1.0)
    penalty.step(sgd(model, 100.0))
    assert not model[1].weight.any()
    assert model[1].bias.all()
    assert penalty.zero_share() == 1.0


@pytest.mark.parametrize("method", sparsity.METHODS)
def test_the_value_is_the_tables_formula(method: str) -> None:
    gamma, beta = (p.detach() for p in normed()[1].parameters())
    weight, bias = plain()[0].weight.detach().flatten(1), plain()[0].bias.detach()
    rows = torch.cat([weight, bias[:, None]], 1)
    with_norm, without = {
        "cbs": (torch.hypot(gamma, beta).sum(), sqrt(10) * rows.norm(dim=1).sum()),
        "cbs_l1": (gamma.abs().sum() + beta.abs().sum(), rows.abs().sum()),
        "group": (gamma.abs().sum(), 3 * weight.norm(dim=1).sum()),
        "l1": (gamma.abs().sum(), weight.abs().sum()),
    }[method]
    value = sparsity.build(normed(), SMALL, method, 0.5).value()
    assert value == pytest.approx(0.5 * float(with_norm), rel=1e-5)
    value = sparsity.build(plain(), SMALL, method, 0.5).value()
    assert value == pytest.approx(0.5 * float(without), rel=1e-5)


def test_what_is_penalised_in_the_built_in_networks() -> None:
    lenet = models.lenet5()
    layers = [lenet.conv1, lenet.conv2, lenet.fc1, lenet.fc2]
    found = sparsity.build(lenet, IMAGE).parameters
    assert [id(p) for p in found] == [id(p) for layer in layers for p in layer.parameters()]

    resnet = models.resnet20()
    norms = [m for m in resnet.modules() if isinstance(m, nn.BatchNorm2d)]
    penalty = sparsity.build(resnet, torch.zeros(1, 3, 32, 32))
    assert {id(p) for p in penalty.parameters} == {id(p) for m in norms for p in m.parameters()}
    assert penalty.layers == ()

    vgg = models.vgg16()
    penalty = sparsity.build(vgg, torch.zeros(1, 3, 32, 32), "l1")
    assert len(penalty.norms) == 14
    assert penalty.layers == ()


class Awkward(nn.Module):
    """A BatchNorm before any convolution, a frozen layer, one without scale, control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(1)
        self.conv = nn.Conv2d(1, 4, 3)
        self.bare = nn.BatchNorm2d(4, affine=False)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.used = nn.Conv2d(4, 4, 1, bias=False)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bare(self.conv(self.first(x)))
        if float(x.sum()) > -1e9:  # what a tracer cannot follow
            x = self.used(self.frozen(x))
        return self.out(x.mean((2, 3)))


def test_only_trainable_filters_before_the_output_layer() -> None:
    model = Awkward()
    model.bare.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    penalty = sparsity.build(model, SMALL)
    assert [id(p) for p in penalty.parameters] == [id(model.used.weight)]
    assert model.training
    assert not model.bare.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_optimisers_without_one_step_size_are_refused() -> None:
    model = plain()
    penalty = sparsity.build(model, SMALL)
    with pytest.raises(TrainingError, match=r"SGD, found Adam: .* no one step size"):
        penalty.step(torch.optim.Adam(model.parameters()))
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.2}]
    with pytest.raises(TrainingError, match="one learning rate"):
        penalty.step(torch.optim.SGD(groups, lr=0.1))


def test_a_zero_threshold_changes_nothing_even_at_zero() -> None:
    model = plain()
    model[0].weight.data[0] = 0
    model[0].bias.data[0] = 0
    before = [p.detach().clone() for p in model.parameters()]
    sparsity.build(model, SMALL, strength=0.0).step(sgd(model, 0.1))
    sparsity.build(model, SMALL).step(sgd(model, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    sparsity.build(model, SMALL).step(sgd(model, 0.1))
    assert not model[0].weight[0].any()


def test_impossible_requests() -> None:
    with pytest.raises(TrainingError, match="expected a method of cbs"):
        sparsity.build(plain(), SMALL, "lasso")
    with pytest.raises(TrainingError, match="strength of 0 or more"):
        sparsity.build(plain(), SMALL, "cbs", -1.0)
    with pytest.raises(TrainingError, match="nothing to penalise"):
        sparsity.build(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), SMALL)


@pytest.mark.parametrize("rate", [0.005, 0.05])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("method", ["cbs", "group"])
def test_the_share_of_zeros_that_is_wanted_is_met(method: str, target: float, rate: float) -> None:
    """Exactly, by shrinking: the loss does not jump where the last filters get to zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 8))
    inputs = torch.randn(256, 8)
    penalty = sparsity.build(model, inputs, method, target=target)
    optimizer = sgd(model, rate, 0.9)
    steps, largest = 300, 0.0

    for number in range(steps):
        optimizer.zero_grad()
        (model(inputs) - inputs).square().mean().backward()
        optimizer.step()
        before = penalty._comparable_norms().detach()
        penalty.advance(optimizer, (number + 1) / steps, 1 / steps)
        penalty.step(optimizer)
        cut = before - penalty._comparable_norms().detach()
        largest = max(largest, float(cut.max()) / penalty.aim.start)

    assert penalty.zero_share() == pytest.approx(target)
    assert penalty.strength == 0.0
    assert largest < 0.5


def test_without_a_target_the_strength_stays() -> None:
    model = plain()
    penalty = sparsity.build(model, SMALL, strength=1e-3)

    penalty.advance(sgd(model, 0.1), 0.5, 0.1)

    assert penalty.strength == 1e-3


@pytest.mark.parametrize(
    ("target", "method"), [(0.0, "cbs"), (1.0, "cbs"), (-0.1, "group"), (1.5, "cbs"), (0.5, "l1")]
)
def test_a_share_of_zeros_that_cannot_be_is_refused(target: float, method: str) -> None:
    with pytest.raises(TrainingError, match=r"above 0 and at most 0\.8"):
        sparsity.build(plain(), SMALL, method, target=target)


def test_no_layer_goes_whole_and_scales_of_other_sizes_do_not_decide() -> None:
    """A BatchNorm's scales are near one, a linear layer's weights are not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    images, targets = torch.randn(64, 1, 8, 8), torch.randint(0, 4, (64,))
    penalty = sparsity.build(model, images[:1], target=0.6)
    optimizer = sgd(model, 0.02, 0.9)

    for number in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        penalty.advance(optimizer, (number + 1) / 100, 0.01)
        penalty.step(optimizer)

    zeros = [float((model[1].weight == 0).float().mean())]
    zeros.append(float((model[5].weight == 0).all(dim=1).float().mean()))
    assert all(0.2 < share <= 0.8 for share in zeros), zeros
    assert penalty.zero_share() == pytest.approx(0.6, abs=0.02)
