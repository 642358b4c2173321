"""How far the dense networks are from what this x86 processor's arithmetic allows, fp32, batch 1.

    python benchmarks/x86_limit.py --weights=resnet56.th --data=DIR [--threads 2]

The limit is the rate, in multiply-accumulates a second, of a chain of products with matrices of
512x512, which stay in the caches, raced beside each network of ``x86_latency.py`` in the same
alternating blocks, a process for each, on the runtime that makes the products fastest. *Times the
limit* is a network's time over that of its MACs at this rate, paired by block, so that a machine
whose speed changes changes both.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from cifar import load_images
from common import write_result
from torch import Tensor, nn
from x86_latency import MULTIPLES, PRESET, RUNTIMES, make

from greenprune import schema
from greenprune.harness.statistics import paired_ratio
from greenprune.pruning.cost import count
from greenprune.whole_networks import race_networks

SEED = 0
ROWS, COLUMNS, PRODUCTS = 1024, 512, 8
"""Of the sizes that were tried the fastest: wider matrices do not stay in the caches."""
REPLAYED = 16


class Products(nn.Module):
    """A chain of products, which an input sets off; nothing of it can be computed ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.randn(ROWS, COLUMNS))
        self.register_buffer("next", torch.randn(COLUMNS, COLUMNS) / COLUMNS**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, 1]."""
        y = self.first + x.mean(dim=(1, 2, 3)).reshape(-1, 1, 1)
        for _ in range(PRODUCTS):
            y = y @ self.next
        return y.abs().mean(dim=(1, 2)).reshape(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    begin = time.monotonic()
    torch.manual_seed(SEED)
    loaded = load_images(arguments.data, arguments.weights)
    networks = {}
    for name in MULTIPLES:
        network, images = make(name, loaded, arguments.weights)
        networks[name] = one(network, images[:REPLAYED], arguments.threads)
        print(name, networks[name], flush=True)
    figures = {"threads": arguments.threads, "networks": networks}
    print(write_result("x86_limit", seed=SEED, seconds=time.monotonic() - begin, figures=figures))


def one(network: nn.Module, images: Tensor, threads: int) -> dict[str, Any]:
    """A network beside the products."""
    raced = {"dense": network, "products": Products().eval()}
    racers = race_networks("x86", raced, RUNTIMES, images, threads=threads, preset=PRESET).racers
    fastest = min(racers, key=lambda racer: racer.latency_ms["products"].value)
    macs = {"dense": count(network, images[:1]).macs, "products": PRODUCTS * ROWS * COLUMNS**2}
    share = macs["dense"] / macs["products"]
    found = {}
    for racer in racers:
        ratio = paired_ratio(racer.blocks_ms["dense"], fastest.blocks_ms["products"])
        found[racer.runtime] = {
            "latency_ms": schema.encode(racer.latency_ms["dense"]),
            "times_the_limit": {
                end: getattr(ratio, end) / share for end in ("value", "low", "high")
            },
        }
    return {
        "macs": macs["dense"],
        "products_on": fastest.runtime,
        "products_gmacs": macs["products"] / fastest.latency_ms["products"].value / 1e6,
        "runtimes": found,
    }


if __name__ == "__main__":
    main()
