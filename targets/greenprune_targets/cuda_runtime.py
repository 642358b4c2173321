"""The CUDA runtime through cuda-python: every return code checked, and what GPU this is.

Tested with a fake runtime that has real memory; it has not run on NVIDIA hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from greenprune.errors import MissingPackageError, TargetError
from greenprune_targets.board import describe

MODULES = ("cuda.bindings.runtime", "cuda.cudart")
"""cuda-python from 12.6.1 on, and 12.6.0."""

ADVICE = {
    "cudaErrorMemoryAllocation": "out of GPU memory: close other programs or use a smaller batch",
    "cudaErrorInsufficientDriver": "update the NVIDIA driver, or install the cuda-python that "
    "matches its CUDA version",
    "cudaErrorNoDevice": "no GPU is visible: check the driver and CUDA_VISIBLE_DEVICES",
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The current device."""

    name: str
    sm: str
    """Compute capability, for example ``8.7``."""
    integrated: bool
    """It shares its memory with the processor, as on a Jetson."""


def cuda_runtime(root: Path = Path("/")) -> Any:
    """cuda-python's runtime module.

    Raises:
        MissingPackageError: cuda-python is not installed.
    """
    for module in MODULES:
        try:
            return import_module(module)
        except ImportError:
            continue
    raise MissingPackageError("cuda-python", extra(root))


def extra(root: Path) -> str:
    """The extra that brings this machine what it lacks."""
    return "jetson" if describe(root).is_jetson else "cuda"


def call(cuda: Any, function: str, *arguments: Any) -> Any:
    """What the runtime's ``function`` answers, without its return code.

    Raises:
        TargetError: the return code is not cudaSuccess; it is named. Or there is no driver.
    """
    try:
        answer = getattr(cuda, function)(*arguments)
    except RuntimeError as error:  # cuda-python 12 loads the driver at the first call
        raise TargetError(
            f"{function}: expected an NVIDIA driver, got: {error}; install the driver"
        ) from error
    return checked(cuda, function, answer)


def checked(cuda: Any, function: str, answer: tuple[Any, ...]) -> Any:
    """The values of an ``answer`` that begins with a return code; see :func:`call`."""
    code, *values = answer
    if code == cuda.cudaError_t.cudaSuccess:
        return values[0] if len(values) == 1 else tuple(values)
    name = _text(cuda.cudaGetErrorName(code)[1])
    advice = ADVICE.get(name, "start the program again, then the machine, if it stays")
    raise TargetError(
        f"{function}: expected cudaSuccess, got {name} "
        f"({_text(cuda.cudaGetErrorString(code)[1])}); {advice}"
    )


def current_gpu(cuda: Any) -> Gpu:
    """The device that this thread uses."""
    properties = call(cuda, "cudaGetDeviceProperties", call(cuda, "cudaGetDevice"))
    return Gpu(
        name=_text(properties.name),
        sm=f"{properties.major}.{properties.minor}",
        integrated=bool(properties.integrated),
    )


def free_bytes(cuda: Any, root: Path = Path("/")) -> int:
    """GPU memory that can be allocated now.

    Where processor and GPU share it, CUDA's figure leaves out the file cache, which the system
    gives back on demand, so MemAvailable decides (our reading of NVIDIA's note on Tegra memory).
    """
    free = int(call(cuda, "cudaMemGetInfo")[0])
    if not current_gpu(cuda).integrated:
        return free
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = dict(line.split(":", 1) for line in lines if ":" in line)["MemAvailable"]
        return int(available.split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return free


def _text(value: Any) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else str(value)
