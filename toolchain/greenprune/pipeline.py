"""The stages in order, each run once, resumable at any moment.

A stage's folder appears whole or not at all; ``stage.json`` in it holds the hash of everything the
stage depends on. A stage whose hash is unchanged is not run again.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import psutil

from greenprune import processes, schema, storage
from greenprune._version import __version__
from greenprune.errors import MeasurementError, RunError
from greenprune.harness.environment import versions
from greenprune.meters import Meter, Window, label, open_meter
from greenprune.nncec import ledger
from greenprune.progress import say
from greenprune.recipe import Recipe

if TYPE_CHECKING:
    from greenprune.data import Data

STAGE_FILE = "stage.json"
STAGE_KEYS = {"stage", "inputs_sha256", "needs", "started", "seconds", "energy", "results"}
RUN_FILE = "run.json"
LEDGER_FILE = "ledger.jsonl"
BEGUN_BEFORE = "a lower bound: a process that was stopped began it, and its part may be in no row"


@dataclass(frozen=True)
class Job:
    """One run: its recipe, its folder and what its stages share."""

    recipe: Recipe
    folder: Path
    alone: bool = True
    """Whether nothing else trains on this machine meanwhile, whose joules a counter would add."""

    @cached_property
    def data(self) -> Data:
        """The images, decoded once."""
        from greenprune import data

        return data.load(self.recipe.data, self.recipe.seed)

    def place(self, stage: str) -> Path:
        """The folder of a finished stage."""
        return self.folder / stage

    def results(self, stage: str) -> dict[str, Any]:
        """What a finished stage found."""
        content = read_stage(self.place(stage))
        if content is None or not is_current(self.folder, stage):
            state = "not finished" if content is None else "older than what it was made from"
            raise RunError(
                f"{self.place(stage)}: stage '{stage}' is {state}; `greenprune run` with the same "
                "recipe and --name completes it"
            )
        results: dict[str, Any] = content["results"]
        return results

    @property
    def bundle_stage(self) -> str:
        """Name of the stage that holds the bundle for this recipe's target."""
        return f"bundle-{self.recipe.compile.target}"

    @property
    def bundle(self) -> Path:
        """The folder of the bundle for this recipe's target."""
        return self.place(self.bundle_stage) / "bundle"

    def checkpoint(self, stage: str, inputs_sha256: str) -> Path:
        """Where a training stage keeps its last epoch until it is finished; other names with this
        stem are a stage's too."""
        return self.folder / "checkpoints" / f"{stage}-{inputs_sha256[:16]}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage is given: the job, the folder to fill, and its checkpoint."""

    job: Job
    folder: Path
    checkpoint: Path


@dataclass(frozen=True)
class Stage:
    """One stage: what it depends on and the function that does it."""

    name: str
    function: Callable[[Work], dict[str, Any]]
    """Fills ``work.folder`` and returns results as plain data."""
    needs: tuple[str, ...] = ()
    depends: Callable[[Job], Any] = field(default=lambda job: None)
    """Plain data that the stage's outcome depends on beside what it needs."""
    version: int = 1
    """Raised when the function changes what it makes of the same inputs."""
    trains: bool = False
    """Under torchrun all processes do it together; the first alone does the rest."""


def read_stage(folder: Path) -> dict[str, Any] | None:
    """``stage.json`` of a finished stage; None where there is none."""
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); remove {folder} and run again") from error
    if not isinstance(content, dict) or not content.keys() >= STAGE_KEYS:
        raise RunError(
            f"{path}: expected an object with {', '.join(sorted(STAGE_KEYS))}; "
            f"remove {folder} and run again"
        )
    return content


def started(folder: Path) -> str:
    """When a finished stage began, which no other execution of it shares; empty where there is
    none."""
    content = read_stage(folder)
    return str(content["started"]) if content else ""


def is_current(run_folder: Path, stage: str) -> bool:
    """Whether a stage is finished and so is all that it was made from, unchanged since."""
    content = read_stage(run_folder / stage)
    if content is None:
        return False
    for name, inputs_sha256 in content["needs"].items():
        needed = read_stage(run_folder / name)
        if needed is None or needed["inputs_sha256"] != inputs_sha256:
            return False
    return all(is_current(run_folder, name) for name in content["needs"])


def execute(job: Job, stages: Sequence[Stage], finished: Sequence[str] = ()) -> None:
    """Run every stage that is not complete, in order; under torchrun, on all processes.

    Args:
        job: the run.
        stages: in an order in which each comes after those it needs.
        finished: stages that are needed and taken as they are; they must be current.

    Raises:
        RunError: another process is at work in the same run folder.
        GreenpruneError: whatever a stage raises; what is complete stays complete.
    """
    if not processes.is_first():
        _assist(job, stages)
        return
    with storage.storage_errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(job.folder / ".lock")
    with storage.storage_errors(job.folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # an OSError too
            raise RunError(
                f"{job.folder}: another greenprune is at work in this run; wait for it, "
                "or choose another --name"
            ) from None
    try:
        killed = {stage.name for stage in stages if storage.has_partial(job.folder, stage.name)}
        for place in (job.folder, job.folder / "checkpoints"):
            storage.remove_partial(place)
        if not finished:
            write_run(job)
        hashes = {name: _inputs_of(job, name) for name in finished}
        for number, stage in enumerate(stages, start=1):
            hashes[stage.name] = _inputs_hash(job, stage, hashes)
            title = f"[{number}/{len(stages)}] {stage.name}"
            complete = _is_complete(job, stage, hashes[stage.name])
            if stage.trains:
                processes.agree(complete)
            if complete:
                say(f"{title}: complete")
            else:
                _run_stage(job, stage, hashes, title, killed=stage.name in killed)
    finally:
        lock.release()


def _assist(job: Job, stages: Sequence[Stage]) -> None:
    """Train along with the first process; what it publishes is what counts."""
    for stage in stages:
        if stage.trains and not processes.agree():
            with tempfile.TemporaryDirectory() as scratch:
                work = Work(job=job, folder=Path(scratch), checkpoint=Path(scratch) / "unused")
                stage.function(work)


def write_run(job: Job) -> None:
    """Note the recipe in the run's folder, so that other commands find it there."""
    content = json.loads(
        json.dumps({"greenprune": __version__, "recipe": schema.encode(job.recipe)})
    )
    path = job.folder / RUN_FILE
    try:
        if json.loads(path.read_text(encoding="utf-8")) == content:
            return
    except (OSError, ValueError):
        pass  # there is none yet, or a damaged one
    storage.write_json(path, content)


def _inputs_of(job: Job, stage: str) -> str:
    job.results(stage)
    content = read_stage(job.place(stage)) or {}
    return str(content["inputs_sha256"])


def _inputs_hash(job: Job, stage: Stage, hashes: dict[str, str]) -> str:
    return storage.sha256_of(
        {
            "stage": stage.name,
            "version": stage.version,
            "seed": job.recipe.seed,
            "needs": {name: hashes[name] for name in stage.needs},
            "depends": stage.depends(job),
        }
    )


def _is_complete(job: Job, stage: Stage, inputs_sha256: str) -> bool:
    content = read_stage(job.place(stage.name))
    if content is None or content["inputs_sha256"] != inputs_sha256:
        return False
    _enter_in_ledger(job, content, counted_as(content))
    return True


def _run_stage(job: Job, stage: Stage, hashes: dict[str, str], title: str, *, killed: bool) -> None:
    say(f"{title} …")
    inputs_sha256 = hashes[stage.name]
    checkpoint = job.checkpoint(stage.name, inputs_sha256)
    content: dict[str, Any] = {
        "stage": stage.name,
        "inputs_sha256": inputs_sha256,
        "needs": {name: hashes[name] for name in stage.needs},
        "seed": job.recipe.seed,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        "versions": versions(),
        "resumed": killed or any(checkpoint.parent.glob(f"{checkpoint.stem}*")),
    }
    with storage.atomic_folder(job.place(stage.name)) as folder:
        work = Work(job=job, folder=folder, checkpoint=checkpoint)
        try:
            _measured(job, content, lambda: stage.function(work))
        except BaseException:
            _enter_in_ledger(job, content, f"{stage.name}-stopped")
            raise
        storage.write_json(folder / STAGE_FILE, content)
    for old in checkpoint.parent.glob(f"{stage.name}-*"):
        old.unlink()
    _enter_in_ledger(job, content, counted_as(content))
    told = (
        f"{content['seconds']:.1f} s",
        _joules(content),
        content["results"].get("headline"),
    )
    say(f"{title}: {'; '.join(part for part in told if part)}")


def _measured(job: Job, content: dict[str, Any], function: Callable[[], dict[str, Any]]) -> None:
    """Run ``function`` and put its results, seconds and joules into ``content``.

    A meter that fails leaves a marked gap, joules null with the reason, and never costs a training.
    """
    clock = time.monotonic()
    window = Window()
    name, launcher = job.recipe.bench.meter, _launcher()
    if not job.alone and name != "none":
        # of this process' own CPU time; nothing tells whose a GPU's joules are
        name = "none" if processes.uses_gpu() else "estimate"
        if name == "none":
            content["energy_gap"] = "other runs shared this machine and its GPU"
    try:
        with open_meter(name, tdp_watts=job.recipe.bench.tdp_watts, launcher=launcher) as meter:
            gap = _gap(meter, launcher)
            if gap:
                content["energy_gap"] = gap
            with meter.measure() as window:
                content["results"] = function()
    except MeasurementError as error:
        if "results" not in content:
            raise
        content["energy_gap"] = str(error)
    finally:
        content["seconds"] = time.monotonic() - clock
        content["energy"] = schema.encode(window.energy)


def _launcher() -> int | None:
    """torchrun's process, where it started this one and others on this machine: the nearest
    ancestor without the variable that torchrun sets for what it starts."""
    mark = "TORCHELASTIC_RUN_ID"
    if processes.count_here() == 1 or mark not in os.environ:
        return None
    try:
        above = psutil.Process().parents()
        return next((process.pid for process in above if mark not in process.environ()), None)
    except (psutil.Error, OSError):
        return None


def _gap(meter: Meter, launcher: int | None) -> str:
    """What a meter's joules lack, and why; empty where they lack nothing."""
    if meter.provenance is None:
        return meter.note
    if processes.count_here() < processes.count():
        return "a lower bound: the processes on other machines are not in it"
    if processes.count() > 1 and launcher is None and "estimate" in meter.name:
        return "a lower bound: the other processes on this machine are not in it"
    return ""


def _lacks(content: dict[str, Any]) -> str:
    """What a stage's joules lack, and why."""
    found = [content["energy_gap"]] if "energy_gap" in content else []
    if content.get("resumed"):
        found.append(BEGUN_BEFORE)
    return "; ".join(found)


def _joules(content: dict[str, Any]) -> str:
    energy = content["energy"]
    if energy is None:
        return "joules not measured"
    least = "at least " if _lacks(content) else ""
    if energy["low"] == energy["high"]:
        return f"{least}{energy['value']:.3g} J"
    told = f"{energy['low']:.3g} to {energy['high']:.3g} J"
    return f"{least}{told} ({label(energy['provenance'])})"


def counted_as(content: dict[str, Any]) -> str:
    """What a stage is called in the ledger; loading trained weights is not training."""
    return str(content["results"].get("counted_as", content["stage"]))


def ledger_identity(content: dict[str, Any], stage: str) -> str:
    """Of the row that an execution has in the ledger, there called ``stage``."""
    return f"{stage} {content['started']} {content['inputs_sha256'][:16]}"


def _enter_in_ledger(job: Job, content: dict[str, Any], stage: str) -> None:
    """Append the stage to the life's ledger, once: also after a kill between folder and row."""
    path = job.folder / LEDGER_FILE
    identity = ledger_identity(content, stage)
    if any(row.identity == identity for row in ledger.read(path)):
        return
    ledger.append(
        path,
        ledger.stage_row(
            identity=identity,
            stage=stage,
            seconds=content["seconds"],
            energy=content["energy"],
            intensity_g_per_kwh=job.recipe.account.intensity_g_per_kwh,
            pue=job.recipe.account.pue,
            note=_lacks(content),
        ),
    )
