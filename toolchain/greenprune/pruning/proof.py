"""The proof by a random point: two networks that agree there, to float64's error, are equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from greenprune.errors import ProofError, PruningError
from greenprune.pruning.cost import evaluating

TOLERANCE = 1e-10
"""Largest difference that the proof allows, as a share of the largest output (float64)."""


def reference(model: nn.Module, example_input: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of ``model`` in float64 whose every parameter and statistic was moved at random, so
    that nothing is zero by luck, and two random samples; whole numbers (indices of an embedding)
    are taken as they are.
    """
    generator = torch.Generator().manual_seed(0)
    moved = copy.deepcopy(model).double()
    _move_at_random(moved, generator)
    shape = (2, *example_input.shape[1:])
    if not example_input.is_floating_point():
        return moved, example_input[:1].expand(shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return moved, noise.to(example_input.device)


@torch.no_grad()
def _move_at_random(model: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        scale = max(float(tensor.square().mean().sqrt()), 0.01)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.add_((0.5 * scale * noise).to(tensor.device))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.1 * scale)


def check_equal(
    masked: nn.Module, smaller: nn.Module, example: Tensor, *, same_in_training: bool = True
) -> float:
    """Run both in eval mode and return the relative difference of their outputs.

    Where a network takes another way in training, it has to run there as well; as dropout and
    stochastic depth are random, nothing can be compared.

    Raises:
        ProofError: the difference is above ``TOLERANCE``, or the smaller network fails.
        PruningError: the masked network fails, or answers zeros alone, which prove nothing.
    """
    try:
        expected = _outputs(masked, example)
    except Exception as error:
        raise PruningError(
            f"the network does not run in float64, in which surgery is proved: {error}; leave "
            "other types out of its code (.float(), dtype=, tensors that are no buffers)"
        ) from error
    if not any(bool(output.any()) for output in expected):
        raise PruningError(
            "the network answers nothing but zeros to random input with random weights, which "
            "surgery is proved by; expected an output that depends on its input"
        )
    try:
        found = _outputs(smaller, example)
    except Exception as error:
        raise ProofError(
            f"the compact network does not run: {error}; remove something else, and please report "
            "the operation"
        ) from error
    difference = _relative_difference(expected, found)
    if not difference <= TOLERANCE:
        raise ProofError(
            "the compact network does not equal the masked one: relative difference "
            f"{difference:.3g}, expected at most {TOLERANCE:.0e}; remove something else, and "
            "please report the network"
        )
    if not same_in_training:
        _check_trains(masked, smaller, example)
    return difference


def refused(names: Sequence[str], prove: Callable[[list[str]], object]) -> dict[str, str]:
    """Which of ``names`` the proof refuses, and why: all are tried at once, then halves.

    Args:
        names: of groups or blocks.
        prove: tries to remove something of each of these, and raises ProofError.
    """
    if not names:
        return {}
    try:
        prove(list(names))
    except ProofError as error:
        half = len(names) // 2
        found = {**refused(names[:half], prove), **refused(names[half:], prove)} if half else {}
        return found or dict.fromkeys(names, f"a trial cut is refused by the proof: {error}")
    return {}


def _check_trains(masked: nn.Module, smaller: nn.Module, example: Tensor) -> None:
    try:
        _outputs(masked, example, training=True)
    except Exception:  # it may need larger batches or images to train
        return
    try:
        _outputs(smaller, example, training=True)
    except Exception as error:
        raise ProofError(
            f"the compact network does not run in training mode: {error}; remove something else, "
            "and please report the operation"
        ) from error


@torch.no_grad()
def _outputs(model: nn.Module, example: Tensor, *, training: bool = False) -> list[Tensor]:
    with evaluating(model):
        model.train(training)
        return _tensors(model(example.clone()))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _relative_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Infinite where shapes differ, NaN where an output is not finite."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    differences = [
        float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
        for a, b in zip(expected, found, strict=True)
    ]
    return float(np.max(differences))
