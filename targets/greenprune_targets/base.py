"""What the pages of the targets share: looking at the machine, runtimes, honest refusals."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from greenprune.errors import GreenpruneError, NotAvailableError, TargetError
from greenprune.registry import Capabilities, Runner

X86_ISA = ("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8")
ARM_ISA = ("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")
ISA = (*X86_ISA, *ARM_ISA)
"""Processor flags that decide which kernels a runtime picks."""


class BaseTarget:
    """Common part of the targets; a page gives the data and overrides what it can do."""

    name: ClassVar[str]
    description: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def runtimes_here(self) -> tuple[str, ...]:
        """Those of the target's runtimes that are installed on this machine."""
        return tuple(runtime for runtime in self.capabilities.runtimes if find_spec(runtime))

    def compile(self, graph: Path, runtime: str, folder: Path, name: str) -> Path:
        """Refuse: this target compiles nothing yet."""
        raise NotAvailableError(self._missing())

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Refuse: this target opens nothing yet."""
        raise NotAvailableError(self._missing())

    def simulated_energy(self, artifact: Path) -> dict[str, Any] | None:
        """None: measured, not simulated."""
        return None

    def probe(self) -> dict[str, Any]:
        """This machine's processor and the versions of the target's runtimes (None: absent)."""
        return processor() | {
            "versions": {runtime: version(runtime) for runtime in self.capabilities.runtimes}
        }

    def check_runtime(self, runtime: str) -> None:
        """Raises TargetError: ``runtime`` is none of the target's."""
        if runtime not in self.capabilities.runtimes:
            raise TargetError(
                f"target '{self.name}' has no runtime '{runtime}'; "
                f"expected one of: {', '.join(self.capabilities.runtimes)}"
            )

    def _missing(self) -> str:
        return f"{self.name}: {self.capabilities.status.removeprefix('not available yet: ')}"


@contextmanager
def refusal(path: Path, runtime: str) -> Iterator[None]:
    """Turn whatever a runtime raises about ``path`` into a TargetError."""
    try:
        yield
    except (GreenpruneError, OSError):
        raise
    except Exception as error:  # each runtime has exceptions of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TargetError(
            f"{path}: expected a network that {runtime} {version(runtime)} accepts; it refuses: "
            f"{reason[-1]}; export it again with the versions installed here"
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
