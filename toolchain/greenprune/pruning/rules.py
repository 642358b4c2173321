"""The rules: how the atoms of an operation's output follow from those of its inputs.

One entry for each operation: the type of a leaf module, a function (by its full name where its
package is not imported here), or the name of a tensor method. A rule returns the output's
:class:`Channels` (or None where it has none that are known) and tells the ledger about parameters,
numbers and ties. A rule that cannot follow raises FreezeError, and an operation without a rule
freezes all atoms that it touches: at worst less is pruned, never wrongly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from greenprune.pruning.atoms import Call, FreezeError, Mark
from greenprune.pruning.cost import CONVOLUTIONS, RECURRENT, TRANSPOSED
from greenprune.pruning.layer_rules import (
    attention,
    convolution,
    elementwise,
    group_norm,
    layer_norm,
    linear,
    per_channel,
    reduction,
    softmax,
    spatial,
)
from greenprune.pruning.recurrent import recurrent
from greenprune.pruning.shape_rules import (
    channel_shuffle,
    chunks,
    concatenation,
    expansion,
    indexing,
    padding,
    permutation,
    pixel_shuffle,
    pixel_unshuffle,
    reshape,
    split,
    transposition,
    unbinding,
    view,
)

Rule = Callable[[Call], Mark]


def _entries(rule: Rule, operations: Iterable[Any]) -> dict[Any, Rule]:
    return dict.fromkeys(operations, rule)


RULES: dict[Any, Rule] = {
    **_entries(convolution, (*CONVOLUTIONS, *TRANSPOSED)),
    **_entries(linear, (nn.Linear,)),
    **_entries(recurrent, RECURRENT),
    **_entries(
        per_channel,
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.PReLU),
        ),
    ),
    **_entries(group_norm, (nn.GroupNorm,)),
    **_entries(layer_norm, (nn.LayerNorm, nn.RMSNorm, F.layer_norm, F.rms_norm)),
    **_entries(softmax, (nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax)),
    **_entries(softmax, (torch.softmax, torch.log_softmax, "softmax", "log_softmax")),
    **_entries(attention, (nn.MultiheadAttention, F.scaled_dot_product_attention)),
    **_entries(
        elementwise,
        (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
            *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus),
            *(nn.Softsign, nn.LogSigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
            *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
            *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish),
            *(F.hardsigmoid, F.hardtanh, F.softplus, F.sigmoid, F.tanh),
            *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
            *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp),
            *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_"),
            *("torchvision.ops.stochastic_depth.stochastic_depth", torch.abs, "abs", torch.square),
            *("contiguous", "clone", "detach", "float", "double", "square", "expand_as"),
            *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
            *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
            *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum),
            *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"),
        ),
    ),
    **_entries(
        spatial,
        (
            *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
            *(nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
            *(nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
            *(nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
            *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
            *(F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.interpolate),
        ),
    ),
    **_entries(reduction, (torch.mean, torch.sum, torch.amax, "mean", "sum", "amax")),
    **_entries(concatenation, (torch.cat, torch.concat)),
    **_entries(padding, (F.pad,)),
    **_entries(indexing, (operator.getitem,)),
    **_entries(chunks, (torch.chunk, torch.tensor_split, "chunk", "tensor_split")),
    **_entries(split, (torch.split, "split")),
    **_entries(unbinding, (torch.unbind, "unbind")),
    **_entries(permutation, (torch.permute, "permute")),
    **_entries(transposition, (torch.transpose, torch.swapaxes, "transpose", "swapaxes")),
    **_entries(reshape, (nn.Flatten, torch.flatten, "flatten", torch.squeeze, "squeeze")),
    **_entries(reshape, (torch.unsqueeze, "unsqueeze")),
    **_entries(view, ("view", "reshape", torch.reshape)),
    **_entries(expansion, ("expand",)),
    **_entries(pixel_shuffle, (nn.PixelShuffle, F.pixel_shuffle)),
    **_entries(pixel_unshuffle, (nn.PixelUnshuffle, F.pixel_unshuffle)),
    **_entries(channel_shuffle, (nn.ChannelShuffle, F.channel_shuffle, torch.channel_shuffle)),
}


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule for a graph's node, which calls ``module`` if it calls any."""
    target = node.target if module is None else type(module)
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    return RULES.get(target, RULES.get(name))


def apply(call: Call) -> Mark:
    """The mark of a call's result, by the operation's rule.

    Raises:
        FreezeError: there is no rule, or it cannot follow this call.
    """
    rule = rule_of(call.node, call.module)
    if rule is None:
        raise FreezeError(f"read by '{call.name}' ({call.operation}), for which there is no rule")
    marks = [call.mark(source) for source in call.node.all_input_nodes]
    if rule is not indexing and any(mark is not None and mark.parts for mark in marks):
        raise FreezeError(f"'{call.name}' reads a list of tensors as a whole")
    mark = rule(call)
    if not _fits(mark, call.result):
        raise FreezeError(f"the result of '{call.name}' is not what its rule expects")
    return mark


def _fits(mark: Mark, result: Any) -> bool:
    if mark is None:
        return True
    if isinstance(result, Tensor):
        return not mark.parts and result.shape[mark.dim] == len(mark.atoms)
    if not isinstance(result, list | tuple) or len(result) != len(mark.parts):
        return False
    return all(_fits(part, item) for part, item in zip(mark.parts, result, strict=True))
