"""The rule table: single operations, and random small networks assembled from it, all proved."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from greenprune.pruning import cost, surgery
from greenprune.pruning.graph import Analysis, analyse

EXAMPLES = int(os.environ.get("GREENPRUNE_EXAMPLES", "60"))
IMAGE = (2, 3, 8, 8)


# ---- single operations ----


class Between(nn.Module):
    """An operation between a convolution of ``width`` channels and one that reads its result."""

    def __init__(
        self, width: int, operation: Callable[[Tensor], Tensor], image: tuple[int, ...] = IMAGE
    ) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.operation = operation
        with torch.no_grad():
            outputs = operation(self.a(torch.zeros(image)))
        self.b = nn.Conv2d(outputs.shape[1], 5, 1) if outputs.dim() == 4 else None
        self.out = nn.Linear(5 if self.b is not None else outputs.shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.a(x))
        return self.out(self.b(y).mean((2, 3)) if self.b is not None else y)


def shuffle(y: Tensor) -> Tensor:
    n, c, h, w = y.size()
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def literal_shuffle(y: Tensor) -> Tensor:
    return y.reshape(-1, 2, 6, 8, 8).permute(0, 2, 1, 3, 4).reshape(-1, 12, 8, 8)


def gated(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=1)
    return a * torch.sigmoid(b)


def halves(y: Tensor) -> Tensor:
    a, b = y.split(y.shape[1] // 2, 1)
    return torch.cat((b, a), 1)


def sections(y: Tensor) -> Tensor:
    a, b, c = torch.split(y, [2, 4, 6], 1)
    return torch.cat((c, a, b), 1)


def pieces(y: Tensor) -> Tensor:
    a, b, c = y.split(4, dim=1)
    return torch.cat((c, a), 1) + torch.cat((b, b), 1)


def along_the_height(y: Tensor) -> Tensor:
    a, b = torch.chunk(y, 2, 2)
    (c, d), e = a.split([1, 3], dim=2), b.unbind(2)[0]
    return c + d.mean(2, keepdim=True) + e.unsqueeze(2)


def attend_over_space(y: Tensor) -> Tensor:
    return y * torch.softmax(y.flatten(2), dim=-1).view(y.shape[0], -1, 8, 8)


def last(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1)[:, 0, -1]


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2).mean(1)


@pytest.mark.parametrize(
    ("operation", "groups"),
    [
        (shuffle, {"a": 6, "b": 5}),
        (literal_shuffle, {"a": 6, "b": 5}),
        (nn.ChannelShuffle(3), {"a": 4, "b": 5}),
        (lambda y: F.channel_shuffle(y, 2), {"a": 6, "b": 5}),
        (nn.PixelShuffle(2), {"a": 3, "b": 5}),
        (lambda y: F.pixel_unshuffle(y, 2), {"a": 12, "b": 5}),
        (gated, {"a": 6, "b": 5}),
        (halves, {"a": 6, "b": 5}),
        (sections, {"a": 12, "b": 5}),
        (pieces, {"a": 4, "b": 5}),
        (along_the_height, {"a": 12, "b": 5}),
        (attend_over_space, {"a": 12, "b": 5}),
        (last, {"a": 12}),
        (tokens, {"a": 12}),
        (nn.GroupNorm(4, 12), {"a": 4, "b": 5}),
        (nn.GroupNorm(12, 12), {"a": 12, "b": 5}),
        (nn.LayerNorm([8, 8]), {"a": 12, "b": 5}),
        (nn.Upsample(scale_factor=2), {"a": 12, "b": 5}),
        (lambda y: F.interpolate(y, size=y.shape[2:]), {"a": 12, "b": 5}),
        (lambda y: y.mean((2, 3), keepdim=True).expand_as(y) + y, {"a": 12, "b": 5}),
        (lambda y: y.amax((2, 3), keepdim=True).expand(-1, 12, 8, 8), {"a": 12, "b": 5}),
        (lambda y: torch.log_softmax(y, dim=1), {"b": 5}),
        (nn.GroupNorm(1, 12), {"b": 5}),
        (nn.LayerNorm([12, 8, 8]), {"b": 5}),
        (lambda y: y.cumsum(1), {"b": 5}),
        (lambda y: torch.einsum("nchw,nchw->nc", y, y), {}),
        (lambda y: torch.stack(y.chunk(2, 1)).sum(0), {"b": 5}),
        (lambda y: torch.cat(y.split([5, 7], 1)[::-1], 1), {"b": 5}),
        (lambda y: y.chunk(5, 1)[0], {"b": 5}),
        (lambda y: y.unbind(1)[3].unsqueeze(1), {"b": 5}),
    ],
)
def test_an_operation(operation: Callable[[Tensor], Tensor], groups: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Between(12, operation)
    analysis = analyse(model, torch.randn(IMAGE))
    found = {"a": 0, "b": 0}
    for group in analysis.groups:
        found[group.name.partition("#")[0]] += group.channels
    assert {name: channels for name, channels in found.items() if channels} == groups
    for place in range(3):
        prove_some(model, analysis, place)


def prove_some(model: nn.Module, analysis: Analysis, seed: int) -> None:
    """Remove random channels of a random subset of the groups."""
    chance = random.Random(seed)
    removed = {
        group.name: chance.sample(range(group.channels), chance.randrange(group.channels))
        for group in analysis.groups
        if chance.random() < 0.7
    }
    images = torch.randn(IMAGE)
    assert surgery.prove(model, analysis, images, removed) <= 1e-10
    compact = surgery.compact(model, analysis, removed)
    counts = {name: len(gone) for name, gone in removed.items()}
    assert analysis.predict_cost(counts) == cost.count(compact, images)


def test_pieces_of_unequal_size_are_frozen_with_the_reason() -> None:
    analysis = analyse(Between(12, lambda y: y.chunk(5, 1)[0]), torch.randn(IMAGE))
    reasons = {item.name: item.reason for item in analysis.frozen}
    assert reasons["a"] == "'chunk' cuts the channels at places that are not followed"
    ragged = analyse(Between(10, lambda y: y.split(4, 1)[0]), torch.randn(IMAGE))
    assert "pieces of unequal size" in {i.name: i.reason for i in ragged.frozen}["a"]


def test_a_shuffle_of_one_channel_a_group_is_frozen() -> None:
    analysis = analyse(Between(2, shuffle), torch.randn(IMAGE))
    reasons = {item.name: item.reason for item in analysis.frozen}
    assert reasons["a"] == "'view' splits the channels into parts of one channel"
    prove_some(Between(2, shuffle), analysis, 0)


def test_stochastic_depth_passes_channels_on() -> None:
    depth = pytest.importorskip("torchvision").ops.StochasticDepth(0.5, "row")
    model = Between(6, depth)
    analysis = analyse(model, torch.randn(IMAGE))
    assert {group.name for group in analysis.groups} == {"a", "b"}
    prove_some(model, analysis, 0)


def test_macs_of_attention() -> None:
    """Against a count by hand: four projections, scores and context."""

    class Attends(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(
                8, 2, kdim=6, vdim=4, batch_first=batch_first, add_zero_attn=True
            )
            self.first = batch_first

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x[..., :8], x[..., :5, :6], x[..., :5, :4]
            if not self.first:
                q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
            return self.attention(q, value=v, key=k)[0]

    queries, keys = 7, 5
    by_hand = queries * 8 * 8 + keys * 6 * 8 + keys * 4 * 8 + 2 * queries * (keys + 1) * 8
    by_hand += queries * 8 * 8
    for batch_first in (True, False):
        model, example = Attends(batch_first), torch.randn(3, queries, 9)
        assert cost.count(model, example).macs == by_hand
        assert analyse(model, example).predict_cost({}) == cost.count(model, example)


# ---- random small networks ----

OPERATIONS = (
    *("conv", "conv", "grouped", "depthwise", "transposed", "norm", "group_norm", "activation"),
    *("pool", "add", "add", "cat", "gate", "squeeze", "chunk", "split", "slice", "pad", "shuffle"),
    *("literal_shuffle", "pixel_shuffle", "tokens", "interpolate"),
)
Step = tuple[str, int, int]


class Assembled(nn.Module):
    """A network that a list of steps describes.

    Each step reads the newest map, or an older one, and adds a new one; a step that the shapes do
    not allow is left out. A step is an operation, which map it reads, and a free number.
    """

    def __init__(self, steps: list[Step], flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: list[tuple[str, int, int, str]] = []
        self.add_module("stem", nn.Conv2d(3, 8, 3, padding=1))
        with torch.no_grad():
            maps = [self.stem(torch.zeros(IMAGE))]
            for operation, place, number in steps:
                step = (operation, max(0, len(maps) - 1 - place), number, f"m{len(self.steps)}")
                if self.fits(step, maps):
                    self.prepare(step, maps)
                    maps.append(self.run_step(step, maps))
                    self.steps.append(step)
        last = maps[-1]
        self.out = nn.Linear(last[0].numel() if flat else last.shape[1], 3)
        self.side = nn.Conv2d(maps[-len(maps) // 2].shape[1], 2, 1)

    def fits(self, step: tuple[str, int, int, str], maps: list[Tensor]) -> bool:
        operation, place, _, _ = step
        x, newest = maps[place], maps[-1]
        c, size = x.shape[1], x.shape[2]
        if operation == "add":
            return x.shape[2:] == newest.shape[2:]
        return {
            "cat": x.shape[2:] == newest.shape[2:] and c + newest.shape[1] <= 40,
            "grouped": c % 2 == 0,
            "group_norm": c % 2 == 0 and c >= 4,
            "transposed": size <= 8,
            "interpolate": size <= 8,
            "pool": size >= 4,
            "chunk": c % 2 == 0,
            "split": c >= 6,
            "slice": c >= 4,
            "pad": c <= 24,
            "shuffle": c % 2 == 0,
            "literal_shuffle": c % 2 == 0,
            "pixel_shuffle": c % 4 == 0 and size <= 8,
        }.get(operation, True)

    def prepare(self, step: tuple[str, int, int, str], maps: list[Tensor]) -> None:
        """Make the layers of a step."""
        operation, place, number, name = step
        c, newest = maps[place].shape[1], maps[-1]
        self.shapes[name] = tuple(maps[place].shape[1:])
        width = (2, 4, 6, 8, 12)[number % 5]
        layer: nn.Module | None = {
            "conv": lambda: nn.Conv2d(c, width, 3, padding=1, bias=number % 2 == 0),
            "grouped": lambda: nn.Conv2d(c, width, 3, padding=1, groups=2),
            "depthwise": lambda: nn.Conv2d(c, c * (1 + number % 2), 3, padding=1, groups=c),
            "transposed": lambda: nn.ConvTranspose2d(
                c, width, 2, stride=2, groups=2 if number % 2 and c % 2 == 0 else 1
            ),
            "norm": lambda: (nn.BatchNorm2d, nn.InstanceNorm2d)[number % 2](c, affine=True),
            "group_norm": lambda: nn.GroupNorm(2, c),
            "activation": lambda: (nn.ReLU(), nn.Hardswish(), nn.PReLU(c), nn.Sigmoid())[
                number % 4
            ],
            "pool": lambda: (nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(4))[
                number % 3
            ],
            "squeeze": lambda: nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 3, 1), nn.ReLU(), nn.Conv2d(3, c, 1)
            ),
            "tokens": lambda: nn.Linear(c, width),
            "add": lambda: nn.Conv2d(c, newest.shape[1], 1) if c != newest.shape[1] else None,
        }.get(operation, lambda: None)()
        if layer is not None:
            self.add_module(name, layer)

    def run_step(self, step: tuple[str, int, int, str], maps: list[Tensor]) -> Tensor:
        operation, place, number, name = step
        x, newest, layer = maps[place], maps[-1], getattr(self, name, None)
        if operation == "squeeze":
            return x * torch.sigmoid(layer(x))
        if operation == "tokens":
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if operation == "literal_shuffle":
            c, h, w = self.shapes[name]
            return x.view(-1, 2, c // 2, h, w).transpose(2, 1).reshape(-1, c, h, w)
        if operation == "add":
            return newest + (layer(x) if layer is not None else x)
        if layer is not None:
            return layer(x)
        return COMPUTED[operation](x, newest, number)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.stem(x)]
        for step in self.steps:
            maps.append(self.run_step(step, maps))
        last = maps[-1].flatten(1) if self.flat else maps[-1].mean((2, 3))
        return self.out(last), self.side(maps[-len(maps) // 2])


def chunked(x: Tensor, newest: Tensor, number: int) -> Tensor:
    a, b = torch.chunk(x, 2, dim=1)
    if number % 4 == 0:
        return a * b
    if number % 4 == 1:
        return a
    return torch.cat((b, a) if number % 4 == 2 else (a, torch.relu(b)), 1)


def cut(x: Tensor, newest: Tensor, number: int) -> Tensor:
    if number % 2:
        a, b = x.split([2, x.size(1) - 2], 1)
        return torch.cat((a, b, a), 1)
    a, b = x[:, :3], x[:, 3:]
    return torch.cat((b, a, b), 1)


def two_groups(x: Tensor, newest: Tensor, number: int) -> Tensor:
    n, c, h, w = x.size()
    shape = (n, c // 2, 2, h, w) if number % 2 else (n, 2, c // 2, h, w)
    return x.view(shape).transpose(1, 2).reshape(n, c, h, w)


COMPUTED: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "cat": lambda x, newest, number: torch.cat([newest, x] if number % 2 else [x, newest], dim=1),
    "gate": lambda x, newest, number: x * x.mean((2, 3), keepdim=True) * 0.5,
    "chunk": chunked,
    "split": cut,
    "slice": lambda x, newest, number: x[:, number % 3 : 3 + number % 2],
    "pad": lambda x, newest, number: F.pad(x, (0, 0, 0, 0, number % 3, 1 + number % 2)),
    "shuffle": two_groups,
    "pixel_shuffle": lambda x, newest, number: F.pixel_shuffle(x, 2),
    "interpolate": lambda x, newest, number: F.interpolate(x, scale_factor=2.0),
}

STEPS = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 3), st.integers(0, 59)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, flat=st.booleans(), seed=st.integers(0, 999))
def test_random_networks_are_proved(steps: list[Step], flat: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Assembled(steps, flat).eval()
    analysis = analyse(model, torch.randn(IMAGE))
    prove_some(model, analysis, seed)
    written = {part.module for group in analysis.groups for part in group.producers}
    frozen = {item.name for item in analysis.frozen}
    called = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {name for name in called if name not in written} <= frozen
    for group in analysis.groups:
        assert all(len(np.unique(part.indices)) == part.indices.size for part in group.producers)
