"""The best point of a sweep within the user's limits, as a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from greenprune import api, pipeline, sweep_record
from greenprune import recipe as recipes
from greenprune.errors import RunError
from greenprune.sweep_record import Candidate


@dataclass(frozen=True, kw_only=True)
class Picked:
    """A bundle, and how to use it."""

    candidate: Candidate
    bundle: Path

    @property
    def threshold(self) -> float | None:
        """Where the pair operates; None for a network alone, and where the pair accepts nothing."""
        return self.candidate.measured.threshold if self.candidate.variant == "pair" else None


def pick(
    folder: Path,
    *,
    latency_ms: float | None = None,
    energy_mj: float | None = None,
    bytes: int | None = None,
    accuracy: float | None = None,
    target: str | None = None,
    output: Path | None = None,
) -> Picked:
    """Export the most accurate candidate within all limits; with ``accuracy`` alone, the fastest.

    Args:
        folder: a sweep's.
        latency_ms: the most that an inference may take on average.
        energy_mj: the most that it may take in millijoules.
        bytes: the most that its artifacts may be.
        accuracy: the least on the development images, as a fraction.
        target: None: the sweep's only one.
        output: the bundle's folder; by default ``<sweep>-<point>.bundle``.

    Raises:
        RunError: no sweep, no limit, several targets and none named, or no candidate within the
            limits, and then the closest is named; the chosen point's run was changed since.
        BundleError: the point's bundle is damaged.
        StorageError: ``output`` exists and is not a bundle.
    """
    sweep = sweep_record.read(folder)
    targets = list(dict.fromkeys(point.target for point in sweep.points))
    if target is None and len(targets) == 1:
        target = targets[0]
    if target not in targets:
        raise RunError(
            f"{folder}: expected one of the sweep's targets ({', '.join(targets)}), got "
            f"{target or 'none'}; name it with --target"
        )
    chosen = sweep_record.best(
        sweep, target, latency_ms=latency_ms, energy_mj=energy_mj, bytes=bytes, accuracy=accuracy
    )
    # the bundle that was measured, as it is: built again it might race and certify otherwise
    run = folder / chosen.point
    job = pipeline.Job(recipes.read_back(run / pipeline.RUN_FILE), run)
    if pipeline.started(job.place(job.bundle_stage)) != chosen.measured.bundle_started:
        raise RunError(
            f"{run}: was changed after the sweep '{sweep.name}' measured it, so that its bundle is "
            "not the one that these figures are of; run the sweep again with the same command"
        )
    destination = output or Path(f"{sweep.name}-{chosen.point}.bundle")
    made = api.copy_bundle(job.bundle, destination)
    return Picked(candidate=chosen, bundle=made)
