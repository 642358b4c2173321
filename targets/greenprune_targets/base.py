"""What the pages of the targets share: looking at the machine, runtimes, honest refusals."""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from greenprune.errors import GreenpruneError, TargetError
from greenprune.registry import Build, Capabilities, Runner, runtime_name, split_runtime

X86_ISA = ("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8")
ARM_ISA = ("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")
ISA = (*X86_ISA, *ARM_ISA)
"""Processor flags that decide which kernels a runtime picks."""


class BaseTarget(ABC):
    """Common part of the targets; a page gives the data and overrides what it can do."""

    name: ClassVar[str]
    description: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def runtimes_here(self) -> tuple[str, ...]:
        """Those of the target's runtimes that are installed on this machine."""
        return tuple(runtime for runtime in self.capabilities.runtimes if find_spec(runtime))

    def is_here(self) -> bool:
        """Whether this machine has the target's processor."""
        return platform.machine() in self.capabilities.machines

    def arithmetic(self, precision: str) -> str:
        """Empty: all its machines answer alike."""
        return ""

    @abstractmethod
    def compile(self, graph: Path, build: Build, folder: Path, name: str) -> Path:
        """Compile an ONNX graph; see :class:`greenprune.registry.Target`."""

    @abstractmethod
    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Open an artifact; see :class:`greenprune.registry.Target`."""

    def open_on_host(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """As :meth:`open`: what this target compiles, the host can run."""
        return self.open(artifact, runtime, threads)

    def layer_precisions(self, artifact: Path, runtime: str) -> dict[str, str]:
        """Empty: the target does not tell."""
        return {}

    def readme(self) -> str | None:
        """None: there is nothing special about the device."""
        return None

    def simulated_energy(self, artifact: Path) -> dict[str, Any] | None:
        """None: measured, not simulated."""
        return None

    def probe(self) -> dict[str, Any]:
        """This machine's processor and the versions of the target's runtimes (None: absent)."""
        return processor() | {
            "versions": {runtime: version(runtime) for runtime in self.capabilities.runtimes}
        }

    def how_to_install(self, runtime: str) -> str:
        """By pip, under the runtime's own name."""
        return f"pip install {runtime}"

    def check_runtime(self, name: str) -> tuple[str, str]:
        """Runtime and precision of a runtime's name.

        Raises:
            TargetError: they are none of the target's.
        """
        runtime, precision = split_runtime(name)
        found = self.capabilities
        if runtime not in found.runtimes or precision not in found.precisions:
            raise TargetError(
                f"target '{self.name}' has no runtime '{name}'; "
                f"expected one of: {', '.join(found.runtimes)}, in {', '.join(found.precisions)}"
            )
        return runtime, precision

    def check_build(self, build: Build) -> None:
        """Raises TargetError: ``build`` is none that the target can make, or int8 without images
        to calibrate with."""
        self.check_runtime(runtime_name(build.runtime, build.precision))
        if build.precision == "int8" and (build.calibration is None or not len(build.calibration)):
            raise TargetError(
                f"target '{self.name}': int8 needs images to calibrate with and there are none; "
                "set compile.calibration_images to a hundred or more"
            )


@contextmanager
def refusal(path: Path, runtime: str) -> Iterator[None]:
    """Turn whatever a runtime raises about ``path`` into a TargetError."""
    try:
        yield
    except (GreenpruneError, OSError):
        raise
    except Exception as error:  # each runtime has exceptions of its own
        # whole, on one line: OpenVINO names the node and the cause before its last line
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TargetError(
            f"{path}: expected a network that {runtime} {version(runtime)} accepts; it refuses: "
            f"{reason}; export it again with the versions installed here"
        ) from error


def processor(root: Path = Path("/")) -> dict[str, Any]:
    """Model, architecture, instruction sets and core count, read from ``root``/proc/cpuinfo.

    The model is None where the system does not tell.
    """
    fields: dict[str, str] = {}
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip().lower(), value.strip())
    flags = set(fields.get("flags", fields.get("features", "")).split())
    return {
        "cpu": fields.get("model name") or fields.get("hardware"),
        "architecture": platform.machine(),
        "isa": [flag for flag in ISA if flag in flags],
        "logical_cores": os.cpu_count(),
    }


def version(package: str) -> str | None:
    """Installed version of ``package``; None where it is absent."""
    from importlib import metadata  # slow to import, and a session asks for no version

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
