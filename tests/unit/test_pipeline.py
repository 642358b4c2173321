"""The pipeline on small fake stages: order, skipping, failure, locks, the ledger, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import filelock
import pytest

from greenprune import meters, pipeline, recipe
from greenprune.errors import MeasurementError, RunError, StorageError, TrainingError
from greenprune.meters import Meter, Window
from greenprune.nncec import ledger
from greenprune.pipeline import (
    BEGUN_BEFORE,
    LEDGER_FILE,
    RUN_FILE,
    STAGE_FILE,
    Job,
    Stage,
    Work,
    execute,
)
from greenprune.recipe import AccountSettings, BenchSettings, Recipe

Calls = list[str]
RECIPE = Recipe(bench=BenchSettings(meter="none"))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(RECIPE, tmp_path / "run")


def noting(calls: Calls, name: str, **more: Any) -> Stage:
    """A stage that notes that it ran and leaves a file with what it needed."""

    def work_on(work: Work) -> dict[str, Any]:
        calls.append(name)
        found = {need: work.job.results(need)["value"] for need in more.get("needs", ())}
        (work.folder / "file").write_text(json.dumps(found))
        return {"value": f"{name} of {sorted(found)}"}

    return Stage(name, work_on, **more)


def chain(calls: Calls, **depends: Callable[[Job], Any]) -> list[Stage]:
    """first -> second -> third, and aside, which needs nothing."""
    needs: dict[str, tuple[str, ...]] = {"second": ("first",), "third": ("second",)}
    return [
        noting(
            calls,
            name,
            needs=needs.get(name, ()),
            depends=depends.get(name, lambda _: None),
        )
        for name in ("first", "aside", "second", "third")
    ]


def failing(name: str, **more: Any) -> Stage:
    def work_on(work: Work) -> NoReturn:
        (work.folder / "half").write_text("half")
        work.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        work.checkpoint.write_text("epoch 3")
        raise TrainingError("the loss is not finite")

    return Stage(name, work_on, **more)


def entered(job: Job) -> list[str]:
    return [row.stage for row in ledger.read(job.folder / LEDGER_FILE)]


def test_stages_run_in_order_and_each_sees_what_it_needs(job: Job) -> None:
    calls: Calls = []

    execute(job, chain(calls))

    assert calls == ["first", "aside", "second", "third"]
    assert job.results("third") == {"value": "third of ['second']"}
    assert json.loads((job.place("second") / "file").read_text()) == {"first": "first of []"}
    assert entered(job) == calls


def test_stage_json_says_what_the_stage_was(job: Job) -> None:
    execute(job, chain([]))

    content = json.loads((job.place("first") / STAGE_FILE).read_text())
    assert content["stage"] == "first"
    assert len(content["inputs_sha256"]) == 64
    assert content["seed"] == RECIPE.seed
    assert content["seconds"] > 0
    assert content["energy"] is None, "no meter is no joules, not zero joules"
    assert content["versions"]["greenprune"]
    assert ledger.read(job.folder / LEDGER_FILE)[0].joules is None


def test_an_estimated_stage_enters_the_ledger_with_its_interval(job: Job) -> None:
    measured = Job(
        replace(
            RECIPE,
            bench=BenchSettings(meter="estimate"),
            account=AccountSettings(intensity_g_per_kwh=360.0, pue=1.5),
        ),
        job.folder,
    )
    execute(measured, chain([])[:1])

    content = json.loads((job.place("first") / STAGE_FILE).read_text())
    (row,) = ledger.read(job.folder / LEDGER_FILE)
    assert row.provenance == content["energy"]["provenance"] == "estimated_model"
    assert row.joules is not None
    assert row.kgco2e is not None
    assert row.joules.value == content["energy"]["value"]
    assert row.joules.low <= row.joules.value <= row.joules.high
    assert row.kgco2e.value == pytest.approx(row.joules.value / 3.6e6 * 1.5 * 0.36)


def test_a_second_run_does_nothing_and_writes_nothing(job: Job) -> None:
    execute(job, chain([]))
    before = {path: path.stat().st_ino for path in job.folder.rglob("*") if path.is_file()}
    again: Calls = []

    execute(job, chain(again))

    assert again == []
    assert {path: path.stat().st_ino for path in job.folder.rglob("*") if path.is_file()} == before
    assert len(entered(job)) == 4


def test_a_changed_input_reruns_the_stage_and_what_follows_from_it(job: Job) -> None:
    execute(job, chain([], second=lambda _: {"epochs": 3}))
    again: Calls = []

    execute(job, chain(again, second=lambda _: {"epochs": 4}))

    assert again == ["second", "third"]
    assert entered(job) == ["first", "aside", "second", "third", "second", "third"]


def test_a_changed_seed_reruns_all_and_a_changed_version_its_stage(job: Job) -> None:
    execute(job, chain([]))
    again: Calls = []
    stages = chain(again)
    stages[2] = replace(stages[2], version=2)

    execute(job, stages)
    assert again == ["second", "third"]

    again.clear()
    other = Job(replace(RECIPE, seed=1), job.folder)
    execute(other, stages)
    assert again == ["first", "aside", "second", "third"]


def test_what_a_stage_depends_on_comes_from_the_job(job: Job) -> None:
    def epochs(job: Job) -> Any:
        return job.recipe.train.epochs

    execute(job, chain([], first=epochs))
    other = Job(replace(RECIPE, train=replace(RECIPE.train, epochs=99)), job.folder)
    again: Calls = []

    execute(other, chain(again, first=epochs))

    assert again == ["first", "second", "third"]


def test_a_failure_leaves_nothing_of_its_stage_and_all_of_the_earlier_ones(job: Job) -> None:
    calls: Calls = []
    stages = chain(calls)
    broken = [*stages[:2], failing("second", needs=("first",)), stages[3]]

    with pytest.raises(TrainingError, match="not finite"):
        execute(job, broken)

    assert calls == ["first", "aside"]
    assert not job.place("second").exists()
    assert not list(job.folder.glob(".partial-*"))
    assert entered(job) == ["first", "aside", "second-stopped"], "what it spent is spent"
    with pytest.raises(RunError, match="stage 'second' is not finished"):
        job.results("second")
    checkpoints = list((job.folder / "checkpoints").iterdir())
    assert len(checkpoints) == 1, "the last epoch stays for the next attempt"

    calls.clear()
    execute(job, stages)

    assert calls == ["second", "third"]
    assert entered(job) == ["first", "aside", "second-stopped", "second", "third"]
    assert not checkpoints[0].exists(), "a finished stage needs no checkpoint"
    assert json.loads((job.place("second") / STAGE_FILE).read_text())["resumed"]
    assert not json.loads((job.place("third") / STAGE_FILE).read_text())["resumed"]


def test_what_was_made_from_older_results_is_no_result(job: Job) -> None:
    execute(job, chain([]))
    other = chain([], second=lambda _: "changed")

    execute(job, other[:3])

    assert job.results("second")
    assert not pipeline.is_current(job.folder, "third")
    with pytest.raises(RunError, match="stage 'third' is older than what it was made from"):
        job.results("third")


def test_finished_stages_are_taken_as_they_are(job: Job) -> None:
    calls: Calls = []
    stages = chain(calls)
    execute(job, stages[:2])

    execute(job, stages[2:], finished=["first", "aside"])

    assert calls == ["first", "aside", "second", "third"]
    execute(job, stages)
    assert len(calls) == 4, "their hashes are those of the whole way"


def test_stages_that_are_not_finished_are_not_taken(job: Job) -> None:
    calls: Calls = []

    with pytest.raises(RunError, match="stage 'first' is not finished"):
        execute(job, chain(calls)[2:], finished=["first"])
    assert calls == []


@pytest.mark.parametrize(
    ("meter", "gpu", "taken"),
    [
        ("rapl", False, "estimate"),
        ("auto", False, "estimate"),
        ("none", False, "none"),
        ("auto", True, "none"),
    ],
)
def test_beside_other_runs_no_counter_of_the_machine_is_read(
    job: Job, monkeypatch: pytest.MonkeyPatch, meter: str, gpu: bool, taken: str
) -> None:
    """It would count the joules of all of them for each."""
    opened: list[str] = []

    def open_meter(name: str, **_: object) -> Meter:
        opened.append(name)
        return meters.open_meter("none")

    monkeypatch.setattr(pipeline, "open_meter", open_meter)
    monkeypatch.setattr(pipeline.processes, "uses_gpu", lambda: gpu)
    recipe = replace(RECIPE, bench=BenchSettings(meter=meter))
    execute(Job(recipe, job.folder, alone=False), chain([])[:1])
    execute(Job(recipe, job.folder / "alone"), chain([])[:1])
    assert opened == [taken, meter]
    content = json.loads((job.place("first") / STAGE_FILE).read_text())
    assert ("energy_gap" in content) == gpu


def test_a_meter_that_fails_is_a_gap_and_costs_no_stage(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def stuck(_: Meter) -> Iterator[Window]:
        yield Window()
        raise MeasurementError("the counter did not move")

    monkeypatch.setattr(Meter, "measure", stuck)

    execute(job, chain([])[:1])

    content = json.loads((job.place("first") / STAGE_FILE).read_text())
    assert content["energy"] is None
    assert content["energy_gap"] == "the counter did not move"
    (row,) = ledger.read(job.folder / LEDGER_FILE)
    assert (row.stage, row.joules) == ("first", None)


def test_the_recipes_tdp_is_the_estimates(job: Job) -> None:
    bench = BenchSettings(meter="estimate", tdp_watts=65.0)
    execute(Job(replace(RECIPE, bench=bench), job.folder), chain([])[:1])

    content = json.loads((job.place("first") / STAGE_FILE).read_text())
    assert "TDP 65 W" in content["energy"]["note"]


def test_the_recipes_tdp_is_the_bench_stages(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = pytest.importorskip("greenprune.deployment", reason="needs the extra 'host'")
    asked: dict[str, Any] = {}

    def bench(_: Path, **options: Any) -> NoReturn:
        asked.update(options)
        raise MeasurementError("asked")

    monkeypatch.setattr(deployment, "bench", bench)
    measured = Job(replace(RECIPE, bench=BenchSettings(tdp_watts=65.0)), job.folder)
    with pytest.raises(MeasurementError, match="asked"):
        deployment.measure(Work(job=measured, folder=job.folder, checkpoint=job.folder))
    assert asked["tdp_watts"] == 65.0


@pytest.mark.parametrize(
    ("here", "everywhere", "told"),
    [("1", "1", ""), ("2", "4", "on other machines"), ("2", "2", "on this machine")],
)
def test_joules_without_those_of_other_processes_are_called_a_lower_bound(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    here: str,
    everywhere: str,
    told: str,
) -> None:
    """Nothing tells here what started the others."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("WORLD_SIZE", everywhere)
    measured = Job(replace(RECIPE, bench=BenchSettings(meter="estimate")), job.folder)

    execute(measured, chain([])[:1])

    (row,) = ledger.read(job.folder / LEDGER_FILE)
    assert row.joules is not None
    assert told in row.note
    assert ("a lower bound" in row.note) == bool(told)
    assert ("at least" in capsys.readouterr().err) == bool(told)


def test_a_failed_rerun_is_tried_again(job: Job) -> None:
    execute(job, chain([]))
    stages = chain([])
    broken = replace(failing("second"), needs=("first",), depends=lambda _: "changed")
    with pytest.raises(TrainingError):
        execute(job, [*stages[:2], broken, stages[3]])
    again: Calls = []

    execute(job, chain(again, second=lambda _: "changed"))

    assert again == ["second", "third"]


def test_checkpoints_are_of_one_stage_and_one_set_of_inputs(job: Job) -> None:
    places = {
        job.checkpoint(stage, inputs)
        for stage in ("train", "prune")
        for inputs in ("a" * 64, "b" * 64)
    }

    assert len(places) == 4


def test_leftovers_of_killed_runs_are_removed(job: Job) -> None:
    left = job.folder / ".partial-first-xyz"
    left.mkdir(parents=True)
    (left / "half").write_text("half")

    execute(job, chain([]))

    assert not left.exists()
    resumed = {
        name: json.loads((job.place(name) / STAGE_FILE).read_text())["resumed"]
        for name in ("first", "second")
    }
    assert resumed == {"first": True, "second": False}, "what the killed one spent is in no row"


def test_what_a_killed_process_spent_is_missing_also_where_the_next_one_failed(job: Job) -> None:
    """Killed, failed, finished: the row of the failed one says that it is not all."""
    (job.folder / ".partial-first-xyz").mkdir(parents=True)
    with pytest.raises(TrainingError):
        execute(job, [failing("first")])

    execute(job, chain([])[:1])

    notes = {row.stage: row.note for row in ledger.read(job.folder / LEDGER_FILE)}
    assert set(notes) == {"first-stopped", "first"}
    assert BEGUN_BEFORE in notes["first-stopped"]


def test_a_machine_where_nothing_can_be_measured_runs_and_says_why(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Meter("none")
    nothing.note = "no counter: none here; no estimate: /proc is not mounted"
    monkeypatch.setattr(pipeline, "open_meter", lambda name, **_: nothing)

    execute(job, chain([]))

    content = json.loads((job.place("first") / STAGE_FILE).read_text())
    assert content["energy"] is None
    assert content["energy_gap"] == nothing.note


def test_two_at_work_in_one_run_are_refused(job: Job) -> None:
    job.folder.mkdir()
    calls: Calls = []

    with (
        filelock.FileLock(job.folder / ".lock"),
        pytest.raises(RunError, match="another greenprune is at work in this run"),
    ):
        execute(job, chain(calls))
    assert calls == []

    execute(job, chain(calls))
    assert len(calls) == 4


def test_the_lock_is_given_back_after_a_failure(job: Job) -> None:
    with pytest.raises(TrainingError) as caught:
        execute(job, [failing("first")])

    execute(job, chain([]))
    assert caught.tb is not None, "what failed is still alive, and so is its lock object"


def test_a_run_folder_that_cannot_be_locked_is_a_storage_error(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(job.folder / ".lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)

    with pytest.raises(StorageError, match="no permission"):
        execute(job, chain([]))


def test_a_run_folder_that_is_a_file_is_a_storage_error(job: Job) -> None:
    job.folder.write_text("")

    with pytest.raises(StorageError, match="run"):
        execute(job, chain([]))


def test_a_torn_ledger_row_is_written_anew(job: Job) -> None:
    execute(job, chain([]))
    path = job.folder / LEDGER_FILE
    rows = ledger.read(path)
    path.write_bytes(path.read_bytes()[:-20])

    execute(job, chain([]))

    assert ledger.read(path) == rows


def test_a_row_that_is_there_twice_is_not_entered_again(job: Job) -> None:
    execute(job, chain([]))
    path = job.folder / LEDGER_FILE
    content = path.read_bytes()
    path.write_bytes(content + content.splitlines(keepends=True)[0])

    execute(job, chain([]))

    assert entered(job) == ["first", "aside", "second", "third", "first"]


def test_a_damaged_ledger_is_not_overwritten(job: Job) -> None:
    execute(job, chain([]))
    path = job.folder / LEDGER_FILE
    path.write_bytes(b"{broken\n" + path.read_bytes())

    with pytest.raises(RunError, match=r"ledger\.jsonl, line 1"):
        execute(job, chain([]))

    assert path.read_bytes().startswith(b"{broken\n")


def test_resuming_after_a_kill_between_the_folder_and_its_ledger_row(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = ledger.append

    def killed(path: Path, row: ledger.Row) -> None:
        if row.stage == "second":
            raise KeyboardInterrupt
        append(path, row)

    calls: Calls = []
    monkeypatch.setattr(ledger, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(job, chain(calls))
    assert entered(job) == ["first", "aside"]
    monkeypatch.setattr(ledger, "append", append)

    execute(job, chain(calls))

    assert calls == ["first", "aside", "second", "third"], "second is complete, it ran once"
    assert entered(job) == ["first", "aside", "second", "third"]


def test_a_kill_inside_a_stage_reruns_that_stage_alone(job: Job) -> None:
    calls: Calls = []
    stages = chain(calls)

    def killed(work: Work) -> NoReturn:
        (work.folder / STAGE_FILE).write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job, [*stages[:2], replace(stages[2], function=killed), stages[3]])
    execute(job, stages)

    assert calls == ["first", "aside", "second", "third"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"inputs_sha256": null}'])
def test_a_damaged_stage_is_a_run_error_that_says_what_to_do(job: Job, content: str) -> None:
    execute(job, chain([]))
    (job.place("aside") / STAGE_FILE).write_text(content)

    with pytest.raises(RunError, match=r"aside/stage\.json: .*remove"):
        execute(job, chain([]))


def test_the_recipe_is_noted_in_the_runs_folder(job: Job) -> None:
    pipeline.write_run(job)
    (job.folder / RUN_FILE).write_text("{half")
    pipeline.write_run(job)

    assert recipe.read_back(job.folder / RUN_FILE) == RECIPE


def test_a_missing_stage_is_none_and_its_results_say_what_to_do(job: Job) -> None:
    assert pipeline.read_stage(job.place("first")) is None
    with pytest.raises(RunError, match=r"'first' is not finished; `greenprune run` with"):
        job.results("first")


def test_progress_goes_to_stderr(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    execute(job, chain([]))
    execute(job, chain([]))

    out, err = capsys.readouterr()
    assert out == ""
    assert "[1/4] first: complete" in err
