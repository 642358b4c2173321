"""MACs and parameters, counted on the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs: multiply-accumulates for one sample, and stored parameters."""

    macs: int
    params: int


def count(model: nn.Module, example_input: Tensor) -> Cost:
    """Count MACs and parameters.

    Args:
        model: any network.
        example_input: a batch of one sample or more, [N, ...].

    Returns:
        MACs of convolution, linear and recurrent layers for one sample (biases, BatchNorm and
        activations are not counted, nor are calls of functions such as ``F.conv2d``), and all
        parameters, those of BatchNorm included, shared ones once.
    """
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(macs=sum(per_layer(model, example_input).values()), params=params)


@torch.no_grad()
def per_layer(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """MACs for one sample of each layer that has any, by module name, in the order of execution.

    A layer that is called several times counts each time. The network is run once.
    """
    macs: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            macs[name] = macs.get(name, 0) + _call_macs(module, arguments[0], output)

        return add

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *RECURRENT))
    ]
    try:
        with evaluating(model):
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total // example_input.shape[0] for name, total in macs.items()}


def _call_macs(module: nn.Module, read: Tensor, written: Any) -> int:
    """MACs of one call on a whole batch: every weight once for each position."""
    if isinstance(module, RECURRENT):
        data = getattr(read, "data", read)  # of a PackedSequence
        steps = prod(data.shape[:-1])
        return steps * sum(w.numel() for n, w in module.named_parameters() if "weight" in n)
    weight: Tensor = getattr(module, "weight")  # noqa: B009 (parametrised, it is no Parameter)
    if isinstance(module, nn.Linear):
        return int(written.numel() // module.out_features * weight.numel())
    if isinstance(module, TRANSPOSED):
        return read.numel() // read.shape[1] * weight.numel()
    return int(written.numel() // written.shape[1] * weight.numel())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
