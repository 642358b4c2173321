"""NVIDIA Jetson boards: TensorRT engines that are built on the board."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from greenprune.registry import Capabilities, Runner
from greenprune_targets.board import JETPACKS, check_board, describe
from greenprune_targets.tensorrt_target import TensorRtTarget

CAPABILITIES = Capabilities(
    precisions=("fp32", "fp16", "int8"),
    runtimes=("tensorrt",),
    opset=20,
    width_multiple=32,
    meters=("ina",),
    machines=("aarch64",),
    built_on_device=True,
    status="ready, but never yet run on NVIDIA hardware; width_multiple is not measured; the DLA "
    "is not used; Xavier (JetPack 5) is out of scope",
)


class Jetson(TensorRtTarget):
    """A board; subclasses name it."""

    board: ClassVar[str]
    capabilities = CAPABILITIES

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """As every TensorRT target's; raises TargetError on another board than this one."""
        check_board(describe(), self.board)
        return super().open(artifact, runtime, threads)

    def is_here(self) -> bool:
        """Whether this is that board, with its TensorRT."""
        return super().is_here() and describe().name == self.board

    def how_to_install(self, runtime: str) -> str:
        """JetPack's own package, which an environment must be made to see."""
        return (
            "on the board, sudo apt install python3-libnvinfer, in an environment made with "
            "--system-site-packages"
        )

    def readme(self) -> str:
        """How to run a bundle on this board, Markdown."""
        rows = [
            f"| {found.version} | {l4t} | {found.tensorrt or 'not known here'} "
            f"| {found.cuda or 'not known here'} | {found.python} |"
            for l4t, found in JETPACKS.items()
            if found.tensorrt is None or not found.tensorrt.startswith("8.")
        ]
        return README.format(board=self.board, table="\n".join(rows))


class OrinNano(Jetson):
    """Jetson Orin Nano, what ``jetson`` alone means."""

    name = "jetson-orin-nano"
    board = "orin-nano"
    description = "NVIDIA Jetson Orin Nano, by JetPack's TensorRT, built on the board"


class OrinNx(Jetson):
    """Jetson Orin NX."""

    name = "jetson-orin-nx"
    board = "orin-nx"
    description = "NVIDIA Jetson Orin NX, by JetPack's TensorRT, built on the board"


class AgxOrin(Jetson):
    """Jetson AGX Orin."""

    name = "jetson-agx-orin"
    board = "agx-orin"
    description = "NVIDIA Jetson AGX Orin, by JetPack's TensorRT, built on the board"


class Thor(Jetson):
    """Jetson AGX Thor."""

    name = "jetson-thor"
    board = "thor"
    description = "NVIDIA Jetson Thor, by JetPack's TensorRT, built on the board"


README = """# A greenprune bundle for the Jetson {board}

Data only: ONNX graphs in each precision, samples and a manifest. The engines are built on the board
when they are first needed, which takes minutes, and kept under `~/.cache/greenprune/engines` for
this TensorRT, L4T and GPU; they are not part of the bundle and do not travel.

Written from NVIDIA's documentation; it has not been tried on a board yet.

## Install

TensorRT's Python package is JetPack's own (`sudo apt install python3-libnvinfer`), so the
environment must see the system's packages, and cuda-python must fit JetPack's CUDA:

    python3 -m venv --system-site-packages env
    env/bin/pip install greenprune "cuda-python==12.6.*"    # JetPack 6; on 7: cuda-python==13.*

| JetPack | L4T | TensorRT | CUDA | Python |
|---|---|---|---|---|
{table}

JetPack 5 and older, and Xavier, are not supported: their TensorRT is older than 10.3.

## Measure and certify

Fix the power mode and the clocks first, and note them. A mode's number is another on each board and
JetPack; take the one that the device will be used in:

    grep POWER_MODEL /etc/nvpmodel.conf           # the modes of this board
    sudo nvpmodel -m NUMBER                       # some ask for a restart
    sudo jetson_clocks                            # no clock falls until the next restart
    sudo nvpmodel -q                              # what it is now
    env/bin/greenprune-bench --certify BUNDLE     # until then every input goes to the mild network
    env/bin/greenprune-bench BUNDLE --preset standard

`greenprune doctor` says which runtimes and power rails can be read, and the command that grants
what is missing.
"""
