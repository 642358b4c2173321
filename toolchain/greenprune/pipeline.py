"""The stages in order, each run once, resumable at any moment.

A stage's folder appears whole or not at all; ``stage.json`` in it holds the hash of everything the
stage depends on. A stage whose hash is unchanged is not run again.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from greenprune import schema, storage
from greenprune._version import __version__
from greenprune.errors import RunError
from greenprune.harness.environment import versions
from greenprune.meters import Energy, label, open_meter
from greenprune.nncec import ledger
from greenprune.progress import say
from greenprune.recipe import Recipe

if TYPE_CHECKING:
    from greenprune.data import Data

STAGE_FILE = "stage.json"
RUN_FILE = "run.json"
LEDGER_FILE = "ledger.jsonl"


@dataclass(frozen=True)
class Job:
    """One run: its recipe, its folder and what its stages share."""

    recipe: Recipe
    folder: Path

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
        if content is None:
            raise RunError(
                f"{self.place(stage)}: stage '{stage}' is not finished; run `greenprune run` again"
            )
        results: dict[str, Any] = content["results"]
        return results

    @property
    def bundle_stage(self) -> str:
        """Name of the stage that holds the bundle for this recipe's target."""
        return f"bundle-{self.recipe.compile.target}"

    def checkpoint(self, stage: str, inputs_sha256: str) -> Path:
        """Where a training stage keeps its last epoch until it is finished."""
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


def read_stage(folder: Path) -> dict[str, Any] | None:
    """``stage.json`` of a finished stage; None where there is none."""
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); remove {folder} and run again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected an object; remove {folder} and run again")
    return content


def execute(job: Job, stages: Sequence[Stage]) -> None:
    """Run every stage that is not complete, in order.

    Raises:
        RunError: another process is at work in the same run folder.
        GreenpruneError: whatever a stage raises; what is complete stays complete.
    """
    with storage.storage_errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(job.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(
            f"{job.folder}: another greenprune is at work in this run; wait for it, "
            "or choose another --name"
        ) from None
    try:
        storage.remove_partial(job.folder)
        _write_run(job)
        hashes: dict[str, str] = {}
        for number, stage in enumerate(stages, start=1):
            hashes[stage.name] = _inputs_hash(job, stage, hashes)
            title = f"[{number}/{len(stages)}] {stage.name}"
            if _is_complete(job, stage, hashes[stage.name]):
                say(f"{title}: complete")
            else:
                _run_stage(job, stage, hashes[stage.name], title)
    finally:
        lock.release()


def _write_run(job: Job) -> None:
    path = job.folder / RUN_FILE
    content = {"greenprune": __version__, "recipe": schema.encode(job.recipe)}
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != content:
        storage.write_json(path, content)


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
    _enter_in_ledger(job, content)
    return True


def _run_stage(job: Job, stage: Stage, inputs_sha256: str, title: str) -> None:
    say(f"{title} …")
    started = datetime.datetime.now(datetime.timezone.utc)
    clock = time.monotonic()
    checkpoint = job.checkpoint(stage.name, inputs_sha256)
    with storage.atomic_folder(job.place(stage.name)) as folder:
        with open_meter(job.recipe.bench.meter) as meter, meter.measure() as window:
            results = stage.function(Work(job=job, folder=folder, checkpoint=checkpoint))
        content = {
            "stage": stage.name,
            "inputs_sha256": inputs_sha256,
            "seed": job.recipe.seed,
            "started": started.isoformat(timespec="seconds"),
            "seconds": time.monotonic() - clock,
            "energy": schema.encode(window.energy),
            "versions": versions(),
            "results": results,
        }
        storage.write_json(folder / STAGE_FILE, content)
    checkpoint.unlink(missing_ok=True)
    _enter_in_ledger(job, content)
    told = [f"{content['seconds']:.1f} s", _joules(window.energy), results.get("headline")]
    say(f"{title}: {'; '.join(part for part in told if part)}")


def _joules(energy: Energy | None) -> str:
    if energy is None:
        return "no meter"
    if energy.low == energy.high:
        return f"{energy.value:,.0f} J"
    return f"{energy.low:,.0f} to {energy.high:,.0f} J ({label(energy.provenance)})"


def _enter_in_ledger(job: Job, content: dict[str, Any]) -> None:
    """Append the stage to the life's ledger, once: also after a kill between folder and row."""
    path = job.folder / LEDGER_FILE
    identity = f"{content['stage']} {content['started']} {content['inputs_sha256'][:16]}"
    if any(row.identity == identity for row in ledger.read(path)):
        return
    ledger.append(
        path,
        ledger.stage_row(
            identity=identity,
            stage=content["stage"],
            seconds=content["seconds"],
            energy=content["energy"],
            intensity_g_per_kwh=job.recipe.account.intensity_g_per_kwh,
            pue=job.recipe.account.pue,
        ),
    )
