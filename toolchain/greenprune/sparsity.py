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

The strength is λ as given, or found while training so that a share of the filters ends at zero:
see :meth:`Penalty.advance`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, exp, sqrt

import torch
from torch import Tensor, nn

from greenprune.errors import TrainingError

METHODS = ("cbs", "cbs_l1", "group", "l1")
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

RAMP = 0.7
"""With a target, the filters that are to go are at zero after this share of the training; in the
rest, what stays recovers without a penalty."""
STAYS = 0.2
"""With a target, at least this share of every layer's filters stays, the strongest."""
GAIN = 20.0
"""How fast the strength follows: filters that lag by a tenth of their way for a tenth of the
training multiply it by exp(0.2)."""


@dataclass(kw_only=True)
class Aim:
    """How far the way to a target is; goes into checkpoints."""

    scales: tuple[float, ...] = ()
    """Mean norm of each layer's filters when training began, those of ``norms`` first: with a
    target, λ is proportional to it, as a weight's size and a scale's cannot be compared."""
    start: float = 0.0
    """Norm, in units of its layer's scale, of the strongest filter that was to go when training
    began."""
    factor: float = 1.0
    reached: bool = False
    """The filters are at zero, and stay there."""


@dataclass(kw_only=True, eq=False)
class Penalty:
    """The penalised parameters of one network; made by :func:`build`."""

    method: str
    strength: float
    """λ; with a ``target``, what it is at present."""
    target: float | None
    """Share of the filters that are to be zero in the end; None: λ stays as it is."""
    norms: tuple[tuple[Tensor, ...], ...]
    """For each BatchNorm ``(γ,)``, or ``(γ, β)`` where the bias counts, each ``[F]``."""
    layers: tuple[tuple[Tensor, ...], ...]
    """For each layer without one ``(W,)``, or ``(W, b)``; W is ``[F, ...]``, b is ``[F]``."""
    aim: Aim = field(default_factory=Aim)
    held: Tensor | None = None
    """Which filters are held at zero, bool ``[filters]``."""

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
        scales = self.aim.scales or (1.0,) * (len(self.norms) + len(self.layers))
        if self.norms:
            joined = self._joined_norms()
            each: float | Tensor = threshold
            if self.aim.scales:
                each = torch.cat(
                    [
                        joined.new_full((len(filters[0]),), threshold * scale)
                        for filters, scale in zip(self.norms, scales, strict=False)
                    ]
                )
            factors = _factors(joined, each)
            split = factors.split([len(filters[0]) for filters in self.norms])
            for part in zip(*self.norms, strict=True):
                torch._foreach_mul_(part, split)
        for filters, scale in zip(self.layers, scales[len(self.norms) :], strict=True):
            factor = _factors(_norms(filters), threshold * scale * sqrt(_entries(filters)))
            for tensor in filters:
                tensor.mul_(factor.view(-1, *[1] * (tensor.ndim - 1)))

    @torch.no_grad()
    def advance(self, optimizer: torch.optim.Optimizer, done: float, step: float) -> None:
        """With a target, set the strength for the :meth:`step` that follows.

        Norms are compared in units of their layer's mean when training began, and a fifth of every
        layer stays. The last of the filters that are to go is led to zero evenly: the threshold is
        what it has to lose in each step, times a factor that grows while it lags behind. When it
        is there, or after ``RAMP`` of the training, those filters are zero and held there, and the
        others are penalised no more.

        Args:
            optimizer: the one whose step has just been taken.
            done: share of the training that is over, in (0, 1].
            step: share of the training that one step is.
        """
        if self.target is None:
            return
        if self.held is not None:
            self._zero(self.held)  # the optimiser may have moved them
            return
        aim = self.aim
        if not aim.scales:
            means = [float(part.mean()) for part in self._by_layer(self._comparable_norms())]
            aim.scales = tuple(mean or 1.0 for mean in means)
        norms = self._comparable_norms()
        free = torch.cat([_without_strongest(part) for part in self._by_layer(norms)])
        count = min(max(1, round(self.target * len(norms))), int(free.isfinite().sum()))
        weakest = free.topk(count, largest=False)
        last = float(weakest.values[-1])
        aim.start = aim.start or last
        if last == 0 or done >= RAMP:
            aim.reached = True
            self.strength = 0.0
            self.held = norms == 0
            self.held[weakest.indices] = True
            self._zero(self.held)
            return
        lag = last / aim.start - (1 - done / RAMP)
        aim.factor *= exp(GAIN * lag * step)
        self.strength = aim.factor * aim.start * step / RAMP / _step_size(optimizer)

    @torch.no_grad()
    def resume(self, aim: Aim) -> None:
        """Go on from a checkpoint, when the parameters have been put back."""
        self.aim = aim
        if aim.reached:
            self.strength = 0.0
            self.held = self._comparable_norms() == 0

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

    def _comparable_norms(self) -> Tensor:
        """``[filters]``: what the threshold has to add up to until each filter is zero."""
        parts = [_norms(filters) for filters in self.norms]
        parts += [_norms(filters) / sqrt(_entries(filters)) for filters in self.layers]
        scales = self.aim.scales or (1.0,) * len(parts)
        return torch.cat([part / scale for part, scale in zip(parts, scales, strict=True)])

    def _by_layer(self, filters: Tensor) -> tuple[Tensor, ...]:
        """One value for each filter, ``[filters]``, split by layer."""
        parts: tuple[Tensor, ...] = filters.split(
            [len(tensors[0]) for tensors in (*self.norms, *self.layers)]
        )
        return parts

    def _zero(self, filters: Tensor) -> None:
        """Set the filters of this mask, bool ``[filters]``, to zero."""
        owners = (*self.norms, *self.layers)
        for parts, mask in zip(owners, self._by_layer(filters), strict=True):
            for tensor in parts:
                tensor[mask] = 0

    def _joined_norms(self) -> Tensor:
        """``[F of all BatchNorms]``: one computation for all layers instead of one for each."""
        return _norms([torch.cat(part) for part in zip(*self.norms, strict=True)])


def build(
    model: nn.Module,
    example_input: Tensor,
    method: str = "cbs",
    strength: float = 1e-4,
    target: float | None = None,
) -> Penalty:
    """Find what to penalise in ``model`` by running it once on ``example_input``.

    Filters are those of every convolution and linear layer but the last one to run (the output
    layer: its outputs are the answers). A BatchNorm counts where its input is the output of such
    a layer. Frozen parameters are left out.

    Args:
        model: its state and mode are left as they were.
        example_input: float32 ``[N, C, H, W]``, on the model's device.
        method: one of :data:`METHODS`.
        strength: λ; without effect where there is a target.
        target: share of the filters that are to be zero in the end; λ is then found in training.

    Raises:
        TrainingError: an unknown method, a negative strength, a target outside (0, 0.8] or for a
            method that brings single weights to zero, or nothing to penalise.
    """
    if method not in METHODS or strength < 0:
        raise TrainingError(
            f"sparsify: expected a method of {', '.join(METHODS)} and a strength of 0 or more, "
            f"found '{method}' and {strength}"
        )
    if target is not None and (not 0 < target <= 1 - STAYS or method.endswith("l1")):
        raise TrainingError(
            f"sparsify: expected a share of zero filters above 0 and at most {1 - STAYS:.1f}, of a "
            f"method that brings whole filters to zero (cbs, group), found {target} and '{method}'"
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
        target=target,
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


def _without_strongest(norms: Tensor) -> Tensor:
    """``[F]``, infinite where a filter is among those of its layer that stay."""
    stay = norms.topk(ceil(STAYS * len(norms))).indices
    return norms.index_fill(0, stay, float("inf"))


def _factors(norms: Tensor, threshold: float | Tensor) -> Tensor:
    """What the group soft threshold multiplies each filter by; 0 where the norm is below it."""
    return (1 - threshold / norms).clamp_(min=0)
