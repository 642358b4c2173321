"""The folder of graphs that a cost table is measured from, and whether it is whole."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from greenprune import schema
from greenprune.errors import MeasurementError
from greenprune.harness.cost_table import LayerShape

PLAN = "probe.json"
ARTIFACTS = "artifacts"
PLAN_VERSION = 1
PLAN_KIND = "greenprune-cost-probe"


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One compiled graph: so many layers of one shape."""

    layers: int
    artifact: str
    """Its main file, relative to the folder."""
    input_shape: tuple[int, ...]
    """Of a batch of 1; the device draws the values."""


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """Two widths, and the chains that tell their cost: of few layers, and of many."""

    in_width: int
    out_width: int
    chains: tuple[Chain, ...]


@dataclass(frozen=True, kw_only=True)
class ProbeShape:
    """A layer's shape at the widths to be measured."""

    shape: LayerShape
    mirrored: bool
    """The chains alternate between the layer and its mirror (in and out exchanged)."""
    points: tuple[ProbePoint, ...]


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """``probe.json``: what is to be measured on the device."""

    schema_version: int = PLAN_VERSION
    kind: str = PLAN_KIND
    target: str
    runtime: str
    """By :func:`greenprune.registry.runtime_name`: the precision is in it."""
    network: str
    shapes: tuple[ProbeShape, ...]
    block: ProbeShape | None
    """One shape at every width (in = out), to find the block width by; not part of the grid."""
    files: dict[str, str]
    """Every file under ``artifacts/``, relative to the folder, with its SHA-256."""


def read_plan(folder: Path) -> ProbePlan:
    """Read a folder of graphs and check all of it: the schema, every path and every checksum.

    Raises:
        MeasurementError: no such folder; ``probe.json`` is damaged, of another schema or in
            contradiction with itself; a file is missing, changed, not listed or outside.
    """
    where = folder / PLAN
    try:
        content = msgspec.json.decode(where.read_bytes())
    except OSError as error:
        raise MeasurementError(
            f"{folder}: expected a folder of graphs to measure, with {PLAN}: "
            f"{error.strerror or error}; have the host write it again, or copy all of it"
        ) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise MeasurementError(f"{where}: not valid JSON: {error}; copy it again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    kind = content.get("kind") if isinstance(content, dict) else None
    if (kind, version) != (PLAN_KIND, PLAN_VERSION):
        raise MeasurementError(
            f"{where}: expected kind '{PLAN_KIND}' of schema {PLAN_VERSION}, found kind {kind!r} "
            f"of schema {version}; write the folder again with this version of greenprune"
        )
    plan = schema.decode(content, ProbePlan, str(where), MeasurementError)
    for shape in (*plan.shapes, *((plan.block,) if plan.block else ())):
        _check_shape(shape, plan, where)
    _check_files(folder, plan, where)
    return plan


def _check_shape(probe: ProbeShape, plan: ProbePlan, where: Path) -> None:
    seen = set()
    for point in probe.points:
        widths = (point.in_width, point.out_width)
        name = f"{where}: {probe.shape.operator} {widths[0]} to {widths[1]}"
        layers = [chain.layers for chain in point.chains]
        if min(widths) < 1 or widths in seen:
            raise MeasurementError(f"{name}: expected widths of 1 and more, each pair once")
        if len(layers) != 2 or not 1 <= layers[0] < layers[1]:
            raise MeasurementError(
                f"{name}: expected two chains, of few and of more layers; found {layers}"
            )
        for chain in point.chains:
            if chain.input_shape[:1] != (1,) or min(chain.input_shape) < 1:
                raise MeasurementError(
                    f"{name}: expected the input shape of a batch of 1, found "
                    f"{list(chain.input_shape)}"
                )
            if chain.artifact not in plan.files:
                raise MeasurementError(f"{name}: '{chain.artifact}' is not among its 'files'")
        seen.add(widths)
    if not probe.points:
        raise MeasurementError(f"{where}: a {probe.shape.operator} without points to measure")


def _check_files(folder: Path, plan: ProbePlan, where: Path) -> None:
    """Nothing is opened that is not listed: a runtime finds companions by their names."""
    for name, expected in plan.files.items():
        parts = PurePosixPath(name).parts
        path = folder / name
        if (
            parts[:1] != (ARTIFACTS,)
            or ".." in parts
            or any(sign in name for sign in "\\:\0")
            or not path.resolve().is_relative_to(folder.resolve())
        ):
            raise MeasurementError(
                f"{where}: unsafe path {name!r}: expected one inside {ARTIFACTS}/; do not use this "
                "folder"
            )
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise MeasurementError(
                f"{path}: cannot be read: {error.strerror or error}; copy the whole folder again"
            ) from error
        if found != expected:
            raise MeasurementError(
                f"{path}: expected SHA-256 {expected}, found {found}; the file is damaged or was "
                "changed: copy the folder again"
            )
    present = (path for path in (folder / ARTIFACTS).rglob("*") if not path.is_dir())
    extra = sorted({path.relative_to(folder).as_posix() for path in present} - set(plan.files))
    if extra:
        raise MeasurementError(
            f"{folder / extra[0]}: not listed in {PLAN}; expected listed files alone: remove it, "
            "or copy the folder again"
        )
