from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune import sparsity, training
from greenprune.data import Data, Split
from greenprune.errors import RecipeError, TrainingError
from greenprune.recipe import DistillationSettings, SparsitySettings, TrainingSettings

SETTINGS = TrainingSettings(epochs=3, batch_size=16, learning_rate=0.1)


class Net(nn.Module):
    """A little of everything: BatchNorm's statistics and dropout's random numbers too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 4, 8)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.out(self.dropout(F.relu(self.hidden(x.flatten(1)))))


def make_data(count: int = 50) -> Data:
    """Two classes: is the upper half brighter than the lower."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 1, 4, 4, generator=generator)
    targets = (inputs[:, 0, :2].sum((1, 2)) > inputs[:, 0, 2:].sum((1, 2))).long()
    split = Split(inputs=inputs, targets=targets)
    empty = Split(inputs=inputs[:0], targets=targets[:0])
    return Data(
        train=split,
        development=empty,
        selector=empty,
        certification=empty,
        test=split,
        class_names=("dark", "bright"),
        preprocessing=None,
        augmentation="shift",
        fingerprint="made",
    )


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def test_training_learns() -> None:
    data = replace(make_data(400), augmentation="none")
    net = make_net()
    history = training.fit(net, data, replace(SETTINGS, epochs=8), seed=0)
    scores = training.evaluate(training.predict(net, data.test, None), data.test.targets)
    assert len(history.loss) == len(history.seconds) == 8
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert float(scores.mean()) > 0.9
    assert not net.training


class Viewing(Net):
    """Its ``view`` works on contiguous tensors alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.out(F.relu(self.hidden(x.view(len(x), -1))))


def test_the_layout_in_memory_is_the_trainings_own_affair() -> None:
    for net in (Net(), Viewing()):
        history = training.fit(net, make_data(), SETTINGS, seed=0)
        assert history.loss[-1] < 0.8
        assert all(parameter.is_contiguous() for parameter in net.parameters())


def test_training_depends_on_its_seed_alone() -> None:
    nets = [make_net() for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        torch.rand(seed + len(nets))  # the global generator's state does not matter
        training.fit(net, make_data(), SETTINGS, seed=seed)
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    net = make_net()
    torch.manual_seed(3)
    training.fit(net, make_data(), SETTINGS, seed=0)
    assert torch.equal(torch.rand(1), expected)


class Killed(BaseException):
    """Stands for a process that is killed."""


@pytest.mark.parametrize("killed_after", [1, 2])
@pytest.mark.parametrize("penalised", [False, True])
def test_killed_and_resumed_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, penalised: bool
) -> None:
    data = make_data()
    settings = SparsitySettings(epochs=3, batch_size=16, learning_rate=0.1, strength=1e-2)

    def run(net: Net, checkpoint: Path | None) -> training.History:
        penalty = sparsity.build(net, torch.zeros(1, 1, 4, 4), target=0.3) if penalised else None
        return training.fit(net, data, settings, seed=5, penalty=penalty, checkpoint=checkpoint)

    whole = make_net()
    history = run(whole, None)

    checkpoint = tmp_path / "checkpoint.safetensors"
    write = training._write_checkpoint
    calls = []

    def write_and_die(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == killed_after:
            raise Killed

    monkeypatch.setattr(training, "_write_checkpoint", write_and_die)
    with pytest.raises(Killed):
        run(make_net(), checkpoint)
    resumed = make_net()
    again = run(resumed, checkpoint)
    assert same(whole, resumed)
    assert again.loss == history.loss
    assert len(calls) == settings.epochs  # the epochs before were not trained again


def test_a_checkpoint_of_another_training_is_not_resumed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    training.fit(make_net(), make_data(), SETTINGS, seed=0, checkpoint=checkpoint)
    for net_seed, seed, settings in (
        (1, 0, SETTINGS),
        (0, 1, SETTINGS),
        (0, 0, replace(SETTINGS, learning_rate=0.2)),
    ):
        expected, found = make_net(net_seed), make_net(net_seed)
        training.fit(expected, make_data(), settings, seed=seed)
        training.fit(found, make_data(), settings, seed=seed, checkpoint=checkpoint)
        assert same(expected, found)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"\x10")
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors: the checkpoint is damaged"):
        training.fit(make_net(), make_data(), SETTINGS, seed=0, checkpoint=checkpoint)


def test_no_epochs_change_nothing() -> None:
    net, before = make_net(), make_net()
    history = training.fit(net, make_data(), replace(SETTINGS, epochs=0), seed=0)
    assert history.loss == ()
    assert same(net, before)


def test_a_loss_that_is_not_finite_names_its_place() -> None:
    settings = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"epoch 1, step \d, at learning rate"):
        training.fit(make_net(), make_data(), settings, seed=0)


def test_a_loss_that_is_not_a_scalar_is_refused() -> None:
    def each(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    with pytest.raises(TrainingError, match="expected a scalar"):
        training.fit(make_net(), make_data(), SETTINGS, seed=0, loss=each)


def test_warm_up_then_cosine() -> None:
    settings = TrainingSettings(epochs=4, learning_rate=1.0, warmup_epochs=1.0)
    rates = [training._learning_rate(step, 5, settings) for step in range(20)]
    assert rates[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_the_teacher_teaches_and_is_not_changed() -> None:
    data = make_data(200)
    teacher = make_net(1)
    with torch.no_grad():  # a teacher of clear opinions
        teacher.out.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(teacher)
    wrong = replace(data, train=replace(data.train, targets=1 - data.train.targets))
    settings = DistillationSettings(
        epochs=8, batch_size=16, learning_rate=0.1, distillation=1.0, temperature=2.0
    )
    student = make_net(2)
    training.fit(student, wrong, settings, seed=0, teacher=teacher)  # all it hears is the teacher
    agree = training.predict(student, data.test, None).argmax(1) == training.predict(
        teacher, data.test, None
    ).argmax(1)
    assert float(agree.float().mean()) > 0.8
    assert same(before, teacher)
    with pytest.raises(TrainingError, match="DistillationSettings"):
        training.fit(student, data, SETTINGS, seed=0, teacher=teacher)


def test_label_smoothing_applies_to_the_built_in_loss_alone() -> None:
    outputs, targets = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    settings = TrainingSettings(label_smoothing=0.2)
    built_in = training._supervised(settings, training.cross_entropy)
    own = training._supervised(settings, lambda o, t: F.cross_entropy(o, t))
    smoothed = F.cross_entropy(outputs, targets, label_smoothing=0.2)
    assert torch.equal(built_in(outputs, targets), smoothed)
    assert torch.equal(own(outputs, targets), F.cross_entropy(outputs, targets))


def test_penalised_parameters_have_no_weight_decay() -> None:
    net = make_net()
    penalty = sparsity.build(net, torch.zeros(1, 1, 4, 4))
    optimizer = training._optimizer(net, TrainingSettings(weight_decay=0.1), penalty)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: decay[id(p)] for name, p in net.named_parameters()} == {
        "conv.weight": 0.1,
        "bn.weight": 0.0,
        "bn.bias": 0.0,
        "hidden.weight": 0.0,
        "hidden.bias": 0.0,
        "out.weight": 0.1,
        "out.bias": 0.1,
    }


def test_predict_does_not_depend_on_the_batch_size_or_the_mode() -> None:
    net, data = make_net(), make_data()
    net.train()
    small = training.predict(net, data.test, None, batch_size=7)
    assert net.training
    torch.testing.assert_close(small, training.predict(net.eval(), data.test, None))
    with pytest.raises(TrainingError, match="no images"):
        training.predict(net, data.selector, None)
    net.out.bias.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="NaN"):
        training.predict(net, data.test, None)


def test_evaluate_refuses_what_is_not_a_score() -> None:
    outputs, targets = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 1])
    assert training.evaluate(outputs, targets).tolist() == [1.0, 0.0]
    for metric in (
        lambda o, t: (o.argmax(1) == t).float().mean(),
        lambda o, t: o.argmax(1) == t,
        lambda o, t: o[:, 0],
        lambda o, t: torch.full((2,), torch.nan),
        lambda o, t: 1.0,
    ):
        with pytest.raises(RecipeError, match=r"task\.metric: expected a float tensor \[2\]"):
            training.evaluate(outputs, targets, metric)  # type: ignore[arg-type]
