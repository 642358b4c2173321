"""What the functions of several stages share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from greenprune import models, training
from greenprune.data import Data, Split, draw, normalise
from greenprune.errors import RecipeError
from greenprune.pipeline import Job
from greenprune.pruning import cost, record

NETWORK = "network"
PRUNED = ("mild", "aggressive")


def function_of(spec: str) -> Any:
    return models.resolve(spec, RecipeError)[0]


def evaluate(job: Job, network: nn.Module, split: Split) -> float:
    outputs = training.predict(network, split, job.data.preprocessing)
    return float(scores_of(job, outputs, split.targets).mean())


def scores_of(job: Job, outputs: Tensor, targets: Tensor) -> Tensor:
    return training.evaluate(outputs, targets, function_of(job.recipe.task.metric))


def example_of(data: Data) -> Tensor:
    return normalise(data.train.inputs[:2], data.preprocessing)


def load(job: Job, stage: str, name: str = NETWORK) -> tuple[nn.Module, record.NetworkRecord]:
    return record.load_network(job.place(stage) / name)


def described(job: Job, network: nn.Module, accuracy: float) -> dict[str, Any]:
    counted = cost.count(network, example_of(job.data))
    return {"accuracy": accuracy, "macs": counted.macs, "params": counted.params}


def training_images(job: Job, count: int, *, seed: int) -> Tensor:
    """Some training images, normalised, drawn without replacement."""
    inputs = job.data.train.inputs[draw(job.data.train, count, seed)]
    return normalise(inputs, job.data.preprocessing)
