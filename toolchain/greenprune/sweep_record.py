"""What a sweep found: its points, as ``sweep.json`` keeps them, their fronts, and the best of them.

A *candidate* is a pruned variant of a finished point: ``mild``, ``aggressive`` or ``pair``. Its
latency is the mean on the bundle's own runtime, as a pair's median hides the inputs that both
networks answer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from greenprune import front, schema, storage
from greenprune.bundle import Provenance
from greenprune.errors import RunError

SWEEP_FILE = "sweep.json"
POINT_FILE = "point.json"
CANDIDATES = ("mild", "aggressive", "pair")
OBJECTIVES = ("accuracy lost", "latency", "energy", "bytes")


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Millijoules of an inference, and where they come from."""

    value: float
    low: float
    high: float
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One variant of one point."""

    accuracy: float
    """On the test images, by the deployed artifacts; reported, never chosen by."""
    development_accuracy: float
    """On the development images, by the same artifacts; what fronts and :func:`best` go by."""
    macs: int
    params: int
    bytes: int
    """Of its artifact for the bundle's runtime; the pair has two."""
    latency_ms: dict[str, dict[str, float]]
    """Runtime to ``mean`` and ``p50``."""
    latency_share: float
    """Of the dense network's mean on the runtime that it is fastest on, paired by block in the same
    run, so that what changed on the machine from run to run falls out."""
    energy_mj: Energy | None
    """None: not measured."""
    energy_share: float | None
    """Of the dense network's, paired likewise; None: not measured."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A finished point: ``point.json`` in its folder."""

    runtime: str
    """The bundle's, which the front's latencies and joules are of."""
    threshold: float | None
    """Where the pair operates; None: nothing is accepted."""
    machine: str
    preset: str
    valid: bool
    """Whether the measurement is, by its own rules."""
    bundle_started: str
    """When the bundle's stage began: what :func:`greenprune.pick.pick` knows the bundle by."""
    variants: dict[str, Figures]
    """``dense``, ``mild``, ``aggressive`` and ``pair``."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One target and one set of budgets; a run of its own in the sweep's folder."""

    name: str
    target: str
    budgets: tuple[str, ...]
    state: Literal["waiting", "done", "failed"] = "waiting"
    error: str | None = None
    measured: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """``sweep.json``."""

    name: str
    recipe: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One dot of the front."""

    point: str
    variant: str
    measured: Measured = field(repr=False)

    @property
    def figures(self) -> Figures:
        return self.measured.variants[self.variant]

    @property
    def dense(self) -> Figures:
        """The dense network, measured in the same run."""
        return self.measured.variants["dense"]

    @property
    def name(self) -> str:
        return f"{self.point}/{self.variant}"

    @property
    def mean_ms(self) -> float:
        return self.figures.latency_ms[self.measured.runtime]["mean"]

    @property
    def costs(self) -> tuple[float, float | None, float]:
        """Latency, energy and bytes over those of the dense network; None: not measured."""
        figures = self.figures
        return figures.latency_share, figures.energy_share, figures.bytes / self.dense.bytes

    @property
    def loss(self) -> float:
        """Accuracy of the dense network less this one's, on the development images."""
        return self.dense.development_accuracy - self.figures.development_accuracy


@dataclass(frozen=True, kw_only=True)
class Front:
    """The candidates of one target, compared."""

    target: str
    objectives: tuple[str, ...]
    left_out: dict[str, str]
    """Objective to the reason why it is not compared by, for any candidate."""
    candidates: tuple[Candidate, ...]
    chosen: tuple[bool, ...]
    """Which of them no other dominates."""
    hypervolume: float
    """See :mod:`greenprune.front`; comparable between sweeps of the same objectives."""
    knee: int | None
    """Index of a candidate."""


def read(folder: Path) -> Sweep:
    """``sweep.json`` of a sweep's folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.is_file():
        raise RunError(f"{folder}: not a sweep; expected a folder that `greenprune sweep` made")
    return schema.decode(_json(path), Sweep, str(path), RunError)


def read_point(folder: Path) -> Measured:
    """``point.json`` of a finished point's folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = folder / POINT_FILE
    return schema.decode(_json(path), Measured, str(path), RunError)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: expected JSON, got {error}; remove the file and run the sweep again"
        ) from error


def write(folder: Path, sweep: Sweep) -> None:
    """Write ``sweep.json``, whole or not at all."""
    storage.write_json(folder / SWEEP_FILE, schema.encode(sweep))


def candidates(sweep: Sweep, target: str) -> tuple[Candidate, ...]:
    """Of the finished points of a target, in the sweep's order."""
    return tuple(
        Candidate(point=point.name, variant=variant, measured=point.measured)
        for point in sweep.points
        if point.target == target and point.measured is not None
        for variant in CANDIDATES
    )


def fronts(sweep: Sweep) -> list[Front]:
    """One for each target that has a finished point."""
    targets = dict.fromkeys(point.target for point in sweep.points if point.measured is not None)
    return [_front(target, candidates(sweep, target)) for target in targets]


def _front(target: str, found: tuple[Candidate, ...]) -> Front:
    left_out = _left_out(found)
    kept = [place for place, name in enumerate(OBJECTIVES[1:]) if name not in left_out]
    costs = np.array([[each.costs[place] for place in kept] for each in found], dtype=np.float64)
    values = front.normalised([each.loss for each in found], costs)
    reference = np.ones(values.shape[1])
    return Front(
        target=target,
        objectives=tuple(name for name in OBJECTIVES if name not in left_out),
        left_out=left_out,
        candidates=found,
        chosen=tuple(bool(each) for each in front.pareto(values)),
        hypervolume=front.hypervolume(values, reference),
        knee=front.knee(values, reference),
    )


def _left_out(found: tuple[Candidate, ...]) -> dict[str, str]:
    gaps = sum(each.costs[1] is None for each in found)
    if gaps:
        return {"energy": f"not measured for {gaps} of {len(found)} candidates"}
    kinds = {each.figures.energy_mj.provenance for each in found if each.figures.energy_mj}
    if kinds == {"estimated_model"}:
        return {"energy": "estimated from CPU time alone, which the latency tells already"}
    if len(kinds) > 1:
        return {"energy": f"of different provenance: {', '.join(sorted(kinds))}"}
    return {}


def best(
    sweep: Sweep,
    target: str,
    *,
    latency_ms: float | None = None,
    energy_mj: float | None = None,
    bytes: int | None = None,
    accuracy: float | None = None,
) -> Candidate:
    """The most accurate candidate within all limits; with ``accuracy`` alone, the fastest.

    Accuracy here is on the development images: the test images are never chosen by. Of equally
    accurate ones it is the fastest.

    Raises:
        RunError: no limit; no candidate; or none within the limits, with the closest one named.
    """
    limits = {"latency_ms": latency_ms, "energy_mj": energy_mj, "bytes": bytes}
    most = {key: float(value) for key, value in limits.items() if value is not None}
    for key, value in most.items():
        if not (value > 0 and math.isfinite(value)):
            raise RunError(f"{key} <= {value:g}: expected a limit above zero, such as --latency 5")
    if not most and accuracy is None:
        raise RunError("nothing to pick by: expected a limit, such as --latency 5")
    known = [
        each
        for each in candidates(sweep, target)
        if energy_mj is None or each.figures.energy_mj is not None
    ]
    if not known:
        raise RunError(
            f"sweep '{sweep.name}', target '{target}': no finished point"
            f"{'' if energy_mj is None else ' whose joules were measured'} to pick from; run the "
            "sweep to its end, or leave the limit out"
        )
    excesses = {each.name: _excess(each, most, accuracy) for each in known}
    within = [each for each in known if excesses[each.name] <= 1.0]
    if not within:
        near = min(known, key=lambda each: excesses[each.name])
        raise RunError(
            f"no candidate of sweep '{sweep.name}' on '{target}' keeps "
            f"{_limits(most, accuracy)}; the closest is {near.name} with {describe(near)}; loosen "
            "the limit, or sweep with tighter budgets"
        )
    if not most:
        return min(within, key=lambda each: each.mean_ms)
    return max(within, key=lambda each: (each.figures.development_accuracy, -each.mean_ms))


def _excess(candidate: Candidate, most: dict[str, float], accuracy: float | None) -> float:
    """How far beyond the worst limit it is, as a ratio; at most 1 where all are kept."""
    figures = candidate.figures
    own = {
        "latency_ms": candidate.mean_ms,
        "energy_mj": figures.energy_mj.value if figures.energy_mj else float("inf"),
        "bytes": float(figures.bytes),
    }
    ratios = [own[key] / limit for key, limit in most.items()]
    if accuracy is not None:
        ratios.append(accuracy / max(figures.development_accuracy, 1e-9))
    return max(ratios)


def _limits(most: dict[str, float], accuracy: float | None) -> str:
    told = [f"{key} <= {limit:g}" for key, limit in most.items()]
    if accuracy is not None:
        told.append(f"development accuracy >= {accuracy:g}")
    return ", ".join(told)


def describe(candidate: Candidate) -> str:
    """Its figures in one line."""
    figures = candidate.figures
    told = [f"{candidate.mean_ms:.4g} ms on {candidate.measured.runtime}"]
    if figures.energy_mj is not None:
        told.append(f"{figures.energy_mj.value:.4g} mJ ({figures.energy_mj.provenance})")
    told += [
        f"{figures.bytes:,} bytes",
        f"accuracy {figures.accuracy:.2%} on the test images",
        f"{figures.development_accuracy:.2%} on the development images",
    ]
    return ", ".join(told)
