"""The rows that papers publish: dense counts, and compact counts at the published rates.

    python benchmarks/operating_points.py

Costs do not depend on the weights, so these are random. Each compact network is proved equal to the
masked one, counted on itself, and compared with the published figure to the last unit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import write_result
from torch import nn

from greenprune import models, schema
from greenprune.pruning import budget, surgery
from greenprune.pruning.cost import Cost, count
from greenprune.pruning.graph import analyse
from greenprune.pruning.scores import measure

Rates = dict[str, float]
"""Group name to the share of its channels that goes."""

DENSE: dict[str, tuple[Callable[[], nn.Module], int, Cost | None]] = {
    "lenet5": (models.lenet5, 1, None),
    "vgg16": (models.vgg16, 3, Cost(macs=313_463_808, params=14_991_946)),
    "resnet56": (models.resnet56, 3, Cost(macs=125_485_696, params=853_018)),
    "googlenet": (models.googlenet, 3, Cost(macs=1_521_756_160, params=6_166_250)),
    "densenet40": (models.densenet40, 3, Cost(macs=282_917_328, params=1_059_298)),
}
"""Factory, input channels and what HRankPlus's network of that name costs; LeNet-5 is ours, on
blocks of 8, and has no published count."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A published row; ``rates`` are as its authors write them."""

    network: str
    written: str
    rates: Rates
    published: Cost
    note: str = ""


def vgg16_rates() -> Rates:
    """``[0.3]*7 + [0.75]*5 + [0]``, one for each convolution."""
    convolutions = [n for n, m in models.vgg16().named_modules() if isinstance(m, nn.Conv2d)]
    return dict(zip(convolutions, [0.3] * 7 + [0.75] * 5 + [0.0], strict=True))


def resnet56_rates() -> Rates:
    """0.4 for the first convolution of every block; the residual stream stays whole."""
    names = (name for name, _ in models.resnet56().named_modules())
    return {name: 0.4 for name in names if name.endswith(".conv1")}


def googlenet_rates() -> Rates:
    """``[0.3] + [0.6]*2 + [0.7]*5 + [0.8]*2``: the stem, then each inception block.

    HRankPlus's network uses a block's rate for its 3x3 branch and for both convolutions of its 5x5
    branch, in the last block for the inner of these alone; the stem's rate it does not use.
    """
    features = models.googlenet().features.named_children()
    blocks = [name for name, part in features if hasattr(part, "branch5")]
    rates: Rates = {}
    for block, rate in zip(blocks, [0.6] * 2 + [0.7] * 5 + [0.8] * 2, strict=True):
        parts = ["branch5.1.0"]
        if block != blocks[-1]:
            parts += ["branch3.1.0", "branch5.2.0"]
        rates |= {f"features.{block}.{part}": rate for part in parts}
    return rates


def googlenet_published_rates() -> Rates:
    """The same with the one layer in which binary rounding takes a filter more.

    ``int(320 * (1 - 0.8))`` is 63, as 1 - 0.8 is a little less than 0.2; the published figures have
    been counted so.
    """
    return googlenet_rates() | {"features.10.branch3.1.0": 257 / 320}


GOOGLENET = "[0.3] + [0.6]*2 + [0.7]*5 + [0.8]*2"

POINTS = (
    Point(
        network="vgg16",
        written="[0.3]*7 + [0.75]*5 + [0]",
        rates=vgg16_rates(),
        published=Cost(macs=104_242_752, params=2_505_793),
    ),
    Point(
        network="resnet56",
        written="0.4 for inner channels",
        rates=resnet56_rates(),
        published=Cost(macs=73_360_000, params=506_446),
    ),
    Point(
        network="googlenet",
        written=GOOGLENET,
        rates=googlenet_published_rates(),
        published=Cost(macs=643_804_480, params=2_857_760),
        note="features.10.branch3.1.0 keeps 63 of 320, as int(320 * (1 - 0.8)) does in binary",
    ),
    Point(
        network="googlenet",
        written=GOOGLENET,
        rates=googlenet_rates(),
        published=Cost(macs=643_804_480, params=2_857_760),
        note="features.10.branch3.1.0 keeps 64 of 320, as 320 * 0.2 is in decimal",
    ),
)


def prune_at(
    network: nn.Module, example: torch.Tensor, rates: Mapping[str, float], width_multiple: int = 1
) -> tuple[nn.Module, float]:
    """The compact network, proved, and the relative difference that the proof has seen."""
    analysis = analyse(network, example)
    scores = measure(network, analysis, example, method="magnitude").scores
    removed = budget.by_rates(analysis, scores, rates, width_multiple=width_multiple)
    difference = surgery.prove(network, analysis, example, removed)
    return surgery.compact(network, analysis, removed), difference


def dense_row(name: str) -> dict[str, Any]:
    factory, channels, published = DENSE[name]
    found = count(factory(), torch.zeros(1, channels, 32, 32))
    return {
        **schema.encode(found),
        "published": schema.encode(published),
        "exact": None if published is None else found == published,
    }


def point_row(point: Point) -> dict[str, Any]:
    factory, channels, _ = DENSE[point.network]
    example = torch.zeros(1, channels, 32, 32)
    network = factory()
    compact, difference = prune_at(network, example, point.rates)
    found, dense = count(compact, example), count(network, example)
    return {
        "network": point.network,
        "rates": point.written,
        "note": point.note,
        **schema.encode(found),
        "macs_saved": 1 - found.macs / dense.macs,
        "params_saved": 1 - found.params / dense.params,
        "published": schema.encode(point.published),
        "exact": found == point.published,
        "difference": {
            "macs": found.macs - point.published.macs,
            "params": found.params - point.published.params,
        },
        "proof_relative_difference": difference,
        "pruned_layers": sum(rate > 0 for rate in point.rates.values()),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    begin = time.monotonic()
    torch.manual_seed(0)
    figures = {
        "dense": {name: dense_row(name) for name in DENSE},
        "points": [point_row(point) for point in POINTS],
    }
    path = write_result(
        "operating_points", seed=0, seconds=time.monotonic() - begin, figures=figures
    )
    print(path)


if __name__ == "__main__":
    main()
