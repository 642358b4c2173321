"""Targets by name, loaded when asked for; what a target and a runner are (device side)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import TargetError

TARGETS = {
    "x86": "greenprune_targets.x86:X86",
    "arm": "greenprune_targets.arm:Arm",
    "cuda": "greenprune_targets.cuda:Cuda",
    "jetson-orin-nano": "greenprune_targets.jetson:OrinNano",
    "jetson-orin-nx": "greenprune_targets.jetson:OrinNx",
    "jetson-agx-orin": "greenprune_targets.jetson:AgxOrin",
    "jetson-thor": "greenprune_targets.jetson:Thor",
    "eyeriss": "greenprune_targets.eyeriss:Eyeriss",
}
ALIASES = {"jetson": "jetson-orin-nano"}
ENTRY_POINTS = "greenprune.targets"
PRECISIONS = ("fp32", "fp16", "int8")
"""From the widest to the narrowest."""


def runtime_name(runtime: str, precision: str) -> str:
    """How artifacts of a runtime and precision are called: ``openvino``, ``openvino-int8``."""
    return runtime if precision == PRECISIONS[0] else f"{runtime}-{precision}"


def split_runtime(name: str) -> tuple[str, str]:
    """Runtime and precision of a name that :func:`runtime_name` made."""
    for precision in PRECISIONS[1:]:
        if name.endswith(f"-{precision}"):
            return name.removesuffix(f"-{precision}"), precision
    return name, PRECISIONS[0]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a target can do; readable without its runtimes."""

    precisions: tuple[str, ...]
    runtimes: tuple[str, ...]
    """In order of preference."""
    opset: int
    """ONNX opset that graphs for it are written in."""
    width_multiple: int
    """Channel counts on multiples of this use its kernels fully."""
    meters: tuple[str, ...]
    """Energy meters that it may have."""
    machines: tuple[str, ...]
    """``platform.machine()`` of the machines that it runs on."""
    built_on_device: bool = False
    """Artifacts are graphs that any machine can make and check; the device compiles them itself."""
    status: str = "ready"
    """``ready``, and what its users should know of it."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a graph is to become."""

    runtime: str
    """One of the target's, without precision."""
    precision: str = "fp32"
    calibration: NDArray[np.float32] | None = None
    """Prepared inputs [N, C, H, W]; int8 needs them."""
    keep_float: tuple[str, ...] = ()
    """Names of the graph's nodes that int8 leaves in floating point."""


class Runner(Protocol):
    """A compiled network, opened. ``run`` may be called from several threads at once."""

    input_name: str
    output_names: tuple[str, ...]

    def run(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Outputs by name, the batch first, of float32 inputs [N, C, H, W]."""
        ...

    def close(self) -> None:
        """Give the memory back; no ``run`` after it."""
        ...


class Target(Protocol):
    """A kind of device: data plus few methods. Checks are in the callers
    (:mod:`greenprune.runtime.runners`)."""

    name: str
    description: str
    capabilities: Capabilities

    def runtimes_here(self) -> tuple[str, ...]:
        """Those of the target's runtimes that are installed on this machine."""
        ...

    def is_here(self) -> bool:
        """Whether this machine is such a device: only there is anything measured or certified."""
        ...

    def compile(self, graph: Path, build: Build, folder: Path, name: str) -> Path:
        """Compile an ONNX graph into ``folder``; the artifact's main file, ``<name>.<suffix>``."""
        ...

    def open(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Open an artifact; ``runtime`` is its :func:`runtime_name`, 0 threads means one for each
        core."""
        ...

    def open_on_host(self, artifact: Path, runtime: str, threads: int) -> Runner:
        """Open it where it was compiled, to check its answers: by a runtime that stands in for the
        device's where that is not here."""
        ...

    def layer_precisions(self, artifact: Path, runtime: str) -> dict[str, str]:
        """What each convolution and matrix product of an opened int8 artifact really computes in,
        by the runtime's own graph: layer to ``int8``, ``fp32`` ..."""
        ...

    def readme(self) -> str | None:
        """What a bundle says to whoever brings it to the device, Markdown; None: nothing."""
        ...

    def simulated_energy(self, artifact: Path) -> dict[str, Any] | None:
        """``{energy_mac_units, provenance}`` of one inference, relative, where the target is a
        simulation; None where energy must be measured."""
        ...

    def probe(self) -> dict[str, Any]:
        """This machine, as the target sees it: processor, instruction sets, versions."""
        ...

    def arithmetic(self, precision: str) -> str:
        """What of this machine, beside runtime and precision, decides about answers: a certificate
        holds for it alone; mostly empty."""
        ...

    def how_to_install(self, runtime: str) -> str:
        """The command that brings a runtime of the target to this machine."""
        ...


def device_kind(target: Target) -> str:
    """The machines of a target, for messages: ``aarch64``, ``x86_64 or aarch64 with tensorrt``."""
    found = target.capabilities
    kind = " or ".join(found.machines)
    return f"{kind} with {' or '.join(found.runtimes)}" if found.built_on_device else kind


def available_targets() -> dict[str, str]:
    """Every target's name and ``module:class``: the built-in ones, then other packages' (entry
    points of the group ``greenprune.targets``), which cannot take a built-in name."""
    from importlib.metadata import entry_points

    others = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    return TARGETS | {name: place for name, place in others.items() if name not in TARGETS}


def load_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        TargetError: there is none of that name, or its package does not load.
    """
    name = ALIASES.get(name, name)
    place = TARGETS.get(name) or available_targets().get(name)
    if place is None:
        known = sorted({*available_targets(), *ALIASES})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise TargetError(f"unknown target '{name}'{hint}; expected one of: {', '.join(known)}")
    module, _, attribute = place.partition(":")
    try:
        target = getattr(import_module(module), attribute)()
    except Exception as error:  # another package's code: whatever stops it, the others stay
        raise TargetError(
            f"target '{name}': {place} cannot be loaded: {error}; install its package again"
        ) from error
    _check_target(target, name, place)
    return cast(Target, target)


def _check_target(target: Any, name: str, place: str) -> None:
    """Raises TargetError, with what is missing, where a package's class is no :class:`Target`."""
    methods = (key for key, value in vars(Target).items() if callable(value) and key[0] != "_")
    missing = [key for key in (*Target.__annotations__, *methods) if not hasattr(target, key)]
    if missing:
        raise TargetError(
            f"target '{name}': {place} lacks {', '.join(missing)}; expected all that "
            "greenprune.registry.Target names: see docs/targets.md"
        )
    if target.name != name or not isinstance(target.capabilities, Capabilities):
        raise TargetError(
            f"target '{name}': {place}: expected the name '{name}', as its entry point has it, and "
            f"greenprune.registry.Capabilities; found '{target.name}' and "
            f"{type(target.capabilities).__name__}"
        )
