"""Rules of layers, of elementwise operations and of reductions; see :mod:`.rules`."""

from __future__ import annotations

import re
from typing import cast

import numpy as np
from torch import nn

from greenprune.pruning.atoms import Call, Channels, FreezeError, Mark
from greenprune.pruning.cost import TRANSPOSED


def convolution(call: Call) -> Mark:
    """New atoms; with groups, a group's inputs and outputs are one (depthwise passes on)."""
    layer = cast("nn.Conv2d", call.module)
    found = call.channels_at(1)
    inputs = found.atoms if found else call.unknown(layer.in_channels)
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
    inputs = found.atoms if found else call.unknown(layer.in_features)
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
    atoms = channels.atoms if channels else call.unknown(size)
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.parameter(name, 0, atoms)
    call.attribute(attribute, atoms)
    return channels


def group_norm(call: Call) -> Mark:
    """A group's statistics are of all its channels, so they go together."""
    layer = cast("nn.GroupNorm", call.module)
    if layer.num_groups == 1:
        raise FreezeError(f"'{call.name}' normalises over all channels")
    channels = call.channels_at(1)
    atoms = channels.atoms if channels else call.unknown(layer.num_channels)
    by_group = atoms.reshape(layer.num_groups, -1)
    call.ledger.unite(by_group[:, :1], by_group)
    call.parameter("weight", 0, atoms)
    call.parameter("bias", 0, atoms)
    call.attribute("num_channels", atoms)
    call.attribute("num_groups", by_group[:, 0])
    return channels


def layer_norm(call: Call) -> Mark:
    """The last dimensions are normalised; channels elsewhere pass."""
    channels = call.channels
    if channels is None:
        return None
    layer = call.module
    shape = call.argument(1, "normalized_shape") if layer is None else layer.normalized_shape
    if channels.dim >= call.result.dim() - len(cast("tuple[int, ...]", shape)):
        raise FreezeError(f"'{call.name}' normalises over the channels")
    return channels


def softmax(call: Call) -> Mark:
    """Over another dimension than the channels'."""
    channels = call.channels
    if channels is None:
        return None
    dim = call.argument(1, "dim") if call.module is None else call.module.dim
    if not isinstance(dim, int) or dim % call.result.dim() == channels.dim:
        raise FreezeError(f"'{call.name}' is a softmax over the channels")
    return channels


def attention(call: Call) -> Mark:
    """Heads stay as they are."""
    raise FreezeError(f"'{call.name}' is attention, which stays whole")


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
            raise FreezeError(call.tied)
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
