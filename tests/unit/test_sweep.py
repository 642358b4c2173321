"""A sweep without its workers: points, records, fronts, the pick, the page."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import sys
import types
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a sweep needs the extra 'host'")
pytest.importorskip("moocore", reason="the hypervolume needs the extra 'sweep'")

from greenprune import (
    pick,
    pipeline,
    schema,
    storage,
    sweep,
    sweep_cluster,
    sweep_points,
    sweep_record,
    sweep_worker,
)
from greenprune import recipe as recipes
from greenprune._version import __version__
from greenprune.errors import BundleError, MissingPackageError, RecipeError, RunError, TargetError
from greenprune.harness import cost_table, protocol
from greenprune.registry import load_target
from greenprune.sweep_record import Energy, Figures, Measured, Point, Sweep

# accuracy, development accuracy, ms, mJ, bytes
DENSE = (0.98, 0.97, 2.0, 10.0, 1000)
POINTS = {
    "x86-macs-x0.5": {
        "mild": (0.98, 0.96, 1.6, 8.0, 800),
        "aggressive": (0.97, 0.95, 1.0, 5.0, 500),
        "pair": (0.98, 0.96, 1.2, 6.0, 1300),
    },
    "x86-macs-x0.2": {
        "mild": (0.97, 0.95, 1.1, 5.5, 600),
        "aggressive": (0.90, 0.89, 0.4, 2.0, 200),
        "pair": (0.965, 0.94, 0.7, 3.5, 800),
    },
}


def figures(row: tuple[float, float, float, float, int], joules: bool = True) -> Figures:
    accuracy, development, mean, energy, size = row
    return Figures(
        accuracy=accuracy,
        development_accuracy=development,
        macs=10 * size,
        params=size,
        bytes=size,
        latency_ms={"onnxruntime": {"mean": mean, "p50": 0.9 * mean}},
        latency_share=mean / DENSE[2],
        energy_share=energy / DENSE[3] if joules else None,
        energy_mj=Energy(
            value=energy, low=0.5 * energy, high=2 * energy, provenance="measured_counter"
        )
        if joules
        else None,
    )


def measured(rows: dict[str, Any], **changes: Any) -> Measured:
    joules = changes.pop("joules", True)
    made = Measured(
        runtime="onnxruntime",
        threshold=0.7,
        machine="a processor, 2 threads",
        preset="quick",
        valid=True,
        bundle_started="2026-01-01T00:00:00",
        variants={name: figures(row, joules) for name, row in {"dense": DENSE, **rows}.items()},
    )
    return replace(made, **changes)


def made_sweep(**changes: Any) -> Sweep:
    done = tuple(
        Point(
            name=name,
            target="x86",
            budgets=(name.removeprefix("x86-").replace("-", " "),),
            state="done",
            measured=measured(rows),
        )
        for name, rows in POINTS.items()
    )
    failed = Point(
        name="x86-macs-x0.01",
        target="x86",
        budgets=("macs x0.01",),
        state="failed",
        error="out of <reach>",
    )
    return replace(Sweep(name="digits", recipe="lenet5", points=(*done, failed)), **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sweep_record.write(tmp_path / "digits", made_sweep())
    return tmp_path / "digits"


# -- points


def settings(texts: list[str], mild: list[str] | None = None) -> dict[str, Any]:
    recipe = recipes.load(None, sweep_points.budget_overrides(texts, mild))
    return {
        name: (own.macs, own.params, own.budget)
        for name, own in (("mild", recipe.prune.mild), ("aggressive", recipe.prune.aggressive))
    }


def test_shares_of_macs_and_parameters_are_the_recipes_own_keys() -> None:
    assert settings(["macs x0.4", "params x0.5"]) == {
        "mild": (0.7, 0.75, ()),
        "aggressive": (0.4, 0.5, ()),
    }


def test_anything_else_is_a_budget() -> None:
    assert settings(["latency x0.5", "macs x0.4"]) == {
        "mild": (1.0, 1.0, ("latency x0.75", "macs x0.7")),
        "aggressive": (1.0, 1.0, ("latency x0.5", "macs x0.4")),
    }


def test_mild_network_of_an_absolute_budget_is_the_recipes() -> None:
    own = recipes.load(None).prune.mild

    assert settings(["latency_ms <= 4"]) == {
        "mild": (own.macs, own.params, own.budget),
        "aggressive": (1.0, 1.0, ("latency_ms <= 4",)),
    }


def test_mild_network_as_given() -> None:
    found = settings(["latency_ms <= 4"], ["latency_ms <= 6", "params x0.9"])

    assert found["mild"] == (1.0, 1.0, ("latency_ms <= 6", "params x0.9"))


@pytest.mark.parametrize(
    ("texts", "mild", "told"),
    [
        ([], None, "expected a budget"),
        (["watts x0.5"], None, "watts x0.5"),
        (["macs x0.5"], ["macs x0.5"], "looser"),
        (["latency_ms <= 4"], ["latency_ms <= 3"], "looser"),
        (["macs x0.5", "macs <= 1000"], None, "macs"),
    ],
)
def test_budgets_that_cannot_be(texts: list[str], mild: list[str] | None, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        sweep_points.budget_overrides(texts, mild)


def test_plan_names_every_pair_of_target_and_budgets() -> None:
    planned = sweep_points.plan(
        None,
        [["macs x0.5"], ["macs x0.3", "params x0.4"], ["latency_ms <= 4"]],
        ["x86", "eyeriss"],
        overrides=["train.epochs=3"],
    )

    assert [point.name for point, _ in planned] == [
        f"{target}-{end}"
        for target in ("x86", "eyeriss")
        for end in ("macs-x0.5", "macs-x0.3-params-x0.4", "latency_ms-4")
    ]
    for point, recipe in planned:
        assert (recipe.name, recipe.compile.target) == (point.name, point.target)
        assert recipe.train.epochs == 3
        assert point.state == "waiting"


@pytest.mark.parametrize(
    ("budgets", "targets", "told"),
    [
        ([], ["x86"], "got none"),
        ([["macs x0.5"]], [], "got none"),
        ([["macs x0.5"], ["macs x0.50"]], ["x86"], "twice"),
    ],
)
def test_plans_that_cannot_be(budgets: Any, targets: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        sweep_points.plan(None, budgets, targets)


# -- what the workers keep


def write_stage(run: Path, stage: str, inputs: str, **needs: str) -> None:
    content = {
        "stage": stage,
        "inputs_sha256": inputs,
        "needs": needs,
        "started": "2026-01-01",
        "seconds": 1.0,
        "energy": None,
        "results": {},
    }
    storage.write_json(run / stage / "stage.json", content)


def test_shared_stages_are_taken_over_once(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "point"
    write_stage(base, "train", "1")
    write_stage(base, "sparsify", "2", train="1")
    storage.write_text(base / "train" / "network" / "weights", "whole")

    sweep_worker.take_over(base, run)

    assert (run / "train" / "network" / "weights").read_text() == "whole"
    assert pipeline.is_current(run, "sparsify")
    storage.write_text(run / "train" / "network" / "weights", "its own")
    sweep_worker.take_over(base, run)
    assert (run / "train" / "network" / "weights").read_text() == "its own", "copied again"
    write_stage(base, "train", "3")
    sweep_worker.take_over(base, run)
    assert (run / "train" / "network" / "weights").read_text() == "whole"
    assert not list(run.glob(".partial-*"))


def finished_point(folder: Path) -> recipes.Recipe:
    recipe = recipes.load(None)
    for run in (folder / "base", folder / "point"):
        write_stage(run, "train", "1")
        write_stage(run, "sparsify", "2", train="1")
    write_stage(folder / "point", "report-x86", "3", sparsify="2")
    pipeline.write_run(pipeline.Job(recipe, folder / "point"))
    content = schema.encode(measured(POINTS["x86-macs-x0.5"]))
    storage.write_json(folder / "point" / "point.json", content)
    return recipe


def test_finished_point_is_known_as_such(tmp_path: Path) -> None:
    recipe = finished_point(tmp_path)

    assert sweep_worker.is_finished(recipe, tmp_path / "point")
    assert not sweep_worker.is_finished(replace(recipe, seed=1), tmp_path / "point")
    assert not sweep_worker.is_finished(recipe, tmp_path / "another")


@pytest.mark.parametrize("left", ["point.json", "run.json", "report-x86/stage.json"])
def test_point_that_lacks_a_part_is_not_finished(tmp_path: Path, left: str) -> None:
    recipe = finished_point(tmp_path)
    (tmp_path / "point" / left).unlink()

    assert not sweep_worker.is_finished(recipe, tmp_path / "point")


def test_point_of_an_older_training_is_not_finished(tmp_path: Path) -> None:
    recipe = finished_point(tmp_path)
    write_stage(tmp_path / "base", "sparsify", "4", train="1")

    assert not sweep_worker.is_finished(recipe, tmp_path / "point")


def test_point_of_another_cost_table_is_not_finished(tmp_path: Path) -> None:
    """The recipe names the same file; what stands there is another measurement."""

    def write(place: Path, latency_us: float) -> None:
        point = cost_table.CostPoint(
            in_width=8,
            out_width=8,
            latency_us=latency_us,
            latency_us_low=latency_us,
            latency_us_high=latency_us,
        )
        costs = cost_table.ShapeCosts(
            shape=cost_table.LayerShape(operator="linear"), mirrored=False, points=(point,)
        )
        place.parent.mkdir(exist_ok=True)
        cost_table.write(
            cost_table.CostTable(
                target="arm",
                runtime="onnxruntime",
                threads=2,
                machine={},
                versions={},
                block_width=8,
                block_probe=(),
                costs=(costs,),
            ),
            place,
        )

    carried = tmp_path / "table.json"
    recipe = finished_point(tmp_path)
    aggressive = replace(recipe.prune.aggressive, budget=("latency x0.5",))
    pruned = replace(recipe.prune, aggressive=aggressive, cost_table=str(carried))
    recipe = replace(recipe, prune=pruned)
    pipeline.write_run(pipeline.Job(recipe, tmp_path / "point"))
    for place in (carried, tmp_path / "point" / "price" / "table.json"):
        write(place, 5.0)
    assert sweep_worker.is_finished(recipe, tmp_path / "point")
    write(carried, 6.0)
    assert not sweep_worker.is_finished(recipe, tmp_path / "point")
    carried.unlink()  # it says nothing of what was made from it
    assert sweep_worker.is_finished(recipe, tmp_path / "point")


def test_point_that_needs_no_cost_table_is_finished_without_one(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{}")
    recipe = finished_point(tmp_path)
    aggressive = replace(recipe.prune.aggressive, budget=("macs x0.5",))
    carried = str(tmp_path / "table.json")
    recipe = replace(recipe, prune=replace(recipe.prune, aggressive=aggressive, cost_table=carried))
    pipeline.write_run(pipeline.Job(recipe, tmp_path / "point"))
    assert sweep_worker.is_finished(recipe, tmp_path / "point")


def test_damaged_record_is_not_finished(tmp_path: Path) -> None:
    recipe = finished_point(tmp_path)
    (tmp_path / "point" / "point.json").write_text("{")

    assert not sweep_worker.is_finished(recipe, tmp_path / "point")


def test_what_goes_wrong_with_one_point_is_told_and_kept(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RunError("expected this, got that; do so")

    def break_down() -> None:
        raise ZeroDivisionError("by zero")

    assert sweep_worker._told(tmp_path, lambda: None) is None
    assert sweep_worker._told(tmp_path, refuse) == "expected this, got that; do so"
    assert not (tmp_path / "error.txt").exists()
    assert "ZeroDivisionError: by zero" in str(sweep_worker._told(tmp_path, break_down))
    assert "in break_down" in (tmp_path / "error.txt").read_text()


# -- Ray


def test_sweep_without_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(MissingPackageError, match=r"greenprune\[sweep\]"):
        sweep.sweep(budgets=[["macs x0.5"]], runs=tmp_path)


@pytest.mark.parametrize("address", [None, "ray://host:10001"])
def test_environment_that_ray_starts_in(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    seen: dict[str, str] = {}
    fake = types.SimpleNamespace(
        init=lambda **_: seen.update(os.environ), shutdown=lambda: seen.update(stopped="yes")
    )
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(sweep_cluster, "_probe", lambda _: None)

    with sweep_cluster.joined(address, 2):
        assert seen["RAY_USAGE_STATS_ENABLED"] == "0", "telemetry"
        assert ("RAY_AUTH_TOKEN" in seen) == (address is None), "a cluster has a token of its own"
    assert seen["stopped"] == "yes"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("address", "probe", "seconds", "told"),
    [
        (
            "auto",
            "import sys; sys.exit('first line\\n  no cluster here.')",
            30.0,
            "no cluster here;",
        ),
        ("auto", "import time; time.sleep(60)", 0.2, "got: nothing within 0.2 s;"),
        ("ray://127.0.0.1:1", "", 30.0, "refused"),
        ("127.0.0.1:1", "", 30.0, "refused"),
    ],
)
def test_address_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, address: str, probe: str, seconds: float, told: str
) -> None:
    monkeypatch.setattr(sweep_cluster, "PROBE", probe)
    monkeypatch.setattr(sweep_cluster, "ANSWER_SECONDS", seconds)

    with pytest.raises(RunError, match=re.escape(told)) as caught:
        sweep_cluster._probe(address)
    assert f"--address {address}: expected a Ray cluster" in str(caught.value)


class Done:
    """A task that has ended."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class Inline:
    """A Ray that runs each task when it is begun, on the next of its nodes or where it is told to;
    ``begun`` are the functions' names, runs' names and nodes."""

    exceptions = types.SimpleNamespace(
        RayTaskError=ValueError, RayError=OSError, TaskUnschedulableError=TimeoutError
    )

    def __init__(self) -> None:
        self.begun: list[tuple[str, str, str]] = []
        self.node = ""
        self.gone: set[str] = set()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": name, "Resources": {"CPU": 2.0}} for name in "abcde"]

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_node_id=lambda: self.node)

    def remote(self, *, num_cpus: float, max_retries: int, scheduling_strategy: str = "") -> Any:
        def begin(function: Any) -> Any:
            def task(work: Any, recipe: Any, folder: str, *others: Any) -> Any:
                self.node = scheduling_strategy or "abcde"[len(self.begun) % 5]
                if self.node in self.gone:
                    return Done(TimeoutError("no such node"))
                self.begun.append((work.__name__, Path(folder).name, self.node))
                return Done(function(work, recipe, folder, *others))

            return types.SimpleNamespace(remote=task)

        return begin

    def get(self, task: Any) -> Any:
        if isinstance(task.answer, Exception):
            raise task.answer
        return task.answer

    def wait(self, tasks: list[Any], num_returns: int) -> Any:
        return tasks[:1], tasks[1:]


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Inline:
    """In which all that is asked for is done at once, and only ``check`` is real."""
    found = Inline()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(sweep_cluster, "only_on", lambda node: node)
    monkeypatch.setattr(sweep_record, "read_point", lambda place: measured({}))
    monkeypatch.setattr(protocol, "real_meter", lambda name: ("none", 0.0))
    monkeypatch.setattr(protocol, "one_at_a_time", contextlib.nullcontext)
    for name in ("train_base", "advance", "finish"):

        def work(recipe: Any, folder: str, *others: Any) -> None:
            return None

        work.__name__ = name
        monkeypatch.setattr(sweep_worker, name, work)
    return found


def ended(inline: Inline, folder: Path, budgets: list[str], targets: list[str]) -> dict[str, Any]:
    planned = sweep_points.plan(None, [[text] for text in budgets], targets)
    return {each.name: each for each in sweep._ended_points(inline, folder, planned)}


@pytest.mark.skipif(not load_target("x86").is_here(), reason="no x86-64 processor")
def test_what_cannot_be_measured_is_refused_before_the_training(
    inline: Inline, tmp_path: Path
) -> None:
    found = ended(inline, tmp_path, ["macs x0.5", "energy x0.5"], ["x86", "arm"])
    assert {name: each.state for name, each in found.items()} == {
        "x86-macs-x0.5": "done",
        "x86-energy-x0.5": "failed",  # no meter here
        "arm-macs-x0.5": "failed",
        "arm-energy-x0.5": "failed",
    }
    assert "no joules" in found["x86-energy-x0.5"].error
    assert "this machine is none" in found["arm-macs-x0.5"].error
    works = [work for work, _, _ in inline.begun]
    assert works == ["check"] * 4 + ["train_base", "advance", "finish"]


@pytest.mark.skipif(not load_target("x86").is_here(), reason="no x86-64 processor")
def test_nothing_is_trained_where_no_point_can_be_measured(inline: Inline, tmp_path: Path) -> None:
    found = ended(inline, tmp_path, ["macs x0.5"], ["arm"])
    assert found["arm-macs-x0.5"].state == "failed"
    assert [work for work, _, _ in inline.begun] == ["check"]


@pytest.mark.skipif(not load_target("x86").is_here(), reason="no x86-64 processor")
def test_a_priced_point_stays_on_its_node(inline: Inline, tmp_path: Path) -> None:
    """A table that one node measured is none of another's, and would be measured again there;
    others go where there is room."""
    found = ended(inline, tmp_path, ["latency x0.5", "latency x0.4", "macs x0.3"], ["x86"])
    assert {each.state for each in found.values()} == {"done"}
    for name in found:
        own = [(work, node) for work, place, node in inline.begun if place == name]
        priced = "latency" in name
        assert [work for work, _ in own] == ["check", *["advance"] * (1 + priced), "finish"]
        assert len({node for _, node in own[1:]}) == (1 if priced else 2)


@pytest.mark.skipif(not load_target("x86").is_here(), reason="no x86-64 processor")
def test_a_node_that_is_gone_is_told(
    inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(recipe: Any, folder: str, *others: Any) -> None:
        inline.gone.add(inline.node)

    leave.__name__ = "advance"
    monkeypatch.setattr(sweep_worker, "advance", leave)
    (point,) = ended(inline, tmp_path, ["latency x0.5"], ["x86"]).values()
    assert point.state == "failed"
    assert "is gone (no such node); run the sweep again" in point.error


class Cluster:
    """Two nodes; what they answer to a look at the folder."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def nodes(self) -> list[dict[str, Any]]:
        alive = {"Alive": True, "NodeManagerAddress": "10.0.0.7"}
        return [
            {**alive, "NodeID": "a" * 56, "Resources": {"CPU": 4.0}},
            {**alive, "NodeID": "b" * 56, "Resources": {"CPU": 8.0}},
            {**alive, "NodeID": "c" * 56, "Resources": {}},
            {"Alive": False, "NodeID": "d" * 56, "Resources": {"CPU": 64.0}},
        ]

    def remote(self, **_: Any) -> Any:
        return lambda function: type("Task", (), {"remote": staticmethod(function)})

    def get(self, found: Any, timeout: float) -> Any:
        assert found == (True, __version__), "the token is there while it is looked for"
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((False, __version__), "10.0.0.7 does not see .*--runs"),
        ((True, "0.0.1"), "got 0.0.1"),
        (ModuleNotFoundError("No module named 'greenprune'"), "No module named 'greenprune'"),
    ],
)
def test_node_that_cannot_take_part(tmp_path: Path, answer: Any, told: str) -> None:
    pytest.importorskip("ray")
    cluster = Cluster((True, __version__), answer)

    with pytest.raises(RunError, match=told):
        sweep_cluster.check_nodes(cluster, tmp_path)
    assert list(tmp_path.iterdir()) == [], "the token is left behind"


def test_measurements_ask_for_the_largest_living_node() -> None:
    assert sweep_cluster.whole_node(Cluster()) == 8.0


def test_folder_of_a_run_is_no_sweeps(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "digits" / "run.json", "{}")

    with pytest.raises(RunError, match="is a run"):
        sweep.sweep(budgets=[["macs x0.5"]], runs=tmp_path, name="digits")


def test_two_sweeps_in_one_folder(tmp_path: Path) -> None:
    with (
        sweep._alone(tmp_path),
        pytest.raises(RunError, match="another sweep"),
        sweep._alone(tmp_path),
    ):
        pass


# -- records


def test_record_reads_back_as_written(folder: Path) -> None:
    assert sweep_record.read(folder) == made_sweep()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "expected JSON"),
        ('{"name": "a", "recipe": "b", "points": [], "extra": 1}', "unknown key 'extra'"),
        ('{"name": "a", "recipe": "b", "points": [{"name": 3}]}', r"points\[0\]"),
    ],
)
def test_damaged_records(folder: Path, content: str, told: str) -> None:
    (folder / "sweep.json").write_text(content)

    with pytest.raises(RunError, match=told):
        sweep_record.read(folder)


@pytest.mark.parametrize("limit", [0.0, -5.0, float("nan"), float("inf")])
def test_limits_that_cannot_be_are_refused(limit: float) -> None:
    with pytest.raises(RunError, match=r"latency_ms <= .*above zero"):
        sweep_record.best(made_sweep(), "x86", latency_ms=limit)


def test_estimated_joules_are_no_objective() -> None:
    """They are CPU seconds times watts: latency, counted twice."""
    guessed = made_sweep()
    points = []
    for point in guessed.points:
        measured = point.measured
        if measured is not None:
            variants = {
                name: dataclasses.replace(
                    each,
                    energy_mj=each.energy_mj
                    and dataclasses.replace(each.energy_mj, provenance="estimated_model"),
                )
                for name, each in measured.variants.items()
            }
            measured = dataclasses.replace(measured, variants=variants)
        points.append(dataclasses.replace(point, measured=measured))
    (found,) = sweep_record.fronts(dataclasses.replace(guessed, points=tuple(points)))
    assert found.objectives == ("accuracy lost", "latency", "bytes")
    assert "estimated" in found.left_out["energy"]


def test_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a sweep"):
        sweep_record.read(tmp_path)


# -- fronts


def test_front_of_known_points() -> None:
    (found,) = sweep_record.fronts(made_sweep())

    names = [
        each.name for each, chosen in zip(found.candidates, found.chosen, strict=True) if chosen
    ]
    assert found.objectives == ("accuracy lost", "latency", "energy", "bytes")
    assert "x86-macs-x0.2/mild" not in names, "aggressive of the other point beats it in all"
    assert set(names) == {each.name for each in found.candidates} - {"x86-macs-x0.2/mild"}
    assert found.knee is not None
    assert found.candidates[found.knee].name == "x86-macs-x0.5/aggressive"
    # of the box: 1 - development loss / 5 points, and what is saved of ms, mJ and bytes
    assert found.hypervolume >= 0.6 * 0.5 * 0.5 * 0.5


def test_joules_that_one_point_lacks_are_left_out_for_all() -> None:
    first, second, _ = made_sweep().points
    gap = replace(second, measured=measured(POINTS[second.name], joules=False))

    (found,) = sweep_record.fronts(made_sweep(points=(first, gap)))

    assert found.objectives == ("accuracy lost", "latency", "bytes")
    assert found.left_out == {"energy": "not measured for 3 of 6 candidates"}


def test_sweep_without_a_finished_point_has_no_front() -> None:
    assert sweep_record.fronts(made_sweep(points=made_sweep().points[2:])) == []


# -- the pick


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"latency_ms": 1.3}, "x86-macs-x0.5/pair"),
        ({"latency_ms": 1.0}, "x86-macs-x0.5/aggressive"),
        ({"latency_ms": 0.5}, "x86-macs-x0.2/aggressive"),
        ({"energy_mj": 4.0}, "x86-macs-x0.2/pair"),
        ({"bytes": 700}, "x86-macs-x0.5/aggressive"),
        ({"accuracy": 0.95}, "x86-macs-x0.5/aggressive"),
        ({"accuracy": 0.96}, "x86-macs-x0.5/pair"),
        ({"latency_ms": 2.0, "bytes": 900, "accuracy": 0.9}, "x86-macs-x0.5/mild"),
    ],
)
def test_best_within_limits(limits: dict[str, Any], expected: str) -> None:
    assert sweep_record.best(made_sweep(), "x86", **limits).name == expected


def test_test_images_are_never_chosen_by() -> None:
    rows = {
        **POINTS["x86-macs-x0.5"],
        "aggressive": (0.99, 0.80, 1.0, 5.0, 500),  # best where nobody may look
    }
    point = replace(made_sweep().points[0], measured=measured(rows))

    chosen = sweep_record.best(made_sweep(points=(point,)), "x86", latency_ms=2.0)

    assert chosen.variant == "pair"


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({}, "nothing to pick by"),
        ({"latency_ms": 0.1}, "the closest is x86-macs-x0.2/aggressive with 0.4 ms"),
        ({"accuracy": 0.99}, "the closest is x86-macs-x0.5/(mild|pair)"),
        ({"latency_ms": 0.9, "accuracy": 0.95}, "the closest is"),
    ],
)
def test_nothing_to_pick(folder: Path, limits: dict[str, Any], told: str) -> None:
    with pytest.raises(RunError, match=told):
        pick.pick(folder, **limits)


def test_pick_by_joules_that_nobody_measured() -> None:
    first, _, _ = made_sweep().points
    gap = replace(first, measured=measured(POINTS[first.name], joules=False))

    with pytest.raises(RunError, match="whose joules were measured"):
        sweep_record.best(made_sweep(points=(gap,)), "x86", energy_mj=5.0)


def test_pick_asks_for_one_of_the_targets(folder: Path) -> None:
    with pytest.raises(RunError, match="x86"):
        pick.pick(folder, latency_ms=1.0, target="cuda")


def test_pick_of_a_run_that_was_changed_since(folder: Path) -> None:
    """Repeated by hand, or in a sweep that was killed: its bundle is another than was measured."""
    run = folder / "x86-macs-x0.5"
    pipeline.write_run(pipeline.Job(recipes.load(None), run))
    with pytest.raises(RunError, match=r"x86-macs-x0\.5: was changed after the sweep"):
        pick.pick(folder, latency_ms=1.0)  # it is being made
    write_stage(run, "bundle-x86", "1")
    path = run / "bundle-x86" / "stage.json"
    content = json.loads(path.read_text())
    for started, told in (("2026-01-02", RunError), ("2026-01-01T00:00:00", BundleError)):
        storage.write_json(path, content | {"started": started})
        with pytest.raises(told) as caught:  # the one that was measured is there, without files
            pick.pick(folder, latency_ms=1.0)
        assert ("was changed after the sweep" in str(caught.value)) == (told is RunError)


# -- the page


class Fetched(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "srcset", "href", "xlink:href", "data") and value:
                self.found.append(value)
        if tag in ("script", "iframe", "object", "embed", "link"):
            self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        self.found += re.findall(r"(?:@import|url\()\s*[\"']?([^\"')]+)", data)


@pytest.fixture
def page(folder: Path) -> tuple[dict[str, Any], Fetched, Path]:
    pytest.importorskip("matplotlib")
    from greenprune import sweep_report

    answer = sweep_report.report(folder)
    parsed = Fetched()
    parsed.feed((folder / "front.html").read_text(encoding="utf-8"))
    return answer, parsed, folder


def test_page_stands_alone_and_says_what_is_there(page: Any) -> None:
    answer, parsed, _ = page
    words = " ".join(" ".join(parsed.words).split())

    assert [each for each in parsed.found if not each.startswith(("#", "data:"))] == []
    for name in POINTS:
        assert name in words
    assert "out of <reach>" in words, "a failed point's error, as text"
    assert "the knee is x86-macs-x0.5/aggressive" in words
    assert words.count("Accuracy against") == 3
    assert words.count("(measured)") >= 3, "every joule says where it comes from"
    assert answer["failed"] == ["x86-macs-x0.01"]
    assert json.loads(json.dumps(answer, allow_nan=False))["fronts"] == answer["fronts"]


def test_table_has_a_row_a_candidate(page: Any) -> None:
    _, _, folder = page
    with (folder / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == 6
    assert [row["point"] for row in rows if row["knee"] == "True"] == ["x86-macs-x0.5"]
    assert float(rows[1]["latency_share"]) == 0.5
    assert rows[1]["energy_provenance"] == "measured_counter"


def test_page_without_joules_has_no_plot_of_them(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    from greenprune import sweep_report

    done, *_ = made_sweep().points
    gap = replace(done, measured=measured(POINTS[done.name], joules=False, valid=False))
    sweep_record.write(folder, made_sweep(points=(gap,)))

    answer = sweep_report.report(folder)

    text = (folder / "front.html").read_text(encoding="utf-8")
    assert "Accuracy against energy" not in text
    assert "energy is left out of the comparison" in text
    assert "NOT VALID" in text
    assert answer["fronts"]["x86"]["left_out"]


def test_targets_are_known_before_anything_is_trained() -> None:
    with pytest.raises(TargetError, match="nosuch"):
        sweep_points.plan(None, [["macs x0.5"]], ["x86", "nosuch"])
    with pytest.raises(RecipeError, match="is there twice"):
        sweep_points.plan(None, [["macs x0.5"]], ["jetson", "jetson-orin-nano"])


def test_an_address_that_is_none() -> None:
    pytest.importorskip("ray")
    with (
        pytest.raises(RunError, match="without --address"),
        sweep_cluster.joined("local", 1),
    ):
        pass
