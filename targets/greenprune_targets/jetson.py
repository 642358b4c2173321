"""NVIDIA Jetson: TensorRT engines that are built on the device (data only so far)."""

from __future__ import annotations

from greenprune.registry import Capabilities
from greenprune_targets.base import BaseTarget


class Jetson(BaseTarget):
    """A Jetson Orin module with JetPack 6 or later."""

    name = "jetson"
    description = "NVIDIA Jetson Orin (JetPack 6 or later), by TensorRT built on the device"
    capabilities = Capabilities(
        precisions=("fp32", "fp16", "int8"),
        runtimes=("tensorrt",),
        opset=20,
        width_multiple=32,
        meters=("ina3221",),
        machines=("aarch64",),
        status="not available yet: bundles that build their TensorRT engine on the device",
    )
