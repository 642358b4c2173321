"""NVIDIA GPUs in PCs and servers: TensorRT engines that are built on the device."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from greenprune.errors import MeasurementError, TargetError
from greenprune.registry import Capabilities, Runner
from greenprune_targets.board import describe
from greenprune_targets.tensorrt_target import TensorRtTarget


class Cuda(TensorRtTarget):
    """A discrete NVIDIA GPU."""

    name = "cuda"
    description = "discrete NVIDIA GPU, by TensorRT 10.3 or later, built on the device"
    capabilities = Capabilities(
        precisions=("fp32", "fp16", "int8"),
        runtimes=("tensorrt",),
        opset=20,
        width_multiple=32,
        meters=("nvml", "rapl"),
        machines=("x86_64", "aarch64"),
        built_on_device=True,
        status="ready, but never yet run on NVIDIA hardware; width_multiple is not measured",
    )

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """As every TensorRT target's.

        Raises:
            TargetError: this is a Jetson, which shares its memory with the GPU and has targets of
                its own.
        """
        board = describe()
        if board.is_jetson:
            name = f"jetson-{board.name}" if board.name else "jetson"
            raise TargetError(
                f"expected a PC or a server with a GPU of its own, found {board.model}; "
                f"export the bundle again with --target {name}"
            )
        return super().open(artifact, runtime, threads)

    def is_here(self) -> bool:
        """Whether such a GPU and TensorRT are here; a Jetson has targets of its own."""
        return super().is_here() and not describe().is_jetson and _has_gpu()


@cache  # a session asks whenever its policy changes, and NVML takes milliseconds to start
def _has_gpu() -> bool:
    from greenprune.meters import nvml  # here: not every session needs meters

    try:
        return nvml.is_here()
    except MeasurementError:  # a driver that fails
        return False
