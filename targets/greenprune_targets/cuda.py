"""NVIDIA GPUs in PCs and servers: TensorRT (data only so far)."""

from __future__ import annotations

from greenprune.registry import Capabilities
from greenprune_targets.base import BaseTarget


class Cuda(BaseTarget):
    """A discrete NVIDIA GPU."""

    name = "cuda"
    description = "discrete NVIDIA GPU, by TensorRT"
    capabilities = Capabilities(
        precisions=("fp32", "fp16", "int8"),
        runtimes=("tensorrt",),
        opset=20,
        width_multiple=32,
        meters=("nvml",),
        machines=("x86_64", "aarch64"),
        status="not available yet: building and opening TensorRT engines",
    )
