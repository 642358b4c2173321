"""The rule of recurrent layers: a unit goes from all gates, layers and directions at once.

A unit of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` owns one row in every gate of the input weight,
the recurrent weight and the biases (4 gates, 3, or 1), its column in the recurrent weight, and its
input columns in the next layer. A torch module has one ``hidden_size`` for all its layers and
directions, so unit i of each of them is taken to be one: a group has ``hidden_size`` channels, and
each of them stands for one unit of every layer and direction.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import nn

from greenprune.pruning.atoms import Atoms, Axis, Call, Channels, FreezeError, Mark, together


def recurrent(call: Call) -> Mark:
    """New atoms in the last dimension of the output and of the final states.

    Raises:
        FreezeError: an initial state is given, the outputs are projected, or the input is not one
            batch of sequences.
    """
    layer = cast("nn.RNNBase", call.module)
    _check(call, layer)
    inputs = _inputs(call, layer)
    units = call.ledger.new(layer.hidden_size)
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    outputs = np.tile(units, len(suffixes))
    rows = np.tile(units, len(layer.get_parameter("weight_hh_l0")) // layer.hidden_size)
    for depth in range(layer.num_layers):
        for place in (f"l{depth}{suffix}" for suffix in suffixes):
            call.parameter(f"weight_ih_{place}", 1, outputs if depth else inputs, reads=True)
            call.parameter(f"weight_hh_{place}", 1, units, reads=True)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                call.parameter(f"{name}_{place}", 0, rows)
    call.reads(inputs, "input_size")
    call.ledger.add(Axis(kind="output", owner=call.name, place="", atoms=outputs))
    call.attribute("hidden_size", units)
    state = Channels(dim=2, atoms=units)
    states = together(state, state) if isinstance(layer, nn.LSTM) else state
    return together(Channels(dim=2, atoms=outputs), states)


def _check(call: Call, layer: nn.RNNBase) -> None:
    if layer.proj_size:
        raise FreezeError(f"'{call.name}' projects its outputs (proj_size)")
    if call.argument(1, "hx") is not None:
        raise FreezeError(f"'{call.name}' is given an initial state")
    read = [value for _, value in call.tensors()]
    if len(read) != 1 or read[0].dim() != 3:
        raise FreezeError(f"'{call.name}' reads something else than one batch of sequences")


def _inputs(call: Call, layer: nn.RNNBase) -> Atoms:
    """The atoms of what is read; channels that are the steps or the batch must stay."""
    channels = call.channels
    if channels is not None and channels.dim == 2:
        return channels.atoms
    if channels is not None:
        call.ledger.freeze(channels.atoms, f"'{call.name}' reads the channels one after another")
    return call.ledger.unknown(layer.input_size)
