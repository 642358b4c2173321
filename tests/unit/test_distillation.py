"""What a compact network learns from its teacher: logits, and stages where shapes agree."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from greenprune import training
from greenprune.bundle import Preprocessing
from greenprune.data import Data, Split, normalise
from greenprune.distillation import distilled, shared_stages
from greenprune.models import lenet5, resnet20
from greenprune.pruning import surgery
from greenprune.recipe import DistillationSettings

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([1, 0, 3, 9])
SETTINGS = DistillationSettings(distillation=0.7, temperature=3.0, features=2.0)


def pair(removed: dict[str, list[int]]) -> tuple[nn.Module, nn.Module]:
    """A ResNet-20 without these channels, and the whole one."""
    torch.manual_seed(0)
    teacher = resnet20().eval()
    return surgery.prune_channels(teacher, IMAGES[:2], removed), teacher


def test_stages_are_the_outermost_parts_that_were_cut_and_keep_their_shape() -> None:
    assert shared_stages(*pair({"layer1.0.conv1": [1], "layer3.2.conv1": [0, 5]}), IMAGES) == [
        "layer1",
        "layer3",
    ]
    whole = resnet20().eval()
    assert shared_stages(copy.deepcopy(whole), whole, IMAGES) == [], "nothing was cut"
    stream = pair({"conv1": [0]})  # goes through all stages, which are narrower then
    assert shared_stages(*stream, IMAGES) == []


def test_where_every_width_changed_there_are_none() -> None:
    teacher = lenet5().eval()
    images = torch.randn(2, 1, 32, 32)
    model = surgery.prune_channels(teacher, images, {"conv1": [0], "conv2": [1], "fc1": [2]})

    assert shared_stages(model, teacher, images) == []


def test_the_objective_is_the_formula() -> None:
    model, teacher = pair({"layer1.0.conv1": [1], "layer3.2.conv1": [0, 5]})

    def stage(network: nn.Module, upto: str) -> torch.Tensor:
        maps = F.relu(network.bn1(network.conv1(IMAGES)))
        for name in ("layer1", "layer2", "layer3"):
            maps = network.get_submodule(name)(maps)
            if name == upto:
                return maps
        raise AssertionError(upto)

    with distilled(model, teacher, IMAGES, SETTINGS, F.cross_entropy) as objective:
        outputs = model(IMAGES)
        value = objective(IMAGES, outputs, TARGETS)

    answers = teacher(IMAGES)
    soft = F.softmax(answers / 3, dim=1)
    divergence = (soft * (soft.log() - F.log_softmax(outputs / 3, dim=1))).sum(dim=1).mean()
    apart = [
        (stage(model, name) - stage(teacher, name)).square().sum()
        / stage(teacher, name).square().sum()
        for name in ("layer1", "layer3")
    ]
    expected = 0.3 * F.cross_entropy(outputs, TARGETS) + 0.7 * 9 * divergence
    torch.testing.assert_close(value, expected + 2.0 * (apart[0] + apart[1]) / 2)


def test_hooks_go_and_no_weight_means_no_stages() -> None:
    model, teacher = pair({"layer1.0.conv1": [1]})
    with distilled(model, teacher, IMAGES, SETTINGS, F.cross_entropy):
        assert model.get_submodule("layer1")._forward_hooks
    none = replace(SETTINGS, features=0.0)
    for network in (model, teacher):
        assert not network.get_submodule("layer1")._forward_hooks
    with distilled(model, teacher, IMAGES, none, F.cross_entropy) as objective:
        assert not model.get_submodule("layer1")._forward_hooks
        assert torch.isfinite(objective(IMAGES, model(IMAGES), TARGETS))


def test_fine_tuning_by_a_recipe_distils_stages() -> None:
    """From the same start: with their weight the stages end nearer to the teacher's."""
    split = Split(
        inputs=torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8), targets=torch.arange(32) % 10
    )
    images = Preprocessing(channels=3, size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    data = Data(
        train=split, development=split, selector=split, certification=split, test=split,
        class_names=tuple("0123456789"), preprocessing=images, augmentation="none", fingerprint="",
    )  # fmt: skip
    distances = []
    for features in (0.0, 100.0):
        model, teacher = pair({f"layer{n}.0.conv1": list(range(8)) for n in (1, 2, 3)})
        settings = replace(
            SETTINGS, features=features, epochs=4, batch_size=16, learning_rate=0.002
        )
        training.fit(model, data, settings, seed=0, teacher=teacher)
        only_stages = replace(SETTINGS, distillation=0.0, features=1.0)
        inputs = normalise(split.inputs, images)
        with distilled(model, teacher, inputs, only_stages, lambda o, t: o.sum() * 0) as objective:
            distances.append(objective(inputs, model(inputs), split.targets).item())
    assert distances[1] < 0.9 * distances[0]


def test_a_few_steps_bring_the_stages_nearer() -> None:
    model, teacher = pair({f"layer{n}.0.conv1": list(range(8)) for n in (1, 2, 3)})
    settings = replace(SETTINGS, distillation=1.0, features=10.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    values = []
    with distilled(model, teacher, IMAGES, settings, F.cross_entropy) as objective:
        for _ in range(8):
            optimizer.zero_grad()
            value = objective(IMAGES, model(IMAGES), TARGETS)
            value.backward()
            optimizer.step()
            values.append(value.item())
    assert values[-1] == pytest.approx(min(values))
    assert values[-1] < 0.95 * values[0]
