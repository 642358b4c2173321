"""What a compact network learns from the network that it was cut out of (host side)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune.recipe import DistillationSettings

Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


@contextmanager
def distilled(
    model: nn.Module,
    teacher: nn.Module,
    example: Tensor,
    settings: DistillationSettings,
    supervised: Loss,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Objective]:
    """Inside, ``objective(inputs, outputs, targets)``, a scalar, of the model's latest outputs.

    It is ``(1 - w) supervised + w T² KL(teacher ‖ model)`` at temperature T (Hinton et al., 2015)
    and, at the stages that :func:`shared_stages` finds, the mean of ``f ‖model - teacher‖² /
    ‖teacher‖²`` of their outputs (after FitNets, Romero et al., 2015; the norm is our choice).

    Args:
        model: being trained; its forward comes before each call.
        teacher: in eval mode, on the same device.
        example: inputs, [N, ...].
        settings: w, T and f.
        supervised: the loss of outputs against targets.
        autocast: in which the teacher runs.
    """
    weight, temperature = settings.distillation, settings.temperature
    stages = shared_stages(model, teacher, example) if settings.features else []
    own: dict[str, Tensor] = {}
    taught: dict[str, Tensor] = {}
    handles = [*_keep(model, stages, own), *_keep(teacher, stages, taught)]

    def objective(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            answers = teacher(inputs)
        divergence = F.kl_div(
            F.log_softmax(outputs / temperature, dim=1),
            F.log_softmax(answers.float() / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        value = (1 - weight) * supervised(outputs, targets)
        value = value + weight * temperature**2 * divergence
        if stages:
            apart = [_apart(own.pop(name), taught.pop(name)) for name in stages]
            value = value + settings.features * torch.stack(apart).mean()
        return value

    try:
        yield objective
    finally:
        for handle in handles:
            handle.remove()


def shared_stages(model: nn.Module, teacher: nn.Module, example: Tensor) -> list[str]:
    """The outermost submodules that were cut inside and answer in the teacher's shape still.

    In a residual network whose stream is whole these are its stages; where every width changed
    there are none.

    Args:
        model: the compact network; names are those of ``teacher``.
        teacher: the network that it was cut out of.
        example: inputs, [N, ...].
    """
    shapes = [_shapes(network, example[:1]) for network in (model, teacher)]
    names = [name for name in shapes[0] if shapes[0][name] == shapes[1].get(name)]
    known = dict(teacher.named_modules())
    cut = [
        name
        for name in names
        if any(known[name].children()) and _sizes(model.get_submodule(name)) != _sizes(known[name])
    ]
    return [name for name in cut if not any(name.startswith(f"{outer}.") for outer in cut)]


def _sizes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


@torch.no_grad()
def _shapes(network: nn.Module, example: Tensor) -> dict[str, list[int]]:
    """The shape of each submodule's output, where it is called once and gives one tensor."""
    found: dict[str, list[list[int]]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            shape = list(output.shape) if isinstance(output, Tensor) and output.dim() > 2 else []
            found.setdefault(name, []).append(shape)

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in network.named_modules() if name]
    training = network.training
    try:
        network.eval()(example)
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return {name: shapes[0] for name, shapes in found.items() if len(shapes) == 1 and shapes[0]}


def _keep(network: nn.Module, names: list[str], place: dict[str, Tensor]) -> Iterator[Any]:
    def hook(name: str) -> Any:
        return lambda module, given, output: place.__setitem__(name, output)

    for name in names:
        yield network.get_submodule(name).register_forward_hook(hook(name))


def _apart(own: Tensor, taught: Tensor) -> Tensor:
    taught = taught.float()
    distance = (own.float() - taught).square().mean()
    return distance / taught.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
