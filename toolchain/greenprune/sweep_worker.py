"""What a sweep's workers do: each function runs in a process that Ray started.

All return None, or what went wrong; what they make is on the disk.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from greenprune import api, bundle, pipeline, schema, storage, sweep_cluster, sweep_record
from greenprune import recipe as recipes
from greenprune.cores import usable_cores
from greenprune.errors import GreenpruneError, MeasurementError, RunError, TargetError
from greenprune.harness import cost_table
from greenprune.harness.summary import energy_ratio, latency_ratio, mean_latencies_ms
from greenprune.pipeline import Job
from greenprune.recipe import Recipe, VariantSettings
from greenprune.registry import device_kind, load_target
from greenprune.sweep_points import BASE
from greenprune.sweep_record import POINT_FILE, Energy, Figures, Measured

if TYPE_CHECKING:
    from greenprune.harness import Results
    from greenprune.harness.results import Candidate

SHARED = ("train", "sparsify")
"""Stages that no budget and no target changes."""
ERROR_FILE = "error.txt"


def on_node(function: Callable[..., str | None], *arguments: Any) -> tuple[str, str | None]:
    """The node that this runs on, and what the function returns."""
    import ray

    return ray.get_runtime_context().get_node_id(), function(*arguments)


def check(recipe: dict[str, Any], folder: str) -> str | None:
    """Say what can be said of a point before anything is trained."""
    from greenprune import prune_budget

    def work() -> None:
        job = Job(_recipe(recipe), Path(folder))
        device = load_target(job.recipe.compile.target)
        if not device.is_here():
            raise TargetError(
                f"target '{device.name}': a point of a sweep ends with a measurement, expected a "
                f"worker that is {device_kind(device)}, this machine is none; leave the target "
                "out, or sweep with --address on a cluster of such"
            )
        prune_budget.preflight(job)

    return _told(Path(folder), work)


def train_base(recipe: dict[str, Any], folder: str) -> str | None:
    """Train and sparsify, once for all points; the recipe is that of any of them."""

    def work() -> None:
        own = _recipe(recipe)
        # no point's budget: one that is out of reach is that point's failure alone
        unpruned = replace(
            own.prune, mild=VariantSettings(macs=1.0), aggressive=VariantSettings(macs=0.99)
        )
        job = Job(replace(own, name=BASE, prune=unpruned), Path(folder))
        _execute(job, SHARED[-1], own.threads or usable_cores())

    return _told(Path(folder), work)


def advance(recipe: dict[str, Any], folder: str, last: str, shares: bool) -> str | None:
    """Bring a point's run as far as the stage ``last``; ``shares``: the node, with other tasks."""

    def work() -> None:
        job = Job(_recipe(recipe), Path(folder), alone=not shares)
        for left in (POINT_FILE, ERROR_FILE):
            (job.folder / left).unlink(missing_ok=True)
        take_over(job.folder.parent / BASE, job.folder)
        most = sweep_cluster.threads_of_a_task() if shares else usable_cores()
        _execute(job, last, min(job.recipe.threads or most, most))

    return _told(Path(folder), work)


def finish(recipe: dict[str, Any], folder: str) -> str | None:
    """Bring a point's run to its end, and write ``point.json``."""

    def work() -> None:
        job = Job(_recipe(recipe), Path(folder))
        summary = api.run(job.recipe, runs=job.folder.parent, name=job.folder.name)
        measured = schema.encode(_measured(job, summary))
        storage.write_json(job.folder / POINT_FILE, measured)

    return _told(Path(folder), work)


def _recipe(content: dict[str, Any]) -> Recipe:
    return schema.decode(content, Recipe, "the sweep's recipe", RunError)


def _execute(job: Job, last: str, threads: int) -> None:
    import torch

    from greenprune import stages

    torch.set_num_threads(threads)
    made = stages.of(job.recipe)
    names = [stage.name for stage in made]
    pipeline.execute(job, made[: names.index(last) + 1])


def _told(folder: Path, work: Callable[[], None]) -> str | None:
    """Nothing that goes wrong with one point may stop the others."""
    try:
        work()
    except GreenpruneError as error:
        return str(error)
    except Exception as error:
        storage.write_text(folder / ERROR_FILE, traceback.format_exc())
        return f"{type(error).__name__}: {error} (a defect; see {folder / ERROR_FILE})"
    return None


def take_over(base: Path, folder: Path) -> None:
    """Copy what the base run has finished and the point's has not, stage by stage."""
    for stage in SHARED:
        made, there = (pipeline.read_stage(run / stage) for run in (base, folder))
        if made and (there is None or there["inputs_sha256"] != made["inputs_sha256"]):
            with storage.atomic_folder(folder / stage) as temporary:
                shutil.copytree(base / stage, temporary, dirs_exist_ok=True)


def is_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether a point's run is complete, by this recipe and from the base run and the cost table as
    they are now."""
    from greenprune import prune_budget

    try:
        sweep_record.read_point(folder)
        if recipes.read_back(folder / pipeline.RUN_FILE) != recipe:
            return False
        carried = recipe.prune.cost_table
        if carried is not None and prune_budget.is_asked(recipe) and Path(carried).is_file():
            priced = cost_table.read(folder / prune_budget.STAGE / prune_budget.TABLE)
            if cost_table.read(Path(carried)).costs != priced.costs:
                return False
        made, there = (
            pipeline.read_stage(run / SHARED[-1]) for run in (folder.parent / BASE, folder)
        )
        from_base = made and there and made["inputs_sha256"] == there["inputs_sha256"]
        return bool(from_base) and pipeline.is_current(folder, f"report-{recipe.compile.target}")
    except (RunError, MeasurementError):  # damaged: the point is made again, or fails by itself
        return False


def _measured(job: Job, summary: dict[str, Any]) -> Measured:
    from greenprune import deployment

    manifest = bundle.open_bundle(deployment.bundle_folder(job)).manifest
    results = deployment.results_of(job)
    on_runtime = {
        found.variant: found for found in results.candidates if found.runtime == manifest.runtime
    }
    # one yardstick for all points of a machine, whichever runtime a point's bundle takes
    dense = min(
        (found for found in results.candidates if found.variant == "dense"),
        key=lambda found: float(np.median(mean_latencies_ms(found.windows))),
    )
    sizes = {name: _bytes(manifest, name) for name in bundle.VARIANTS}
    sizes["pair"] = sizes["mild"] + sizes["aggressive"]
    sizes["dense"] = manifest.files[manifest.variants["dense"].graph].bytes
    chosen_by = _development_accuracy(job)
    return Measured(
        runtime=manifest.runtime,
        threshold=summary["certificate"]["threshold"],
        machine=_machine(results),
        preset=results.preset,
        valid=results.verdict.valid,
        bundle_started=pipeline.started(job.place(job.bundle_stage)),
        variants={
            name: Figures(
                accuracy=found["accuracy"],
                development_accuracy=chosen_by[name],
                macs=found["macs"],
                params=found["params"],
                bytes=sizes[name],
                latency_ms={
                    runtime: {key: latency[key] for key in ("mean", "p50")}
                    for runtime, latency in found["latency_ms"].items()
                },
                latency_share=latency_ratio(on_runtime[name].windows, dense.windows).value,
                energy_mj=Energy(**found["energy_mj"]) if found["energy_mj"] else None,
                energy_share=_energy_share(on_runtime[name], dense),
            )
            for name, found in summary["variants"].items()
        },
    )


def _energy_share(found: Candidate, dense: Candidate) -> float | None:
    ratio = energy_ratio(found.windows, dense.windows)
    return None if ratio is None else ratio.value


def _machine(results: Results) -> str:
    before = results.environment_before
    return f"{before.get('cpu') or 'an unnamed processor'}, {results.threads} threads"


def _bytes(manifest: bundle.Manifest, variant: str) -> int:
    """Of the files that a session of the bundle's runtime opens; of the graph where the artifact is
    made on the device."""
    described = manifest.variants[variant]
    path = PurePosixPath(described.artifacts.get(manifest.runtime, described.graph))
    stem = f"{path.with_suffix('')}."
    return sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(stem))


def _development_accuracy(job: Job) -> dict[str, float]:
    """Of each variant's artifact, and of the pair at its threshold."""
    from greenprune import compilation, deployment
    from greenprune.runtime import decide

    split = job.data.development
    deployed = deployment.answers(job, split)
    right = {
        name: compilation.right(job, found["logits"], split) for name, found in deployed.items()
    }
    threshold = job.results(f"certify-{job.recipe.compile.target}")["threshold"]
    accepted = decide(deployed["aggressive"]["score"], threshold)
    right["pair"] = np.where(accepted, right["aggressive"], right["mild"])
    return {name: float(values.mean()) for name, values in right.items()}
