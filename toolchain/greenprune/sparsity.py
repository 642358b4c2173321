"""CBS and the plain sparse baselines, as a proximal step after SGD's (host side).

Our reading of Consideration Bias Sparsity; the paper's formula is not public. A filter f is
penalised by its BatchNorm's scale and shift where it has one, else by its weights and bias:

==========  =======================================  ========================================
method      with BatchNorm                           without (n_f entries)
==========  =======================================  ========================================
``cbs``     Σ_f ‖(γ_f, β_f)‖₂                        Σ_f √n_f ‖(W_f, b_f)‖₂
``cbs_l1``  Σ_f (|γ_f| + |β_f|)                      Σ_f (‖W_f‖₁ + |b_f|)
``group``   Σ_f |γ_f|                                Σ_f √n_f ‖W_f‖₂
``l1``      Σ_f |γ_f|                                Σ_f ‖W_f‖₁
==========  =======================================  ========================================

each times the strength λ. Under ``cbs`` a filter's entries reach zero together, so that a
channel judged dead adds no constant either.

The step is the (group) soft threshold: exact zeros, which a subgradient never gives. Its
threshold is η λ / (1 − m): under momentum m a steady gradient moves a weight by η / (1 − m) a
step, so that equal λ mean equal penalties whatever the momentum. A penalised parameter must have
no weight decay besides (it would be shrunk twice); :func:`greenprune.training.fit` sees to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from greenprune.errors import TrainingError

METHODS = ("cbs", "cbs_l1", "group", "l1")
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True, eq=False)
class Penalty:
    """The penalised parameters of one network; made by :func:`build`."""

    method: str
    strength: float
    norms: tuple[tuple[Tensor, ...], ...]
    """For each BatchNorm ``(γ,)``, or ``(γ, β)`` where the bias counts, each ``[F]``."""
    layers: tuple[tuple[Tensor, ...], ...]
    """For each layer without one ``(W,)``, or ``(W, b)``; W is ``[F, ...]``, b is ``[F]``."""

    @property
    def parameters(self) -> list[Tensor]:
        """All penalised parameters."""
        return [tensor for filters in (*self.norms, *self.layers) for tensor in filters]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the soft threshold; call it right after ``optimizer.step()``.

        Raises:
            TrainingError: the optimiser is not SGD, or its parameter groups differ in learning
                rate or momentum, so that there is no one threshold.
        """
        threshold = self.strength * _step_size(optimizer)
        if threshold == 0:
            return
        if self.method in ("cbs_l1", "l1"):
            for tensor in self.parameters:
                tensor.copy_(nn.functional.softshrink(tensor, threshold))
            return
        if self.norms:
            factors = _factors(self._joined_norms(), threshold)
            split = factors.split([len(filters[0]) for filters in self.norms])
            for part in zip(*self.norms, strict=True):
                torch._foreach_mul_(part, split)
        for filters in self.layers:
            factor = _factors(_norms(filters), threshold * sqrt(_entries(filters)))
            for tensor in filters:
                tensor.mul_(factor.view(-1, *[1] * (tensor.ndim - 1)))

    @torch.no_grad()
    def value(self) -> float:
        """The penalty, λ included."""
        if self.method in ("cbs_l1", "l1"):
            total = sum(float(tensor.abs().sum()) for tensor in self.parameters)
        else:
            total = sum(float(_norms(filters).sum()) for filters in self.norms)
            total += sum(
                sqrt(_entries(filters)) * float(_norms(filters).sum()) for filters in self.layers
            )
        return self.strength * total

    @torch.no_grad()
    def zero_share(self) -> float:
        """Share of the filters whose penalised entries are all exactly zero."""
        zero = [_norms(filters) == 0 for filters in (*self.norms, *self.layers)]
        return float(torch.cat(zero).float().mean())

    def _joined_norms(self) -> Tensor:
        """``[F of all BatchNorms]``: one computation for all layers instead of one for each."""
        return _norms([torch.cat(part) for part in zip(*self.norms, strict=True)])


def build(
    model: nn.Module, example_input: Tensor, method: str = "cbs", strength: float = 1e-4
) -> Penalty:
    """Find what to penalise in ``model`` by running it once on ``example_input``.

    Filters are those of every convolution and linear layer but the last one to run (the output
    layer: its outputs are the answers). A BatchNorm counts where its input is the output of such
    a layer. Frozen parameters are left out.

    Args:
        model: its state and mode are left as they were.
        example_input: float32 ``[N, C, H, W]``, on the model's device.
        method: one of :data:`METHODS`.
        strength: λ.

    Raises:
        TrainingError: an unknown method, a negative strength, or nothing to penalise.
    """
    if method not in METHODS or strength < 0:
        raise TrainingError(
            f"sparsify: expected a method of {', '.join(METHODS)} and a strength of 0 or more, "
            f"found '{method}' and {strength}"
        )
    norm_of = _follow(model, example_input)
    with_bias = method.startswith("cbs")
    norms: dict[nn.Module, tuple[Tensor, ...]] = {}
    layers: dict[nn.Module, tuple[Tensor, ...]] = {}
    for layer in list(norm_of)[:-1]:
        owner = norm_of[layer] or layer
        parts = (owner.weight, owner.bias) if with_bias else (owner.weight,)
        trained = tuple(p for p in parts if isinstance(p, Tensor) and p.requires_grad)
        if len(trained) == sum(p is not None for p in parts) > 0:
            (layers if owner is layer else norms)[owner] = trained
    if not norms and not layers:
        raise TrainingError(
            f"sparsify: {type(model).__name__} has no trainable convolution or linear layer before "
            "its output layer, so that there is nothing to penalise; set sparsify.epochs = 0"
        )
    return Penalty(
        method=method,
        strength=strength,
        norms=tuple(norms.values()),
        layers=tuple(layers.values()),
    )


def _follow(model: nn.Module, example_input: Tensor) -> dict[nn.Module, nn.Module | None]:
    """Each convolution and linear layer, in the order they run, and the BatchNorm that reads it."""
    norm_of: dict[nn.Module, nn.Module | None] = {}
    made: list[tuple[Tensor, nn.Module]] = []

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, LAYERS):
            norm_of.pop(module, None)
            norm_of[module] = None
            made.append((output, module))
            return
        for tensor, layer in made:
            if tensor is inputs[0]:
                norm_of[layer] = module

    hooks = [
        m.register_forward_hook(seen) for m in model.modules() if isinstance(m, LAYERS + NORMS)
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(example_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return norm_of


def _step_size(optimizer: torch.optim.Optimizer) -> float:
    if not isinstance(optimizer, torch.optim.SGD):
        raise TrainingError(
            f"the sparsity penalty needs torch.optim.SGD, found {type(optimizer).__name__}: an "
            "optimiser that scales each weight's step has no one step size, and a threshold made "
            "from its learning rate would be another penalty for each weight; use SGD"
        )
    settings = {(group["lr"], group["momentum"]) for group in optimizer.param_groups}
    if len(settings) != 1:
        raise TrainingError(
            "the sparsity penalty needs one learning rate and one momentum for all parameters, "
            f"found (learning rate, momentum) = {sorted(settings)}"
        )
    learning_rate, momentum = settings.pop()
    return float(learning_rate) / (1 - float(momentum))


def _norms(filters: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """``[F]``: the 2-norm of each filter's entries."""
    squares = [t.square() if t.ndim == 1 else t.square().flatten(1).sum(1) for t in filters]
    return torch.stack(squares).sum(0).sqrt()


def _entries(filters: tuple[Tensor, ...]) -> int:
    return sum(tensor[0].numel() for tensor in filters)


def _factors(norms: Tensor, threshold: float) -> Tensor:
    """What the group soft threshold multiplies each filter by; 0 where the norm is below it."""
    return (1 - threshold / norms).clamp_(min=0)
