"""The one training loop, and what is computed with a trained network (host side).

SGD with Nesterov momentum, linear warm-up, then cosine to zero, on one machine or, under
``torchrun``, on many: Lightning Fabric runs the same loop on all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from greenprune import processes, schema, storage
from greenprune.bundle import Preprocessing
from greenprune.data import Data, Split, batches, take
from greenprune.distillation import Loss, Objective, distilled
from greenprune.errors import RecipeError, TrainingError
from greenprune.progress import Advance, progress
from greenprune.recipe import DistillationSettings, TrainingSettings
from greenprune.sparsity import Aim, Penalty

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class History:
    """What each epoch of a training came to."""

    loss: tuple[float, ...]
    """Mean training loss, without the sparsity penalty."""
    seconds: tuple[float, ...]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of ``outputs [N, classes]`` against ``targets int64 [N]``."""
    return F.cross_entropy(outputs, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1.0 where the largest of ``outputs [N, classes]`` is the target, else 0.0: ``float [N]``."""
    return (outputs.argmax(1) == targets).float()


def fit(
    model: nn.Module,
    data: Data,
    settings: TrainingSettings,
    *,
    seed: int,
    loss: Loss = cross_entropy,
    teacher: nn.Module | None = None,
    penalty: Penalty | None = None,
    checkpoint: Path | None = None,
    label: str = "train",
) -> History:
    """Train ``model`` in place on ``data.train``.

    What is random in an epoch depends on the seed and the epoch alone, so that a training that
    was killed and resumed from its checkpoint ends with the very weights it would have had.

    Args:
        model: float32; left on the CPU in evaluation mode.
        data: its ``train`` split, preprocessing and augmentation are used. The images of an epoch
            are dealt into batches of (nearly) equal size, at most ``batch_size``; under torchrun
            the processes share each batch, so that losses and weights are those of one process
            but for rounding, dropout and BatchNorm, which sees each process's part by itself.
        settings: label smoothing applies where ``loss`` is :func:`cross_entropy`; weight decay to
            every parameter without a penalty.
        loss: ``loss(outputs, targets)``, a scalar tensor.
        teacher: adds what :func:`greenprune.distillation.distilled` says to the loss; needs
            DistillationSettings. Without it, the loss alone is used.
        penalty: its proximal step follows each of the optimiser's.
        checkpoint: written after each epoch, and resumed from where it belongs to this very
            training (settings, data, initial weights); the caller deletes it. None: no resuming.
        label: what the progress bar says.

    Raises:
        TrainingError: the loss is not finite or not a scalar; the checkpoint is damaged; there are
            more processes than images in a batch.
        StorageError: the checkpoint cannot be written.
    """
    if teacher is not None and not isinstance(settings, DistillationSettings):
        raise TrainingError("a teacher needs DistillationSettings, found TrainingSettings")
    fabric = processes.launch(settings.precision)
    key = _key(model, data, settings, seed, loss, teacher, penalty, label)
    networks = [model] if teacher is None else [model, teacher]
    layout = _layout(networks, data, fabric.device)
    optimizer = _optimizer(model, settings, penalty)
    saved = fabric.broadcast(_read_checkpoint(checkpoint, key) if fabric.is_global_zero else None)
    losses, seconds = _restore(model, optimizer, penalty, saved)
    wrapped, stepper = fabric.setup(model, optimizer)
    for parameter, state in optimizer.state.items():  # a checkpoint's, which setup leaves behind
        state["momentum_buffer"] = state["momentum_buffer"].to(parameter.device)
    if teacher is not None:
        teacher = teacher.to(fabric.device).eval()
    count = _steps(data.train, settings)
    if len(data.train) // count < fabric.world_size:
        raise TrainingError(
            f"batches of {settings.batch_size} from {len(data.train)} images cannot be shared by "
            f"{fabric.world_size} processes; raise batch_size to at least twice their number"
        )
    with (
        torch.random.fork_rng(),
        _objective(fabric, model, data, settings, loss, teacher) as objective,
        _bar(fabric, label, (settings.epochs - len(losses)) * count) as advance,
    ):
        for epoch in range(len(losses), settings.epochs):
            started = time.perf_counter()
            run = _Epoch(epoch=epoch, seed=seed, settings=settings, data=data, layout=layout)
            losses.append(run.train(fabric, wrapped, stepper, objective, penalty, advance))
            seconds.append(time.perf_counter() - started)
            if checkpoint is not None and fabric.is_global_zero:
                history = History(loss=tuple(losses), seconds=tuple(seconds))
                _write_checkpoint(checkpoint, key, model, optimizer, penalty, history)
    if fabric.world_size > 1:  # each process has seen other images: the first one's statistics
        for buffer in model.buffers():
            buffer.copy_(fabric.broadcast(buffer))
    for network in networks:
        network.cpu().to(memory_format=torch.contiguous_format).eval()
    return History(loss=tuple(losses), seconds=tuple(seconds))


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """One pass through the training images."""

    epoch: int
    seed: int
    settings: TrainingSettings
    data: Data
    layout: torch.memory_format

    def train(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        penalty: Penalty | None,
        advance: Advance,
    ) -> float:
        """Train through the epoch; returns its mean loss over all processes."""
        data, settings = self.data, self.settings
        order = torch.randperm(len(data.train), generator=self._generator(0))
        drawn = self._generator(1)
        # dropout draws from the global generator
        torch.manual_seed(self._generator(2 + fabric.global_rank).initial_seed())
        model.train()
        count = _steps(data.train, settings)
        total = 0.0
        for number, together in enumerate(order.tensor_split(count)):
            rate = _learning_rate(self.epoch * count + number, count, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # all processes draw the whole batch's augmentation: the same as one process would
            batch = take(data.train, together, data.preprocessing, drawn, data.augmentation)
            own = [part[fabric.global_rank :: fabric.world_size] for part in batch]
            share = len(own[1]) * fabric.world_size / len(together)
            inputs, targets = fabric.to_device(own)
            inputs = inputs.contiguous(memory_format=self.layout)
            optimizer.zero_grad()
            value = objective(inputs, model(inputs), targets)
            found = _finite(value, self.epoch, number, rate)
            fabric.backward(value * share)  # the mean over processes is the batch's mean
            optimizer.step()
            if penalty is not None:
                step = 1 / (count * settings.epochs)
                penalty.advance(optimizer, (self.epoch * count + number + 1) * step, step)
                penalty.step(optimizer)
            total += found * share
            advance(1, note=f"epoch {self.epoch + 1}/{settings.epochs}, loss {found:.3f}")
        return float(fabric.all_reduce(torch.tensor(total / count)))  # type: ignore[arg-type]

    def _generator(self, stream: int) -> torch.Generator:
        words = np.random.SeedSequence([self.seed, self.epoch, stream]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) >> 1)


def predict(
    model: nn.Module, split: Split, preprocessing: Preprocessing | None, batch_size: int = 500
) -> Tensor:
    """The network's outputs ``[N, ...]`` on a split, in evaluation mode, on the CPU.

    Raises:
        TrainingError: the split is empty, or an output is not finite.
    """
    if not len(split):
        raise TrainingError("the split has no images, and an answer for each is asked for")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    with torch.inference_mode():
        parts = [
            model(inputs.to(device)).cpu()
            for inputs, _ in batches(split, preprocessing, batch_size)
        ]
    model.train(training)
    outputs = torch.cat(parts).clone()
    if not torch.isfinite(outputs).all():
        raise TrainingError(
            "the network's outputs hold NaN or infinity; train it with a lower learning rate, or "
            "look at its weights"
        )
    return outputs


def evaluate(outputs: Tensor, targets: Tensor, metric: Metric = accuracy) -> Tensor:
    """Each sample's score, ``float32 [N]`` in [0, 1].

    Raises:
        RecipeError: the metric returns something else.
    """
    scores = metric(outputs, targets)
    if (
        not isinstance(scores, Tensor)
        or scores.shape != (len(outputs),)
        or not scores.is_floating_point()
        or not bool(((scores >= 0) & (scores <= 1)).all())
    ):
        found = (
            f"{scores.dtype} {tuple(scores.shape)} from {float(scores.min())} to "
            f"{float(scores.max())}"
            if isinstance(scores, Tensor) and scores.numel()
            else type(scores).__name__
        )
        raise RecipeError(
            f"task.metric: expected a float tensor [{len(outputs)}] of scores from 0 to 1, one for "
            f"each sample, found {found}; change the metric"
        )
    return scores.float()


# The parts of the loop


def _layout(networks: list[nn.Module], data: Data, device: torch.device) -> torch.memory_format:
    """Channels last on CPUs, where it saves a fifth of a step, unless a ``view`` refuses it."""
    if device.type != "cpu" or not len(data.train):
        return torch.contiguous_format
    inputs, _ = take(data.train, torch.arange(1), data.preprocessing)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            for network in networks:
                network.to(memory_format=torch.channels_last).eval()(inputs)
    except RuntimeError:
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _bar(fabric: Fabric, label: str, total: int) -> AbstractContextManager[Advance]:
    if fabric.is_global_zero:
        return progress(label, total)
    return nullcontext(lambda steps=1, note=None: None)


def _steps(split: Split, settings: TrainingSettings) -> int:
    """Batches in an epoch."""
    if not len(split):
        raise TrainingError("the training split has no images; lower what is held out of it")
    return math.ceil(len(split) / settings.batch_size)


def _learning_rate(step: int, steps_an_epoch: int, settings: TrainingSettings) -> float:
    warmup = round(settings.warmup_epochs * steps_an_epoch)
    total = settings.epochs * steps_an_epoch
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(
    model: nn.Module, settings: TrainingSettings, penalty: Penalty | None
) -> torch.optim.SGD:
    """SGD; the penalty takes the place of weight decay where it applies."""
    penalised = {id(p) for p in penalty.parameters} if penalty is not None else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in penalised]},
        {"params": [p for p in trained if id(p) in penalised], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )


def _objective(
    fabric: Fabric,
    model: nn.Module,
    data: Data,
    settings: TrainingSettings,
    loss: Loss,
    teacher: nn.Module | None,
) -> AbstractContextManager[Objective]:
    """``objective(inputs, outputs, targets)``, the scalar that is minimised."""

    supervised = _supervised(settings, loss)
    if teacher is None or not isinstance(settings, DistillationSettings):
        return nullcontext(lambda inputs, outputs, targets: supervised(outputs, targets))
    example, _ = take(data.train, torch.arange(min(2, len(data.train))), data.preprocessing)
    example = example.to(fabric.device)
    return distilled(model, teacher, example, settings, supervised, fabric.autocast)


def _supervised(settings: TrainingSettings, loss: Loss) -> Loss:
    """``loss``, with label smoothing where it is the built-in one."""
    if loss is not cross_entropy:
        return loss
    return lambda outputs, targets: F.cross_entropy(
        outputs, targets, label_smoothing=settings.label_smoothing
    )


def _finite(value: Tensor, epoch: int, step: int, rate: float) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TrainingError(f"task.loss: expected a scalar tensor, found {found}; change the loss")
    found_loss = value.item()
    if not math.isfinite(found_loss):
        raise TrainingError(
            f"the loss became {found_loss} in epoch {epoch + 1}, step {step + 1}, at learning rate "
            f"{rate:.3g}; lower the learning rate or lengthen warmup_epochs"
        )
    return found_loss


# Checkpoints


def _key(
    model: nn.Module,
    data: Data,
    settings: TrainingSettings,
    seed: int,
    loss: Loss,
    teacher: nn.Module | None,
    penalty: Penalty | None,
    label: str,
) -> str:
    """What a checkpoint must have been made for to be resumed from."""
    return storage.sha256_of(
        {
            "initial": _weights_sha256(model),
            "data": data.fingerprint,
            "settings": schema.encode(settings),
            "seed": seed,
            "loss": f"{loss.__module__}:{loss.__qualname__}",
            "teacher": teacher and _weights_sha256(teacher),
            "penalty": penalty and (penalty.method, penalty.strength, penalty.target),
            "label": label,
        }
    )


def _weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()


def _write_checkpoint(
    path: Path,
    key: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    penalty: Penalty | None,
    history: History,
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    metadata = {
        "key": key,
        "losses": json.dumps(history.loss),
        "seconds": json.dumps(history.seconds),
        "penalty": json.dumps(penalty and schema.encode(penalty.aim)),
    }
    storage.write_bytes(path, save(copies, metadata))


Checkpoint = tuple[dict[str, Tensor], dict[str, str]]


def _read_checkpoint(path: Path | None, key: str) -> Checkpoint | None:
    if path is None or not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise TrainingError(
            f"{path}: the checkpoint is damaged ({problem}); delete it and run again"
        ) from problem
    return (tensors, metadata) if metadata.get("key") == key else None


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    penalty: Penalty | None,
    saved: Checkpoint | None,
) -> tuple[list[float], list[float]]:
    """Put a checkpoint back; returns the losses and the seconds of its epochs."""
    if saved is None:
        return [], []
    tensors, metadata = saved
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        if f"momentum.{name}" in tensors:
            buffer = torch.empty_like(parameter, requires_grad=False).copy_(
                tensors[f"momentum.{name}"]
            )
            optimizer.state[parameter]["momentum_buffer"] = buffer
    if penalty is not None:
        penalty.resume(
            schema.decode(json.loads(metadata["penalty"]), Aim, "checkpoint", TrainingError)
        )
    return json.loads(metadata["losses"]), json.loads(metadata["seconds"])
