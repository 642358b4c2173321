"""Surgery by channel atoms: what is tied together, what is frozen, and the proof."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from greenprune.errors import ProofError, PruningError
from greenprune.models import lenet5, resnet20
from greenprune.pruning import cost, surgery
from greenprune.pruning.graph import Analysis, Group, Slice, analyse
from greenprune.pruning.scores import measure

IMAGE = (1, 3, 8, 8)


class Net(nn.Module):
    """A network written as a function of its parts, so that each test shows its whole forward."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def head(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3))


def depthwise() -> nn.Module:
    layers = (conv(3, 8), nn.BatchNorm2d(8), nn.Hardswish(), conv(8, 16, groups=8), nn.PReLU(16))
    return nn.Sequential(*layers, conv(16, 6, bias=False), head(6))


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), conv(12, 5), head(5))


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(6, 4, 2, stride=2)
    split = nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2)
    return nn.Sequential(conv(3, 6), up, nn.InstanceNorm2d(4, affine=True), split, head(8))


def joined() -> nn.Module:
    """cat, slices, add and a literal pad in one."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        a, b = net.a(x), torch.sigmoid(net.b(x))
        both = torch.cat([a, x, b], dim=1)  # 6 + 3 + 4
        low, high = both[:, :6], both[:, 9:]
        return net.head(F.pad(high, (0, 0, 0, 0, 2, 0)) * 0.5 + low + net.c(both))

    return Net(forward, a=conv(3, 6), b=conv(3, 4), c=conv(13, 6), head=head(6))


def squeeze_excite() -> nn.Module:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        gate = net.up(F.silu(net.down(y.mean((2, 3)))))
        return net.head(y * torch.sigmoid(gate).unsqueeze(2).unsqueeze(3))

    parts = {"a": conv(3, 8), "down": nn.Linear(8, 4), "up": nn.Linear(4, 8), "head": head(8)}
    return Net(forward, **parts)


def literal_view() -> nn.Module:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.max_pool2d(net.b(F.relu(net.a(x))), 4)
        return net.out(y.view(-1, 6 * 2 * 2))

    return Net(forward, a=conv(3, 5), b=conv(5, 6), out=nn.Linear(24, 3))


def computed_view() -> nn.Module:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.avg_pool2d(net.a(x), 4)
        return net.out(torch.relu(net.hidden(y.reshape(y.shape[0], y.size(1) * 4))))

    return Net(forward, a=conv(3, 5), hidden=nn.Linear(20, 7), out=nn.Linear(7, 3))


def one_dimensional() -> nn.Module:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(net.norm(net.a(x.flatten(2))))

    tail = nn.Sequential(nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(12, 3))
    return Net(forward, a=nn.Conv1d(3, 6, 5), norm=nn.BatchNorm1d(6), head=tail)


def mlp_in_attention() -> nn.Module:
    """Attention and LayerNorm freeze what they read; the MLP between stays prunable."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        tokens = net.embed(x).flatten(2).permute(0, 2, 1)
        tokens = tokens + net.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + net.second(F.gelu(net.first(net.norm(tokens))))
        return net.out(tokens.mean(dim=1))

    return Net(
        forward,
        embed=nn.Conv2d(3, 8, 4, stride=4),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        norm=nn.LayerNorm(8),
        first=nn.Linear(8, 16),
        second=nn.Linear(16, 8),
        out=nn.Linear(8, 3),
    )


NETWORKS = {
    function.__name__: function
    for function in (
        *(depthwise, grouped, transposed, joined, squeeze_excite),
        *(literal_view, computed_view, one_dimensional, mlp_in_attention),
    )
}
ANALYSED: dict[str, tuple[nn.Module, Analysis]] = {}


def analysed(name: str) -> tuple[nn.Module, Analysis]:
    if name not in ANALYSED:
        torch.manual_seed(0)
        model = resnet20() if name == "resnet20" else NETWORKS[name]()
        ANALYSED[name] = (model, analyse(model, torch.randn(IMAGE)))
    return ANALYSED[name]


def any_removal(analysis: Analysis) -> st.SearchStrategy[dict[str, list[int]]]:
    """Channels to remove, those of a group written as the bits of a number."""

    def some(group: Group) -> st.SearchStrategy[list[int]]:
        bits = st.integers(0, 2**group.channels - 2)
        return bits.map(lambda mask: [i for i in range(group.channels) if mask >> i & 1])

    return st.fixed_dictionaries({group.name: some(group) for group in analysis.groups})


def group_of(analysis: Analysis, name: str) -> Group:
    return next(group for group in analysis.groups if group.name == name)


def frozen(model: nn.Module, image: tuple[int, ...] = IMAGE) -> dict[str, str]:
    return {item.name: item.reason for item in analyse(model, torch.randn(image)).frozen}


@pytest.mark.parametrize("name", [*NETWORKS, "resnet20"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_compact_equals_masked_and_costs_what_was_predicted(name: str, data: st.DataObject) -> None:
    model, analysis = analysed(name)
    removed = data.draw(any_removal(analysis))
    example = torch.randn(IMAGE)
    assert surgery.prove(model, analysis, example, removed) <= 1e-10
    counts = {group: len(channels) for group, channels in removed.items()}
    compact = surgery.compact(model, analysis, removed)
    assert analysis.predict_cost(counts) == cost.count(compact, example)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("depthwise", {"0": 8, "5": 6}),
        ("grouped", {"0": 4, "3": 5}),
        ("transposed", {"0": 6, "1": 2}),
        ("joined", {"a": 2, "a#2": 4}),
        ("squeeze_excite", {"a": 8, "down": 4}),
        ("literal_view", {"a": 5, "b": 6}),
        ("computed_view", {"a": 5, "hidden": 7}),
        ("one_dimensional", {"a": 6}),
        ("mlp_in_attention", {"first": 16}),
    ],
)
def test_groups(name: str, groups: dict[str, int]) -> None:
    _, analysis = analysed(name)
    assert {group.name: group.channels for group in analysis.groups} == groups


def test_option_a_shortcuts_couple_stages_with_their_offset() -> None:
    _, analysis = analysed("resnet20")
    stream, outer2, outer3 = (
        group_of(analysis, name) for name in ("conv1", "layer2.0.conv2", "layer3.0.conv2")
    )
    assert (stream.channels, outer2.channels, outer3.channels) == (16, 16, 32)
    reads = {part.module: part.indices[:, 0] for part in stream.consumers}
    np.testing.assert_array_equal(reads["layer1.1.conv1"], np.arange(16))
    np.testing.assert_array_equal(reads["layer2.1.conv1"], np.arange(16) + 8)
    np.testing.assert_array_equal(reads["layer3.1.conv1"], np.arange(16) + 24)
    np.testing.assert_array_equal(reads["linear"], np.arange(16) + 24)
    writes = {part.module: part.indices[:, 0] for part in outer2.producers}
    np.testing.assert_array_equal(writes["layer2.0.conv2"], [*range(8), *range(24, 32)])
    np.testing.assert_array_equal(writes["layer3.0.conv2"], [*range(16, 24), *range(40, 48)])
    assert all(part.indices.dtype == np.int64 for part in stream.consumers)


def test_a_flatten_spreads_a_channel_over_its_pixels() -> None:
    analysis = analyse(lenet5(), torch.randn(1, 1, 32, 32))
    (reader,) = group_of(analysis, "conv2").consumers
    assert reader.module == "fc1"
    np.testing.assert_array_equal(reader.indices, np.arange(32 * 25).reshape(32, 25))


def test_resnet18_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    model, example = torchvision.models.resnet18(), torch.randn(1, 3, 64, 64)
    analysis = analyse(model, example)
    removed = {g.name: range(0, g.channels, 3) for g in analysis.groups}
    compact = surgery.prune_channels(model, example, removed)
    assert type(compact) is type(model)
    assert compact.conv1.weight.shape == (42, 3, 7, 7)
    assert compact.conv1.out_channels == compact.bn1.num_features == 42


def test_own_forward_stays_unless_a_number_in_it_changes() -> None:
    model, example = resnet20(), torch.randn(2, 3, 32, 32)
    inner = surgery.prune_channels(model, example, {"conv1": [3], "layer1.0.conv1": [0, 5]})
    assert type(inner) is type(model)
    padded = surgery.prune_channels(model, example, {"layer2.0.conv2": [0, 1, 15]})
    assert isinstance(padded, fx.GraphModule)
    assert "(0, 0, 0, 0, 6, 7)" in padded.code
    again = surgery.prune_channels(padded, example, {"layer2.0.conv2": [0], "conv1": [2]})
    assert "(0, 0, 0, 0, 5, 7)" in again.code
    assert again(example).shape == (2, 10)


def test_the_network_that_is_pruned_stays_as_it_was() -> None:
    model, example = resnet20(), torch.randn(2, 3, 32, 32)
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compact = surgery.prune_channels(model, example, {"conv1": [0], "layer2.0.conv2": [1]})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for network in (model, compact):
        assert network.training
        assert not network.get_submodule("layer1.0.bn1").training
        assert network.get_submodule("layer2.0.bn1").training
        assert not network.get_parameter("conv1.weight").requires_grad
        assert network.get_parameter("linear.weight").requires_grad


def test_masked_keeps_its_size_and_equals_compact_on_the_real_weights() -> None:
    model, analysis = analysed("resnet20")
    model = model.eval()
    removed = {"conv1": [1, 2], "layer3.1.conv1": [*range(40)]}
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        masked = surgery.masked(model, analysis, removed)
        found = surgery.compact(model, analysis, removed)(images)
        torch.testing.assert_close(found, masked(images), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, model(images), rtol=1e-2, atol=1e-2)
    assert cost.count(masked, images) == cost.count(model, images)


def tampered(analysis: Analysis, change: Callable[[Group], Group]) -> Analysis:
    groups = tuple(change(group) for group in analysis.groups)
    return dataclasses.replace(analysis, groups=groups)


def test_the_proof_finds_a_wrong_index() -> None:
    """Stage 2 without the offset of option A: the mistake that tracers make."""
    model, analysis = analysed("resnet20")

    def without_offset(group: Group) -> Group:
        parts = tuple(
            dataclasses.replace(part, indices=part.indices % 16) if part.reads else part
            for part in group.parameters
        )
        return dataclasses.replace(group, parameters=parts)

    wrong = tampered(analysis, without_offset)
    with pytest.raises(ProofError, match="relative difference"):
        surgery.prove(model, wrong, torch.randn(IMAGE), {"conv1": [3]})


def test_the_proof_finds_a_layer_that_was_forgotten() -> None:
    model, analysis = analysed("resnet20")

    def without_norm(group: Group) -> Group:
        parts = tuple(part for part in group.parameters if "bn" not in part.parameter)
        return dataclasses.replace(group, parameters=parts)

    wrong = tampered(analysis, without_norm)
    with pytest.raises(ProofError, match="does not run"):
        surgery.prove(model, wrong, torch.randn(IMAGE), {"layer1.0.conv1": [3]})


def test_the_proof_does_not_rest_on_zeros() -> None:
    """A network of zeros computes the same whatever is cut; the proof must not be fooled."""
    model, analysis = resnet20(), analysed("resnet20")[1]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()

    def shifted(group: Group) -> Group:
        parts = tuple(
            dataclasses.replace(part, indices=np.roll(part.indices, 1, axis=0))
            if part.parameter.endswith("bn1.bias")
            else part
            for part in group.parameters
        )
        return dataclasses.replace(group, parameters=parts)

    wrong = tampered(analysis, shifted)
    with pytest.raises(ProofError):
        surgery.prove(model, wrong, torch.randn(IMAGE), {"layer1.0.conv1": [3]})


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"conv9": [0]}, "group 'conv9' is unknown; the groups of this network are: conv1"),
        ({"conv1": [16]}, r"expected channels from 0 to 15, got \[16\]"),
        ({"conv1": [-1]}, r"expected channels from 0 to 15, got \[-1\]"),
        ({"conv1": [2, 2]}, "a channel is given twice"),
        ({"conv1": [*range(16)]}, "all 16 channels would go"),
    ],
)
def test_impossible_removals(removed: dict[str, list[int]], message: str) -> None:
    model, analysis = analysed("resnet20")
    for function in (surgery.compact, surgery.masked):
        with pytest.raises(PruningError, match=message):
            function(model, analysis, removed)


def test_an_analysis_of_another_network_is_refused() -> None:
    with pytest.raises(PruningError, match="another network"):
        surgery.compact(lenet5(), analysed("resnet20")[1], {})


def test_what_cannot_be_followed_is_frozen_with_its_reason() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        a = torch.softmax(net.a(x), dim=1)
        b = net.b(a) * net.scale
        c = net.norm(net.c(b))
        d = torch.cumsum(net.d(c), 2)
        return net.head(net.e(d).amax(dim=1, keepdim=True))

    parts = {name: conv(4, 4) for name in "bcde"}
    net = Net(forward, norm=nn.GroupNorm(1, 4), a=conv(3, 4), head=head(1), **parts)
    net.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
    found = frozen(net)
    assert found["a"] == "'softmax' is a softmax over the channels"
    assert found["b"].endswith("not followed: 'scale' is a parameter by itself")
    assert found["c"] == "'norm' normalises over all channels"
    assert found["norm"] == "it normalises over all channels"
    assert found["d"] == "read by 'cumsum' (cumsum), for which there is no rule"
    assert found["e"] == "'amax' reduces over the channels"
    assert found["head.2"] == "an output of the network"
    assert not analyse(net, torch.randn(IMAGE)).groups


def test_a_convolution_called_twice_is_frozen_and_a_relu_is_not() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.relu(net.a(x))
        y = net.relu(net.twice(net.relu(net.twice(y))))
        return net.head(net.relu(net.b(y)))

    net = Net(forward, relu=nn.ReLU(), a=conv(3, 6), twice=conv(6, 6), b=conv(6, 5), head=head(5))
    analysis = analyse(net, torch.randn(IMAGE))
    assert [group.name for group in analysis.groups] == ["b"]
    reasons = {item.name: item.reason for item in analysis.frozen}
    assert "called more than once" in reasons["a"]
    assert "called more than once" in reasons["twice"]


def test_layers_that_share_a_parameter_are_frozen() -> None:
    first, second = conv(6, 6), conv(6, 6)
    second.weight = first.weight
    found = frozen(nn.Sequential(conv(3, 6), first, nn.ReLU(), second, head(6)))
    assert "shares a parameter" in found["1"]
    assert "shares a parameter" in found["0"]


def test_a_module_under_two_names_is_one_layer() -> None:
    first = conv(3, 6)
    net = Net(lambda net, x: net.tail(net.a(x)), a=first, same=first, tail=head(6))
    compact = surgery.prune_channels(net, torch.randn(IMAGE), {"a": [1]})
    assert compact.same is compact.a
    assert compact.a.out_channels == 5


def test_weight_norm_is_not_cut() -> None:
    normed = nn.utils.parametrizations.weight_norm(conv(3, 6))
    net = nn.Sequential(normed, conv(6, 5), nn.utils.parametrizations.weight_norm(conv(5, 5)))
    analysis = analyse(nn.Sequential(net, conv(5, 4), head(4)), torch.randn(IMAGE))
    assert [group.name for group in analysis.groups] == ["1"]


def test_a_head_for_training_alone_is_cut_too() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.head(net.b(y)) + net.extra(y) if net.training else net.head(net.b(y))

    net = Net(forward, a=conv(3, 6), b=conv(6, 5), head=head(5), extra=head(6))
    compact = surgery.prune_channels(net, torch.randn(IMAGE), {"a": [0, 4], "b": [1]})
    assert compact.train()(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    assert compact.extra[2].in_features == 4


def test_code_that_branches_on_training_is_never_replaced() -> None:
    """A traced graph would be stuck in one mode, so what needs one is frozen."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.dropout(net.b(torch.relu(net.a(x))), 0.5, net.training)
        return net.out(y.view(-1, 4 * 64))

    net = Net(forward, a=conv(3, 6), b=conv(6, 4), out=nn.Linear(256, 3))
    assert "the number 256 in 'view' would have to change" in frozen(net)["b"]
    assert [group.name for group in analyse(net, torch.randn(IMAGE)).groups] == ["a"]


@pytest.mark.parametrize("bounds", [slice(0, -2), slice(0, 6, 2)])
def test_slices_that_are_not_followed_freeze(bounds: slice) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(net.a(x)[:, bounds].mean(1, keepdim=True))

    assert "slices" in (reason := frozen(Net(forward, a=conv(3, 6), head=head(1)))["a"]) or (
        "picks" in reason
    )


def test_a_slice_at_a_computed_place_freezes() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.head(y[:, : y.size(1) // 2])

    assert "computed" in frozen(Net(forward, a=conv(3, 6), head=head(3)))["a"]


def test_computing_with_the_number_of_channels_freezes_them() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.head(net.b(y) / y.shape[1] ** 0.5)

    found = frozen(Net(forward, a=conv(3, 6), b=conv(6, 4), head=head(4)))
    assert "computes with the tensor's size" in found["a"]
    assert "b" not in found


def test_networks_that_cannot_be_traced_or_run() -> None:
    def branches(net: nn.Module, x: Tensor) -> Tensor:
        return net.a(x) if x.sum() > 0 else net.a(-x)

    with pytest.raises(PruningError, match="Net cannot be traced"):
        analyse(Net(branches, a=conv(3, 6)), torch.randn(IMAGE))
    with pytest.raises(PruningError, match=r"fails on an input of shape \[2, 1, 8, 8\]"):
        analyse(resnet20(), torch.randn(1, 1, 8, 8))


def test_explanation_names_groups_readers_and_reasons() -> None:
    told = surgery.explain(analysed("literal_view")[0], torch.randn(IMAGE))
    text = str(told)
    assert "  b: 6 channels, read by out\n" in text
    assert "out: an output of the network" in text
    content = json.loads(json.dumps(told.to_dict()))
    assert [group["name"] for group in content["groups"]] == ["a", "b"]
    assert content["frozen"] == [{"name": "out", "reason": "an output of the network"}]


def test_a_group_that_a_trial_cut_disproves_is_frozen_and_the_others_are_not() -> None:
    """The rules take 6 * h * w, with sizes read from the input, for a size that follows."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(net.b(F.relu(net.a(x))))
        return net.out(torch.relu(net.hidden(y.reshape(-1, 6 * y.size(2) * y.size(3)))))

    parts = {"a": conv(3, 5), "b": conv(5, 6), "hidden": nn.Linear(6 * 64, 8)}
    model = Net(forward, **parts, out=nn.Linear(8, 3)).eval()
    assert [group.name for group in analyse(model, torch.randn(IMAGE)).groups] == [
        *("a", "b", "hidden")
    ]

    told = surgery.explain(model, torch.randn(IMAGE))

    assert [group.name for group in told.analysis.groups] == ["a", "hidden"]
    assert "b: a trial cut is refused by the proof: the compact network does not run" in str(told)
    widths = {layer.module: layer.out_groups for layer in told.analysis.layers}
    assert widths["a"]
    assert not widths["b"]
    everything = {group.name: [0] for group in told.analysis.groups}
    surgery.prune_channels(model, torch.randn(IMAGE), everything)


def test_code_of_training_alone_has_to_run_as_well() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        if net.training:
            return net.head(y) + net.aside(y.reshape(-1, 5 * y.size(2) * y.size(3)))
        return net.head(y)

    model = Net(forward, a=conv(3, 5), head=head(5), aside=nn.Linear(320, 3)).eval()

    with pytest.raises(ProofError, match="does not run in training mode"):
        surgery.prune_channels(model, torch.randn(IMAGE), {"a": [1]})
    assert surgery.explain(model, torch.randn(IMAGE)).analysis.groups == ()


def test_an_answer_of_zeros_proves_nothing() -> None:
    model = nn.Sequential(conv(3, 5), conv(5, 3), nn.Threshold(1e9, 0.0)).eval()
    with pytest.raises(PruningError, match="nothing but zeros"):
        surgery.prune_channels(model, torch.randn(IMAGE), {"0": [1]})


def test_names_that_count_up_are_told_as_one() -> None:
    names = ["a", *(f"b1.{n}.c2" for n in range(3)), "b1.4.c2", "b2.4.c2", "b3.5.c2", "d9", "d10"]
    assert surgery.brief(names) == "a, b1.[0-2].c2, b[1-2].4.c2, b3.5.c2, d[9-10]"
    assert surgery.brief([]) == ""


def test_a_single_channel_is_frozen() -> None:
    found = frozen(nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 4), head(4)))
    assert found["0"] == "its channels could only go all at once"


def test_unused_channels_can_go() -> None:
    """Channels that a slice leaves behind are read by nothing."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(net.a(x)[:, :4])

    net = Net(forward, a=conv(3, 6), head=head(4))
    analysis = analyse(net, torch.randn(IMAGE))
    unread = group_of(analysis, "a#2")
    assert unread.consumers == ()
    assert isinstance(group_of(analysis, "a").consumers[0], Slice)
    compact = surgery.prune_channels(net, torch.randn(IMAGE), {"a#2": [0], "a": [2]})
    assert compact(torch.randn(1, 3, 8, 8)).shape == (1, 3)


def test_add_bias() -> None:
    model, images = resnet20().eval(), torch.randn(2, 3, 16, 16)
    before = model(images)
    surgery.add_bias(model, "layer1.0.conv2")
    torch.testing.assert_close(model(images), before)
    assert model.layer1[0].conv2.bias.shape == (16,)
    for name in ("layer1.0.conv2", "layer1.0.bn1", "nowhere"):
        with pytest.raises(PruningError, match="without bias"):
            surgery.add_bias(model, name)


class Attributes(nn.Module):
    """Its code reads numbers from modules' attributes, and it has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Linear(6 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu() * self.scale
        x = self.second(x.view(-1, self.second.in_channels, 6, 6)).relu()
        return self.out(x.view(-1, self.out.in_features))  # type: ignore[no-any-return]


def test_numbers_that_the_code_reads_from_attributes_shrink_once() -> None:
    network, images = Attributes().eval(), torch.randn(2, 3, 6, 6)

    compact = surgery.prune_channels(network, images, {"first": [0, 5], "second": [1]})

    assert compact(images).shape == (2, 5)
    analysis = analyse(network, images)
    assert cost.count(compact, images) == analysis.predict_cost({"first": 2, "second": 1})
    assert "unused" in compact.state_dict()
    assert "scale" in compact.state_dict()


class Auxiliary(nn.Module):
    """A second head that is there in training alone, as GoogLeNet's are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 5)
        self.aside = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        y = self.out(self.second(x).relu().mean((2, 3)))
        return (y, self.aside(x.mean((2, 3)))) if self.training else y


@pytest.mark.parametrize("method", ["drp", "drp_rank", "taylor", "hrank", "magnitude"])
def test_a_head_of_training_alone_is_cut_along_and_not_scored(method: str) -> None:
    network, images = Auxiliary().eval(), torch.randn(4, 3, 6, 6)
    analysis = analyse(network, images)

    found = measure(network, analysis, images, method=method, targets=torch.arange(4)).scores

    compact = surgery.prune_channels(network, images, {"first": [int(found["first"].argmin())]})
    assert compact.train()(images)[1].shape == (4, 5)


class Tied(nn.Module):
    """Decodes by its encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.encoder = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().mean((2, 3))
        return F.linear(self.encoder(x).relu(), self.encoder.weight.t())


def test_a_weight_that_is_read_by_itself_as_well_keeps_its_layer_whole() -> None:
    analysis = analyse(Tied().eval(), torch.randn(2, 3, 6, 6))

    assert analysis.groups == ()
    reasons = {item.name: item.reason for item in analysis.frozen}
    assert reasons["first"] == "'encoder.weight' is read by itself as well"


class Casting(nn.Module):
    """Names a type in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).relu().float()).mean((2, 3))  # type: ignore[no-any-return]


def test_a_network_that_cannot_run_in_float64_says_so() -> None:
    with pytest.raises(PruningError, match="does not run in float64, in which surgery is proved"):
        surgery.prune_channels(Casting().eval(), torch.randn(2, 3, 6, 6), {"first": [0]})


def test_keywords_that_a_rule_does_not_know_keep_channels_with_the_reason() -> None:
    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.out = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.swapaxes(self.first(x), axis0=1, axis1=3)
            return self.out(x).mean((1, 2))  # type: ignore[no-any-return]

    analysis = analyse(Swapping().eval(), torch.randn(2, 3, 6, 6))

    assert analysis.groups == ()
    assert any("called in a way that is not followed" in item.reason for item in analysis.frozen)
