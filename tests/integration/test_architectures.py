"""Whole architectures: analysed, pruned in every group, proved, and exported."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune import models
from greenprune.onnx_export import export_onnx
from greenprune.pruning import cost, surgery
from greenprune.pruning.graph import Analysis, analyse

torchvision = pytest.importorskip("torchvision")


class UNet(nn.Module):
    """Two levels, with concatenation and transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = unit(3, 8), unit(8, 16), unit(16, 32)
        self.up2, self.join2 = nn.ConvTranspose2d(32, 16, 2, stride=2), unit(32, 16)
        self.up1, self.join1 = nn.ConvTranspose2d(16, 8, 2, stride=2), unit(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.up2(self.bottom(F.max_pool2d(two, 2)))
        y = self.up1(self.join2(torch.cat([two, y], dim=1)))
        return self.out(self.join1(torch.cat([one, y], dim=1)))


class Detector(nn.Module):
    """A pyramid of features, one pair of heads for all its levels, and a global output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.top = unit(3, 8), unit(8, 16, 2), unit(16, 32, 2)
        self.lateral = nn.ModuleList([nn.Conv2d(width, 12, 1) for width in (8, 16, 32)])
        self.smooth = nn.ModuleList([unit(12, 12) for _ in range(3)])
        self.boxes = nn.ModuleList([nn.Conv2d(12, 4, 1) for _ in range(3)])
        self.classes = nn.ModuleList([nn.Conv2d(12, 5, 1) for _ in range(3)])
        self.scene = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        low = self.stem(x)
        middle = self.middle(low)
        high = self.top(middle)
        y = self.lateral[2](high)
        levels = [self.smooth[2](y)]
        for place, features in ((1, middle), (0, low)):
            y = self.lateral[place](features) + F.interpolate(y, scale_factor=2.0)
            levels.append(self.smooth[place](y))
        return {
            "boxes": [head(level) for head, level in zip(self.boxes, levels, strict=True)],
            "classes": tuple(head(level) for head, level in zip(self.classes, levels, strict=True)),
            "scene": self.scene(high.mean((2, 3))),
        }


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def built_in(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: models.build(f"greenprune.models:{name}", arguments)


def of_torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(**arguments)


def vit_b_16_of_four_layers() -> nn.Module:
    """Of twelve, for time; the others are alike."""
    return torchvision.models.VisionTransformer(32, 16, 4, 12, 768, 3072)  # type: ignore[no-any-return]


IMAGE = (3, 32, 32)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    # name: factory, input, a layer whose output must be prunable
    "lenet5": (built_in("lenet5"), (1, 32, 32), "conv2"),
    "vgg16": (built_in("vgg16"), IMAGE, "features.0"),
    "resnet56": (built_in("resnet56"), IMAGE, "conv1"),
    "googlenet": (
        of_torchvision("googlenet", init_weights=False),
        IMAGE,
        "inception3a.branch1.conv",
    ),
    "googlenet_cifar": (built_in("googlenet"), (3, 16, 16), "features.0.0"),
    "densenet40": (built_in("densenet40"), (3, 16, 16), "features.0"),
    "mobilenet_v2": (of_torchvision("mobilenet_v2"), IMAGE, "features.1.conv.1"),
    "mobilenet_v3_small": (of_torchvision("mobilenet_v3_small"), IMAGE, "features.1.block.1.fc1"),
    "efficientnet_b0": (of_torchvision("efficientnet_b0"), IMAGE, "features.2.0.block.2.fc1"),
    "regnet_y_400mf": (
        of_torchvision("regnet_y_400mf"),
        IMAGE,
        "trunk_output.block1.block1-0.f.b.0",
    ),
    "resnext50": (of_torchvision("resnext50_32x4d"), IMAGE, "layer1.0.conv2"),
    "shufflenet_v2": (of_torchvision("shufflenet_v2_x0_5"), (3, 64, 64), "stage2.1.branch2.0"),
    "squeezenet": (of_torchvision("squeezenet1_1"), (3, 64, 64), "features.3.squeeze"),
    "convnext_tiny": (of_torchvision("convnext_tiny"), IMAGE, "features.1.0.block.3"),
    "vit_b_16": (vit_b_16_of_four_layers, IMAGE, "encoder.layers.encoder_layer_0.mlp.0"),
    "unet": (UNet, IMAGE, "up2"),
    "detector": (Detector, IMAGE, "lateral.0"),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape, _ = NETWORKS[name]
    model = build().eval()
    for parameter in model.parameters():  # heads of zeros would hide everything
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model, torch.randn(2, *shape)


def some_of_each(analysis: Analysis) -> dict[str, list[int]]:
    """30% of every second group's channels and 50% of the others'."""
    random = np.random.default_rng(0)
    return {
        group.name: random.choice(
            group.channels, int(group.channels * (0.5 if place % 2 else 0.3)), replace=False
        ).tolist()
        for place, group in enumerate(analysis.groups)
    }


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    return [value] if isinstance(value, Tensor) else [t for item in value for t in tensors(item)]


def assert_onnx_agrees(model: nn.Module, images: Tensor, path: Path) -> None:
    """By torch's older exporter, a tenth of the newer one's time."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), path, opset_version=17, dynamo=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in tensors(model(images))]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_proved_and_exported(name: str, tmp_path: Path) -> None:
    model, images = network(name)
    analysis = analyse(model, images)
    written = {part.module for group in analysis.groups for part in group.producers}
    frozen = {item.name for item in analysis.frozen}
    assert NETWORKS[name][2] in written
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(
        n in written or n in frozen for n in layers if "aux" not in n and "out_proj" not in n
    )

    removed = some_of_each(analysis)
    assert surgery.prove(model, analysis, images, removed) <= 1e-10
    compact = surgery.compact(model, analysis, removed)
    predicted = analysis.predict_cost({key: len(gone) for key, gone in removed.items()})
    assert predicted == cost.count(compact, images)
    assert_onnx_agrees(compact, images, tmp_path / "compact.onnx")


@pytest.mark.parametrize("name", ["lenet5", "unet"])
def test_the_projects_own_export(name: str, tmp_path: Path) -> None:
    model, images = network(name)
    analysis = analyse(model, images)
    compact = surgery.compact(model, analysis, some_of_each(analysis))
    export_onnx(compact, images, tmp_path / "compact.onnx", ["out"])


def test_plain_convolutional_networks_keep_their_outputs_alone() -> None:
    for name, last in (
        *(("resnet56", "linear"), ("densenet40", "classifier"), ("mobilenet_v2", "classifier.1")),
        *(("regnet_y_400mf", "fc"), ("resnext50", "fc"), ("unet", "out")),
    ):
        assert {item.name for item in analyse(*network(name)).frozen} == {last}


def test_resnet56_prunes_its_stream() -> None:
    """To about half its MACs, which the inner channels alone do not give."""
    model, images = network("resnet56")
    analysis = analyse(model, images)
    names = {group.name for group in analysis.groups}
    assert len(names) == 30
    assert {"conv1", "layer2.0.conv2", "layer3.0.conv2"} < names
    counts = {group.name: math.ceil(group.channels * 0.3) for group in analysis.groups}
    assert analysis.predict_cost(counts).macs < 0.52 * cost.count(model, images).macs


def test_what_attention_and_layer_norm_hold_is_frozen_and_the_mlps_are_not() -> None:
    model, images = network("vit_b_16")
    told = str(surgery.explain(model, images))
    assert told.startswith("4 groups of channels can be pruned:")
    attention = "encoder.layers.encoder_layer_[0-3].self_attention"
    assert f"{attention}: it is attention, which stays whole" in told
    assert "conv_proj: tied to values that are not followed: 'class_token' is a parameter" in told


def test_chunk_and_shuffle_leave_what_their_ties_leave() -> None:
    """Halves that change places at each block: 24 channels are 3 that can go, 116 are one."""
    model, images = network("shufflenet_v2")
    groups = {group.name: group for group in analyse(model, images).groups}
    stream = groups["stage2.0.branch1.2"]
    assert (stream.channels, stream.producers[0].indices.shape) == (3, (3, 8))

    wider = torchvision.models.shufflenet_v2_x1_0()
    analysis = analyse(wider, images)
    reasons = {item.name: item.reason for item in analysis.frozen}
    assert reasons["stage2.1.branch2.5"] == "its channels could only go all at once"
    inner = [group for group in analysis.groups if group.name.endswith("branch2.0")]
    assert len(inner) == 16
