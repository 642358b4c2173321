"""Many points of one recipe, each a run of its own, on one machine or a cluster, with Ray.

``runs/<name>/<point>/`` is a run like any other; ``runs/<name>/base/`` trains and sparsifies once,
and every point takes these stages over. Trainings share a machine; whatever measures has it to
itself. A sweep that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from greenprune import api, pipeline, schema, storage, sweep_cluster, sweep_record, sweep_worker
from greenprune import recipe as recipes
from greenprune.cores import usable_cores
from greenprune.errors import RunError
from greenprune.progress import progress, say
from greenprune.recipe import Recipe
from greenprune.sweep_points import BASE, plan
from greenprune.sweep_record import Point, Sweep

LAST_UNMEASURED = "calibrate"
"""After this stage a run compiles, races and measures, and wants the machine to itself."""
RETRIES = 2
"""Of a task whose worker died; it goes on at the stage, or the epoch, where that one was."""


def sweep(
    recipe: str | Path | None = None,
    *,
    budgets: Sequence[Sequence[str]],
    targets: Sequence[str] = ("x86",),
    mild: Sequence[str] | None = None,
    address: str | None = None,
    workers: int | None = None,
    overrides: Sequence[str] = (),
    runs: Path = api.RUNS,
    name: str | None = None,
) -> dict[str, Any]:
    """Run every pair of a target and a set of budgets, and compare what they came to.

    Args:
        recipe: a TOML file or a built-in recipe's name; None: ``lenet5-digits``.
        budgets: of each point's aggressive network, as :func:`greenprune.pruning.limits.parse`
            reads them; the texts of one point hold all at once.
        targets: as ``greenprune targets`` lists them; a worker must be such a device, or the
            target's points fail before anything is trained.
        mild: budgets of every point's mild network; None: half-way between the aggressive one's
            shares and the dense network; where these are no shares, the recipe's.
        address: a Ray cluster, ``auto`` or ``ray://host:port``, whose nodes see ``runs`` and have
            this greenprune; None: a Ray of its own on this machine.
        workers: how many points train at once on this machine; None: one a core. A cluster has a
            number of its own.
        overrides: ``"section.key=value"`` strings, for all points.
        runs: the folder that holds all runs.
        name: the sweep's folder name; by default the recipe's and ``-sweep``.

    Returns:
        ``{"sweep", "page", "points", "failed", "fronts"}``: the folder, its page, the points of
        ``sweep.json``, the names of those that failed (the others are finished) and, by target,
        ``objectives``, ``left_out``, ``hypervolume``, ``knee`` and ``front``.

    Raises:
        RecipeError: a budget or an override that cannot be; nothing is begun.
        RunError: the cluster does not answer, or its nodes do not see ``runs``; another sweep is at
            work in the same folder; the training that all points share failed.
        MissingPackageError: Ray is not installed.
    """
    planned = plan(recipe, budgets, targets, mild=mild, overrides=overrides)
    title = recipes.load(recipe, overrides).name
    if name is not None:
        recipes.check_name(name, "--name")
    folder = (runs / (name or f"{title}-sweep")).absolute()
    if (folder / pipeline.RUN_FILE).is_file():
        raise RunError(f"{folder}: is a run, expected a sweep's folder; choose another --name")
    found = Sweep(name=folder.name, recipe=title, points=tuple(point for point, _ in planned))
    at_once = workers or min(len(planned), usable_cores())
    with _alone(folder), sweep_cluster.joined(address, at_once) as ray:
        sweep_cluster.check_nodes(ray, folder)
        with progress("points", len(planned)) as advance:
            for number, point in enumerate(_ended_points(ray, folder, planned), start=1):
                # the first ends after the base is there: until then the last sweep's file stands
                points = (point if old.name == point.name else old for old in found.points)
                found = replace(found, points=tuple(points))
                sweep_record.write(folder, found)
                say(f"[{number}/{len(planned)}] {point.name}: {point.error or point.state}")
                advance()
    from greenprune import sweep_report

    return sweep_report.report(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with storage.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # an OSError too
            raise RunError(
                f"{folder}: another sweep is at work here; wait for it, or choose another --name"
            ) from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class _Task:
    """What a worker is to do, and on how many of Ray's CPUs."""

    cpus: float
    function: Callable[..., str | None]
    arguments: tuple[Any, ...]
    binds: bool = False
    """Whether the point's next tasks go to the same node: elsewhere it would be priced again."""


def _ended_points(
    ray: Any, folder: Path, planned: Sequence[tuple[Point, Recipe]]
) -> Iterator[Point]:
    """Each point as it ends, done or failed, in the order in which they end."""
    whole = sweep_cluster.whole_node(ray)
    refused = _refused(ray, whole, folder, planned)
    ready = [recipe for point, recipe in planned if point.name not in refused]
    if ready:
        say("[base] train and sparsify …")
        shared = (schema.encode(ready[0]), str(folder / BASE))
        _, failure = _told(ray, _begin(ray, _Task(whole, sweep_worker.train_base, shared)))
        if failure:
            raise RunError(
                f"{folder / BASE}, the training that all points share, failed: {failure}"
            )
    pending: dict[Any, tuple[Point, list[_Task], str | None]] = {}
    for point, recipe in planned:
        place = folder / point.name
        if point.name in refused:
            yield _ended(point, place, refused[point.name])
        elif sweep_worker.is_finished(recipe, place):
            yield _ended(point, place, None)
        else:
            tasks = _tasks(whole, recipe, place)
            pending[_begin(ray, tasks[0])] = point, tasks, None
    while pending:
        (ended,), _ = ray.wait(list(pending), num_returns=1)
        point, (last, *left), bound = pending.pop(ended)
        node, failure = _told(ray, ended)
        if failure or not left:
            yield _ended(point, folder / point.name, failure)
            continue
        if last.binds:
            bound = node
        pending[_begin(ray, left[0], bound)] = point, left, bound


def _refused(
    ray: Any, whole: float, folder: Path, planned: Sequence[tuple[Point, Recipe]]
) -> dict[str, str]:
    """Of the points that cannot be measured, by name: why not; told now, before the training."""
    asked = {
        point.name: _begin(
            ray, _Task(whole, sweep_worker.check, (schema.encode(recipe), str(place)))
        )
        for point, recipe in planned
        if not sweep_worker.is_finished(recipe, place := folder / point.name)
    }
    told = {name: _told(ray, task)[1] for name, task in asked.items()}
    refused = {name: failure for name, failure in told.items() if failure}
    for name, failure in refused.items():
        say(f"{name} is refused: {failure}")
    return refused


def _tasks(whole: float, recipe: Recipe, place: Path) -> list[_Task]:
    """A point's, one after the other: those that measure ask for a whole node."""
    from greenprune import prune_budget

    own = (schema.encode(recipe), str(place))
    priced = _Task(whole, sweep_worker.advance, (*own, "prune", False), binds=True)
    return [
        *([priced] * prune_budget.is_asked(recipe)),
        _Task(1, sweep_worker.advance, (*own, LAST_UNMEASURED, whole > 1)),
        _Task(whole, sweep_worker.finish, own),
    ]


def _begin(ray: Any, task: _Task, node: str | None = None) -> Any:
    options: dict[str, Any] = {"num_cpus": task.cpus, "max_retries": RETRIES}
    if node is not None:
        options["scheduling_strategy"] = sweep_cluster.only_on(node)
    begun = ray.remote(**options)(sweep_worker.on_node)
    return begun.remote(task.function, *task.arguments)


def _told(ray: Any, task: Any) -> tuple[str | None, str | None]:
    """The node that a task ran on, and what it says went wrong; also where its worker died."""
    try:
        told: tuple[str, str | None] = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        return None, f"{type(error.cause).__name__}: {error.cause}"
    except ray.exceptions.TaskUnschedulableError as error:
        why = sweep_cluster.last_line(error)
        return None, f"the node that it was measured on is gone ({why}); run the sweep again"
    except ray.exceptions.RayError as error:
        died = f"its worker died {1 + RETRIES} times: {sweep_cluster.last_line(error)}"
        return None, died
    return told


def _ended(point: Point, place: Path, failure: str | None) -> Point:
    if failure:
        return replace(point, state="failed", error=failure)
    return replace(point, state="done", measured=sweep_record.read_point(place))
