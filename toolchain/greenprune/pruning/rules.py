"""The rules: how the atoms of an operation's output follow from those of its inputs.

One entry for each operation: the type of a leaf module, a function, or the name of a tensor
method. A rule returns the output's :class:`Channels` (or None where it has none that are known)
and tells the ledger about parameters, numbers and ties. A rule that cannot follow raises
FreezeError, and an operation without a rule freezes all atoms that it touches: at worst less is
pruned, never wrongly.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune.pruning.atoms import Atoms, Call, Channels, FreezeError, Mark
from greenprune.pruning.cost import CONVOLUTIONS, TRANSPOSED

Rule = Callable[[Call], Mark]


def convolution(call: Call) -> Mark:
    """New atoms; with groups, a group's inputs and outputs are one (depthwise passes on)."""
    layer = cast("nn.Conv2d", call.module)
    found = call.channels_at(1)
    inputs = found.atoms if found else call.ledger.unknown(layer.in_channels)
    read_dim, write_dim = (0, 1) if isinstance(layer, TRANSPOSED) else (1, 0)
    if layer.groups == 1:
        outputs = call.ledger.new(layer.out_channels)
        call.parameter("weight", read_dim, inputs, reads=True)
        call.parameter("weight", write_dim, outputs)
    else:
        by_group = inputs.reshape(layer.groups, -1)
        call.ledger.unite(by_group[:, :1], by_group)
        outputs = np.repeat(by_group[:, 0], layer.out_channels // layer.groups)
        call.parameter("weight", 0, outputs if write_dim == 0 else inputs, reads=True)
        call.attribute("groups", by_group[:, 0])
    call.reads(inputs, "in_channels")
    call.parameter("bias", 0, outputs)
    call.writes(outputs, "out_channels")
    return Channels(dim=1, atoms=outputs)


def linear(call: Call) -> Mark:
    """New atoms in the last dimension."""
    layer = cast("nn.Linear", call.module)
    found = call.channels_at(-1)
    inputs = found.atoms if found else call.ledger.unknown(layer.in_features)
    outputs = call.ledger.new(layer.out_features)
    call.parameter("weight", 1, inputs, reads=True)
    call.reads(inputs, "in_features")
    call.parameter("weight", 0, outputs)
    call.parameter("bias", 0, outputs)
    call.writes(outputs, "out_features")
    return Channels(dim=call.result.dim() - 1, atoms=outputs)


def per_channel(call: Call) -> Mark:
    """BatchNorm, InstanceNorm, PReLU: parameters of each channel by itself."""
    channels = call.channels_at(1)
    module = cast("nn.Module", call.module)
    attribute = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    size = getattr(module, attribute)
    if isinstance(module, nn.PReLU) and size == 1:
        return channels
    atoms = channels.atoms if channels else call.ledger.unknown(size)
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.parameter(name, 0, atoms)
    call.attribute(attribute, atoms)
    return channels


def elementwise(call: Call) -> Mark:
    """Activations, dropout, add, mul and their kin: tensors are united atom by atom."""
    size = call.result.shape
    tensors = dict(call.tensors())
    for source in call.node.all_input_nodes:
        number = call.mark(source)
        if source not in tensors and number is not None:
            call.ledger.freeze(number.atoms, f"'{call.name}' computes with the tensor's size")
    marked: list[Channels] = []
    for node, value in tensors.items():
        channels = call.mark(node)
        if channels is None:
            continue
        dim = channels.dim + len(size) - value.dim()
        if len(channels.atoms) == size[dim]:
            marked.append(Channels(dim=dim, atoms=channels.atoms))
        else:
            call.ledger.freeze(channels.atoms, f"spread over all channels by '{call.name}'")
    if not marked:
        return None
    first = marked[0]
    if any(other.dim != first.dim for other in marked):
        raise FreezeError(f"'{call.name}' pairs channels with another dimension")
    for node, value in tensors.items():
        dim = first.dim + value.dim() - len(size)
        if call.mark(node) is None and dim >= 0 and value.shape[dim] > 1:
            raise FreezeError(f"combined by '{call.name}' with values that are not followed")
    for other in marked[1:]:
        call.ledger.unite(first.atoms, other.atoms)
    return first


def spatial(call: Call) -> Mark:
    """Pooling and resizing: each channel's map by itself."""
    channels = call.channels_at(1)
    dims = re.search(r"(\d)d$", call.operation)
    if channels is not None and dims and next(call.tensors())[1].dim() != 2 + int(dims[1]):
        raise FreezeError(f"'{call.name}' mixes the channels")
    return channels


def reduction(call: Call) -> Mark:
    """Mean and sum over dimensions other than the channels'."""
    channels = call.channels
    if channels is None:
        return None
    rank = next(call.tensors())[1].dim()
    dims = call.argument(1, "dim")
    if dims is None or not isinstance(dims, int | list | tuple):
        raise FreezeError(f"'{call.name}' reduces over the channels")
    gone = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    if channels.dim in gone:
        raise FreezeError(f"'{call.name}' reduces over the channels")
    kept_dims = call.result.dim() == rank
    shift = 0 if kept_dims else sum(dim < channels.dim for dim in gone)
    return Channels(dim=channels.dim - shift, atoms=channels.atoms)


def concatenation(call: Call) -> Mark:
    """Along the channels atoms follow one another; along another dimension they are united."""
    nodes, values = call.written(*call.path(0, "tensors")), call.argument(0, "tensors")
    if not isinstance(nodes, list | tuple):
        raise FreezeError(f"the inputs of '{call.name}' are not followed")
    marks = [call.mark(node) for node in nodes]
    known = [mark for mark in marks if mark is not None]
    if not known:
        return None
    dim = known[0].dim
    if any(mark.dim != dim for mark in known):
        raise FreezeError(f"'{call.name}' joins channels with another dimension")
    parts = [
        mark.atoms if mark else call.ledger.unknown(value.shape[dim])
        for mark, value in zip(marks, values, strict=True)
    ]
    along = call.kwargs.get("axis", call.argument(1, "dim", 0))
    if along % values[0].dim() == dim:
        return Channels(dim=dim, atoms=np.concatenate(parts))
    for part in parts[1:]:
        call.ledger.unite(parts[0], part)
    return Channels(dim=dim, atoms=parts[0])


def padding(call: Call) -> Mark:
    """Padded channels are new atoms: constants, which go with what they are added to."""
    channels = call.channels
    if channels is None:
        return None
    amounts = call.argument(1, "pad")
    first = 2 * (next(call.tensors())[1].dim() - 1 - channels.dim)
    before, after = amounts[first : first + 2] if first < len(amounts) else (0, 0)
    if before == after == 0:
        return channels
    path = call.path(1, "pad")
    written = call.written(*path)
    if not isinstance(written, list | tuple) or call.argument(2, "mode", "constant") != "constant":
        raise FreezeError(f"'{call.name}' pads the channels in a way that is not followed")
    parts = []
    for place, amount in ((first, before), (first + 1, after)):
        if not isinstance(written[place], int) or amount < 0:
            raise FreezeError(f"'{call.name}' pads the channels by a computed or negative number")
        parts.append(call.ledger.new(amount))
        call.constant((*path, place), parts[-1])
    return Channels(dim=channels.dim, atoms=np.concatenate([parts[0], channels.atoms, parts[1]]))


def indexing(call: Call) -> Mark:
    """``x[...]`` with slices: a slice of the channels is a sublist of their atoms."""
    channels = call.mark(call.node.args[0])
    if channels is None:
        return None
    dim = read = 0
    for place, item in _index_items(call):
        if read == channels.dim and item is not None:
            return Channels(dim=dim, atoms=_slice_channels(call, channels.atoms, place, item))
        read += item is not None
        dim += not isinstance(item, int)
    return Channels(dim=dim + channels.dim - read, atoms=channels.atoms)


def _index_items(call: Call) -> list[tuple[int, int | slice | None]]:
    """What is in the brackets and where it is written, with ``...`` spelled out."""
    value, index = call.args[0], call.args[1]
    items = list(enumerate(index if isinstance(index, tuple) else [index]))
    if not all(item is None or item is ... or isinstance(item, int | slice) for _, item in items):
        raise FreezeError(f"'{call.name}' picks with a tensor or a list")
    ellipsis = next((place for place, item in items if item is ...), None)
    if ellipsis is not None:
        named = sum(item not in (None, ...) for _, item in items)
        items[ellipsis : ellipsis + 1] = [(ellipsis, slice(None))] * (value.dim() - named)
    return items


def _slice_channels(call: Call, atoms: Atoms, place: int, item: int | slice) -> Atoms:
    if item == slice(None):
        return atoms
    if isinstance(item, int) or item.step not in (None, 1):
        raise FreezeError(f"'{call.name}' picks single channels")
    for bound in ("start", "stop"):
        path = ("args", 1, place, bound)
        number = call.written(*path)
        if number is None:
            continue
        if not isinstance(number, int) or number < 0:
            raise FreezeError(f"'{call.name}' slices the channels at a computed or negative place")
        call.constant(path, atoms[:number])
    return atoms[item]


def reshape(call: Call) -> Mark:
    """Flatten, view, squeeze: the channels may be merged with dimensions before and after them.

    A dimension of the result that holds ``before`` x channels x ``after`` has each atom ``after``
    times in a row, and all of this ``before`` times. The batch stays a dimension of its own.
    """
    channels = call.channels
    if channels is None:
        return None
    old, new = next(call.tensors())[1].shape, call.result.shape
    outer, inner = prod(old[: channels.dim]), prod(old[channels.dim + 1 :])
    width = len(channels.atoms)
    first = 1 if new[0] % old[0] == 0 else len(new)
    for dim in range(first, len(new)):
        before, outer_rest = divmod(outer, prod(new[:dim]))
        after, inner_rest = divmod(inner, prod(new[dim + 1 :]))
        if not outer_rest and not inner_rest and before * width * after == new[dim]:
            atoms = np.tile(np.repeat(channels.atoms, after), before)
            return Channels(dim=dim, atoms=atoms)
    raise FreezeError(f"'{call.name}' splits the channels or merges them with the batch")


def view(call: Call) -> Mark:
    """:func:`reshape` to sizes that the code may spell out."""
    channels = reshape(call)
    if channels is not None:
        path = call.path(1, "shape")
        if isinstance(call.argument(1, "shape"), int):  # x.view(a, b)
            call.constant(("args", 1 + channels.dim), channels.atoms)
        elif isinstance(call.written(*path), list | tuple):  # x.view((a, b))
            call.constant((*path, channels.dim), channels.atoms)
    return channels


def _entries(rule: Rule, operations: Iterable[Any]) -> dict[Any, Rule]:
    return dict.fromkeys(operations, rule)


RULES: dict[Any, Rule] = {
    **_entries(convolution, (*CONVOLUTIONS, *TRANSPOSED)),
    **_entries(linear, (nn.Linear,)),
    **_entries(
        per_channel,
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.PReLU),
        ),
    ),
    **_entries(
        elementwise,
        (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
            *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus),
            *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
            *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish),
            *(F.hardsigmoid, F.hardtanh, F.softplus, F.sigmoid, F.tanh),
            *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
            *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp),
            *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_"),
            *("contiguous", "clone", "detach", "float", "double"),
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
    **_entries(reduction, (torch.mean, torch.sum, "mean", "sum")),
    **_entries(concatenation, (torch.cat, torch.concat)),
    **_entries(padding, (F.pad,)),
    **_entries(indexing, (operator.getitem,)),
    **_entries(reshape, (nn.Flatten, torch.flatten, "flatten", torch.squeeze, "squeeze")),
    **_entries(reshape, (torch.unsqueeze, "unsqueeze")),
    **_entries(view, ("view", "reshape", torch.reshape)),
}


def apply(call: Call) -> Mark:
    """The mark of a call's result, by the operation's rule.

    Raises:
        FreezeError: there is no rule, or it cannot follow this call.
    """
    rule = RULES.get(type(call.module) if call.module is not None else call.node.target)
    if rule is None:
        raise FreezeError(f"read by '{call.name}' ({call.operation}), for which there is no rule")
    mark = rule(call)
    if mark is not None and (
        not isinstance(call.result, Tensor) or call.result.shape[mark.dim] != len(mark.atoms)
    ):
        raise FreezeError(f"the result of '{call.name}' is not what its rule expects")
    return mark
