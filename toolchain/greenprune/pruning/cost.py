"""MACs and parameters, counted on the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
ATTENTION = nn.MultiheadAttention
_TENSORS = ("input", "query", "key", "value")
"""What these layers call their inputs, in order."""


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
        MACs of convolution, linear, recurrent and attention layers for one sample, and all
        parameters, those of BatchNorm included, shared ones once. Of ``nn.MultiheadAttention``
        the projections count, and the two products of activations: queries with keys (scores),
        scores with values (context). Biases, BatchNorm and activations are not counted, nor are
        calls of functions such as ``F.conv2d`` and ``torch.matmul``.
    """
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(macs=sum(per_layer(model, example_input).values()), params=params)


@torch.no_grad()
def per_layer(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """MACs for one sample of each layer that has any, by module name, in the order of execution.

    A layer that is called several times counts each time. The network is run once.
    """
    macs: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def add(
            module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            read = [*arguments, *(named[key] for key in _TENSORS if key in named)]
            macs[name] = macs.get(name, 0) + _call_macs(module, read, output)

        return add

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *RECURRENT, ATTENTION))
    ]
    try:
        with evaluating(model):
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total // example_input.shape[0] for name, total in macs.items()}


def _call_macs(module: nn.Module, arguments: Sequence[Any], written: Any) -> int:
    """MACs of one call on a whole batch: every weight once for each position."""
    read: Tensor = arguments[0]
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = arguments[:3]
        return _attention_macs(module, query, key, value)
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


def _attention_macs(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> int:
    width: int = module.embed_dim
    queries = query.numel() // width  # of the whole batch
    keys_of_one: int = key.shape[-2 if module.batch_first or key.dim() == 2 else 0]
    keys_of_one += (module.bias_k is not None) + module.add_zero_attn
    projections = 2 * queries * width + key.numel() + value.numel()
    return (projections + 2 * queries * keys_of_one) * width


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
