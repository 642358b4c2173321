"""The public functions; every command is a thin page over one of these."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenprune import bundle as bundles
from greenprune import processes, schema, storage
from greenprune import recipe as recipes
from greenprune.cores import usable_cores
from greenprune.errors import MissingPackageError, RecipeError, RunError, StorageError
from greenprune.harness import Results
from greenprune.harness import bench as bench
from greenprune.pipeline import LEDGER_FILE, RUN_FILE, Job, execute, is_current
from greenprune.recipe import CompileSettings, Recipe
from greenprune.registry import ALIASES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from greenprune.nncec.account import Account
    from greenprune.nncec.factors import Factor
    from greenprune.nncec.life import Embodied, Fleet
    from greenprune.pruning.surgery import Explanation

RUNS = Path("runs")


def run(
    recipe: Recipe | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    runs: Path = RUNS,
    name: str | None = None,
) -> dict[str, Any]:
    """The whole way: from a recipe to a measured bundle, an account and a report.

    Args:
        recipe: a :class:`Recipe`, a TOML file, a built-in recipe's name; None: ``lenet5-digits``.
        overrides: ``"section.key=value"`` strings.
        runs: the folder that holds all runs.
        name: the run's folder name; the recipe's name by default.

    Returns:
        The summary that ``greenprune run --json`` prints; also ``summary.json`` in the run. Under
        torchrun the first process returns it, and the others, which help it to train, ``{}``.

    Raises:
        GreenpruneError: with what was expected, what came and what to do.
    """
    job = open_job(recipe, overrides=overrides, runs=runs, name=name)
    from greenprune import compilation, stages, summary

    compilation.runtimes(job)
    compilation.check_measurable(job)
    _use_threads(job.recipe.threads)
    execute(job, stages.of(job.recipe))
    if not processes.is_first():
        return {}
    made = summary.summarise(job)
    storage.write_json(job.folder / "summary.json", made)
    return made


def prune(
    recipe: Recipe | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    runs: Path = RUNS,
    name: str | None = None,
) -> dict[str, Any]:
    """The same way as :func:`run`, up to the fine-tuned networks, which are in the run's folder."""
    job = open_job(recipe, overrides=overrides, runs=runs, name=name)
    from greenprune import compilation, stage_parts, stages

    compilation.runtimes(job)
    _use_threads(job.recipe.threads)
    execute(job, stages.host_stages(job.recipe))
    if not processes.is_first():
        return {}
    return {
        "run": str(job.folder),
        "variants": {
            variant: {
                **{key: job.results(stage)[key] for key in ("accuracy", "macs", "params")},
                "network": str(job.place(stage) / stage_parts.NETWORK),
            }
            for variant, stage in (
                ("dense", "train"),
                ("mild", "finetune-mild"),
                ("aggressive", "finetune-aggressive"),
            )
        },
    }


def prune_network(
    network: nn.Module,
    images: Tensor,
    *,
    macs: float = 0.5,
    method: str = "drp",
    width_multiple: int = 8,
) -> nn.Module:
    """Prune a network in memory, in one shot, with the mask proof; fine-tune it afterwards.

    Args:
        network: in eval mode, on the CPU.
        images: normalised inputs to score with, float32 [N, C, H, W], N >= 2.
        macs: share of the MACs that may stay.
        method: of :func:`greenprune.pruning.scores.measure`; ``taylor`` needs targets and is
            refused here.
        width_multiple: kept widths are multiples of this.

    Raises:
        PruningError: the network cannot be traced, or the budget is out of reach.
        ProofError: the compact network is not equal to the masked one.
    """
    from greenprune.pruning import budget, surgery
    from greenprune.pruning.scores import measure

    analysis = surgery.analyse_and_try(network, images[:2])
    scores = measure(network, analysis, images, method=method).scores
    removed = budget.choose(analysis, scores, macs=macs, width_multiple=width_multiple)
    return surgery.prune_channels(network, images[:2], removed)


def explain(network: nn.Module, example_input: Tensor) -> Explanation:
    """Which channels of ``network`` can be pruned together, and what is frozen and why."""
    from greenprune.pruning import surgery

    return surgery.explain(network, example_input)


def export(
    run_folder: Path | None = None,
    *,
    target: str = "x86",
    precision: str = "fp32",
    output: Path | None = None,
    runs: Path = RUNS,
) -> Path:
    """A bundle of a finished run for one target.

    Args:
        run_folder: a run; None: the newest finished one in ``runs``.
        target: as ``greenprune targets`` lists them.
        precision: ``fp32``, and what the target offers.
        output: the bundle's folder; by default ``<run name>-<target>.bundle``.
        runs: the folder that holds all runs.

    Raises:
        RunError: there is no finished run.
        StorageError: ``output`` exists and is not a bundle.
        TargetError, ExportError: from the target.
    """
    job = finished_job(run_folder, runs=runs)
    _needs_host()
    from greenprune import compilation, deployment, stages

    target = ALIASES.get(target, target)
    asked = {**schema.encode(job.recipe.compile), "target": target, "precision": precision}
    if target != job.recipe.compile.target:
        asked["runtimes"] = ()  # those of the run are another target's
    settings = schema.decode(asked, CompileSettings, "--precision", RecipeError)
    job = Job(replace(job.recipe, compile=settings), job.folder)
    compilation.runtimes(job)
    destination = output or Path(f"{job.folder.name}-{target}.bundle")
    check_bundle_place(destination)
    _use_threads(job.recipe.threads)
    trained = [stage.name for stage in stages.host_stages(job.recipe)]
    after = [stage for stage in stages.of(job.recipe) if stage.name not in trained]
    last = [stage.name for stage in after].index(job.bundle_stage)
    execute(job, after[: last + 1], finished=trained)
    return copy_bundle(deployment.bundle_folder(job), destination)


def copy_bundle(source: Path, destination: Path) -> Path:
    """Copy a bundle, verified, whole or not at all; returns ``destination``.

    Raises:
        BundleError: the bundle is damaged.
        StorageError: ``destination`` exists and is not a bundle, or cannot be written.
    """
    check_bundle_place(destination)
    made = bundles.open_bundle(source)
    made.verify()
    storage.remove_partial(destination.parent, destination.name)
    with storage.atomic_folder(destination) as folder:
        for name in (bundles.MANIFEST, *made.manifest.files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made.path / name, folder / name)
    return destination


def check_bundle_place(destination: Path) -> None:
    """Raises StorageError: what is there is not a bundle, and would be overwritten."""
    if destination.exists() and not (destination / bundles.MANIFEST).is_file():
        raise StorageError(
            f"{destination}: exists and is not a bundle; choose another output with -o"
        )


def cost_graphs(
    recipe: Recipe | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    output: Path,
    runtime: str | None = None,
) -> Path:
    """The folder of graphs that a device elsewhere measures a cost table of the network from.

    Args:
        recipe: as :func:`run`; its target is the device's.
        overrides: as :func:`run`.
        output: the folder to write; one that an earlier call wrote is replaced.
        runtime: by :func:`greenprune.registry.runtime_name`; None: the target's first, in the
            precision of ``compile.precision``.

    Raises:
        TargetError: the target has no such runtime, or refuses a graph.
        StorageError: ``output`` exists and is no such folder.
    """
    job = open_job(recipe, overrides=overrides)
    from greenprune import prune_budget

    return prune_budget.write_graphs(job, output, runtime)


def report(
    run_folder: Path | None = None,
    *,
    output: Path | None = None,
    runs: Path = RUNS,
    account: Account | None = None,
    results: Path | None = None,
) -> Path:
    """Write a finished run's report again; by default in the run's folder, as ``report.html``.

    A summary in Markdown is written beside it. ``account`` is what :func:`carbon` made; None: the
    one of the recipe's settings, from the ledger as it is now. ``results`` is as in :func:`carbon`.
    """
    job = finished_job(run_folder, runs=runs)
    account = account or carbon(job.folder, results=results)
    from greenprune import deployment, summary
    from greenprune.nncec.report import write_report

    measured = None
    if results is not None:
        job, measured = deployment.measured_elsewhere(job, results)
    destination = output or job.folder / "report.html"
    write_report(destination, **summary.report_input(job, account, measured))
    return destination


def carbon(
    run_folder: Path | None = None,
    *,
    runs: Path = RUNS,
    intensity: Factor | float | None = None,
    device_intensity: Factor | float | None = None,
    pue: float | None = None,
    fleet: Fleet | None = None,
    embodied: Embodied | None = None,
    results: Path | None = None,
) -> Account:
    """The account in joules and carbon of a finished run and of a life in use.

    What is None is the recipe's; see :func:`greenprune.nncec.account.account`. Lines of the ledger
    that cannot be read are named in ``Account.unreadable``, and the others are counted. ``results``
    is a file of what a device elsewhere measured of this run's bundle; None: the run's own.

    Raises:
        RunError: there is no finished run, or ``results`` are of another bundle.
        MeasurementError: an intensity, a PUE, a fleet or a device that cannot be.
    """
    job = finished_job(run_folder, runs=runs)
    _needs_host()
    from greenprune import deployment
    from greenprune.nncec import ledger

    measured = None
    if results is not None:
        job, measured = deployment.measured_elsewhere(job, results)
    given = {
        "intensity_g_per_kwh": intensity,
        "device_intensity_g_per_kwh": device_intensity,
        "pue": pue,
        "fleet": fleet,
        "embodied": embodied,
    }
    return deployment.account_from(
        job,
        ledger.scan(job.folder / LEDGER_FILE),
        measured,
        **{key: value for key, value in given.items() if value is not None},
    )


def open_job(
    recipe: Recipe | str | Path | None,
    *,
    overrides: Sequence[str] = (),
    runs: Path = RUNS,
    name: str | None = None,
) -> Job:
    """The job that a recipe describes, in its run folder."""
    if isinstance(recipe, Recipe):
        loaded = recipes.checked(recipe)
    else:
        loaded = recipes.load(recipe, overrides)
    if name is not None:
        recipes.check_name(name, "--name")
        loaded = replace(loaded, name=name)
    target = ALIASES.get(loaded.compile.target, loaded.compile.target)
    loaded = replace(loaded, compile=replace(loaded.compile, target=target))
    _needs_host()
    return Job(loaded, runs / loaded.name)


def _needs_host() -> None:
    """Raises MissingPackageError: this is the device install, without torch."""
    if find_spec("torch") is None:
        raise MissingPackageError("torch", "host")


def finished_job(run_folder: Path | None, *, runs: Path = RUNS) -> Job:
    """A run whose networks are finished; None: the newest one in ``runs``.

    Raises:
        RunError: there is none, or it is not finished.
    """
    if run_folder is None:
        finished = [path for path in runs.glob("*") if _networks_finished(path)]
        if not finished:
            raise RunError(
                f"{runs}: no finished run here; expected one made by `greenprune run`; "
                "run that first, or name a run's folder"
            )
        run_folder = max(finished, key=lambda path: _last_stage(path).stat().st_mtime)
    elif not run_folder.is_dir() and (runs / run_folder).is_dir():
        run_folder = runs / run_folder
    if not (run_folder / RUN_FILE).is_file():
        raise RunError(f"{run_folder}: not a run; expected a folder that `greenprune run` made")
    if not _networks_finished(run_folder):
        raise RunError(
            f"{run_folder}: this run has not finished fine-tuning; `greenprune run` with the same "
            "recipe and --name goes on where it stopped"
        )
    return Job(recipes.read_back(run_folder / RUN_FILE), run_folder)


def _last_stage(run_folder: Path) -> Path:
    return run_folder / "finetune-aggressive" / "stage.json"


def _networks_finished(run_folder: Path) -> bool:
    return all(is_current(run_folder, f"finetune-{variant}") for variant in ("mild", "aggressive"))


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads or max(1, usable_cores() // processes.count_here()))


__all__ = [
    "Results",
    "bench",
    "carbon",
    "cost_graphs",
    "explain",
    "export",
    "prune",
    "prune_network",
    "report",
    "run",
]
