"""A run on several processes, as torchrun starts them, on one machine or on many (host side).

The first process runs everything and alone writes; the others join it where it trains. All of them
see the same run folder.
"""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PATIENCE = datetime.timedelta(days=7)
"""How long the others wait for the first, which may score a large network meanwhile."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(precision: str = "fp32") -> Fabric:
    """Join the others, once or again; returns what trains on all of them.

    Args:
        precision: ``fp32`` or ``bf16``, as in the recipe.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    fabric = Fabric(
        accelerator="auto",
        strategy=DDPStrategy(timeout=PATIENCE) if count() > 1 else "auto",
        devices=count_here(),
        num_nodes=count() // count_here(),
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric


def uses_gpu() -> bool:
    """Whether what :func:`launch` joins trains on a GPU."""
    import torch

    return torch.accelerator.is_available()


def agree(answer: bool | None = None) -> bool:
    """The first process's answer, on all of them; waits until the first has come here."""
    if count() == 1:
        return bool(answer)
    return bool(launch().broadcast(answer))
