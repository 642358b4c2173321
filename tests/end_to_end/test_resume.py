"""Killed and interrupted at many points, a run ends where an undisturbed one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from greenprune import bundle, storage
from greenprune.nncec import ledger

LIMIT_SECONDS = 120.0


class Running:
    """``greenprune run`` under way, with what it has said so far on stderr."""

    def __init__(self, line: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            **line,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # a shell's background job ignores interrupts, and so would whatever the tests start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.said: list[str] = []

    def wait_for_stage(self, stage: str) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.said.append(text.rstrip("\n"))
            if text.endswith(f"] {stage} …\n"):
                return
        pytest.fail(f"stage '{stage}' never began; it said:\n" + "\n".join(self.said))

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while not true():
            assert self.process.poll() is None, f"ended before {what}: {self.said}"
            assert time.monotonic() < limit, f"waited for {what} in vain"
            time.sleep(0.005)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals, *, group: bool = False) -> int:
        """Send the signal, to the whole group as a terminal's Ctrl-C does; the exit status."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=LIMIT_SECONDS)
        self.said += rest.splitlines()
        return self.process.returncode

    def complete(self) -> list[str]:
        """The stages that were skipped."""
        return [
            text.split()[1].removesuffix(":") for text in self.said if text.endswith(": complete")
        ]


class Story:
    """One run folder, disturbed again and again; each chapter checks what is left."""

    def __init__(self, folder: Path, start: Callable[[], Running]) -> None:
        self.folder = folder
        self.start = start
        self.done: dict[str, bytes] = {}

    def begin(self, stage: str) -> Running:
        running = self.start()
        running.wait_for_stage(stage)
        # by now the starter has cleared what the killed one left; its own folder may be there
        foreign = [
            path.name
            for path in self.folder.glob(".partial-*")
            if not path.name.startswith(f".partial-{stage}-")
        ]
        assert foreign == []
        return running

    def check(self, running: Running, stage: str) -> None:
        """What was complete was skipped and is untouched; the disturbed stage is not there."""
        assert set(self.done) <= set(running.complete())
        assert not (self.folder / stage).exists()
        for name, content in self.done.items():
            assert (self.folder / name / "stage.json").read_bytes() == content, name
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != "checkpoints" and not path.name.startswith("."):
                content = (path / "stage.json").read_bytes()
                assert json.loads(content)["stage"] == path.name
                self.done[path.name] = content


def final_weights(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): storage.sha256(path)
        for path in sorted(run.rglob("*.safetensors"))
    }


def test_disturbed_run_ends_like_an_undisturbed_one(
    finished: Any, command_line: Any, command: Any, schedule: Any, messages: Any, tmp_path: Path
) -> None:
    # ONNX Runtime alone, as measuring is what takes the time; the table is certified on it
    options = ("--name", "digits", *schedule(), "--set", 'compile.runtimes=["onnxruntime"]')
    run = tmp_path / "runs" / "digits"
    story = Story(run, lambda: Running(command_line("greenprune", "run", *options)))

    running = story.begin("train")
    checkpoints = run / "checkpoints"
    running.wait_until(lambda: any(checkpoints.glob("train-*")), "the first checkpoint")
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    story.check(running, "train")
    assert list(checkpoints.glob("train-*")), "nothing to go on from"

    running = story.begin("finetune-mild")
    assert running.end(signal.SIGINT) == 130
    story.check(running, "finetune-mild")
    assert messages("\n".join(running.said)) == [
        "interrupted; the same command goes on where this one stopped"
    ]
    assert not list(run.glob(".partial-*")), "an interrupted run clears up behind itself"

    running = story.begin("finetune-aggressive")
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    story.check(running, "finetune-aggressive")

    running = story.begin("export")
    running.wait_until(lambda: any(run.glob(".partial-export-*/*")), "the first file")
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    story.check(running, "export")
    assert list(run.glob(".partial-export-*")), "the kill came too late to prove anything"

    running = story.begin("bench-x86")
    running.wait_until(lambda: len(running.workers()) == 4, "four workers")
    workers = running.workers()
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    story.check(running, "bench-x86")
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "workers outlive the one who asked them"

    running = story.begin("bench-x86")
    running.wait_until(lambda: len(running.workers()) == 4, "four workers")
    assert running.end(signal.SIGINT, group=True) == 130
    story.check(running, "bench-x86")
    assert messages("\n".join(running.said)) == [
        "interrupted; the same command goes on where this one stopped"
    ]

    done = command("greenprune", "run", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert not list(run.rglob(".partial-*"))
    assert not any(checkpoints.glob("*"))
    assert final_weights(run) == final_weights(finished.folder)
    opened, undisturbed = (
        bundle.open_bundle(folder / "bundle-x86" / "bundle") for folder in (run, finished.folder)
    )
    opened.verify()
    # the undisturbed run was certified on whichever runtime won its race
    assert opened.manifest.selector.certified_on == "x86, onnxruntime, fp32"
    chosen, wanted = opened.manifest.selector, undisturbed.manifest.selector
    assert replace(chosen, certified_on=wanted.certified_on) == wanted
    assert opened.manifest.provenance["networks"] == undisturbed.manifest.provenance["networks"]
    answer = json.loads(done.stdout)
    for name, found in answer["variants"].items():
        for key in ("accuracy", "macs", "params"):
            assert found[key] == finished.answer["variants"][name][key], (name, key)
    rows = [row.stage for row in ledger.read(run / "ledger.jsonl")]
    whole = [stage for stage in rows if not stage.endswith("-stopped")]
    assert whole == [row.stage for row in ledger.read(finished.folder / "ledger.jsonl")]
    # a kill leaves no time to write, and an interrupt may come before a stage measures; the joules
    # of one that came while it worked are not lost
    stopped = set(rows) - set(whole)
    assert "bench-x86-stopped" in stopped
    assert stopped <= {"finetune-mild-stopped", "bench-x86-stopped"}


def test_two_at_once_in_one_run(
    command_line: Any, command: Any, schedule: Any, messages: Any, tmp_path: Path
) -> None:
    running = Running(command_line("greenprune", "run", *schedule(train__epochs="10000")))
    running.wait_for_stage("train")
    second = command("greenprune", "run", *schedule(train__epochs="10000"))
    assert running.process.poll() is None
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    assert second.returncode == 2
    (message,) = messages(second.stderr)
    assert "another greenprune is at work" in message
    assert str(Path("runs") / "lenet5-digits") in message
    assert not (tmp_path / "runs" / "lenet5-digits" / "train").exists()
