"""Commands as a person types them, and one finished run that all these tests share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest

pytest.importorskip("torch", reason="the whole way needs the extra 'host'")

SHORT = {
    "threads": "1",
    "train.epochs": "6",
    "sparsify.epochs": "2",
    "finetune.mild.epochs": "2",
    "finetune.aggressive.epochs": "2",
}
"""A schedule of seconds; one thread, so that neighbours on the machine do not matter."""

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that is complete; tests look, and change only copies."""

    folder: Path
    answer: dict[str, Any]
    """What ``greenprune run --json`` printed."""
    stdout: str
    stderr: str

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle-x86" / "bundle"

    def copy(self, runs: Path) -> Path:
        """The run again, below ``runs``, for a test to change; times are kept."""
        return Path(shutil.copytree(self.folder, runs / self.folder.name))


def short_schedule(**more: str) -> list[str]:
    settings = SHORT | {key.replace("__", "."): value for key, value in more.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def script(name: str) -> str:
    """The installed command's path."""
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    assert found, f"{name} is not installed beside this Python; run: pip install -e '.[host,x86]'"
    return found


def environment(temporary: Path, **more: str) -> dict[str, str]:
    """Ours, with a temporary folder apart, as a measurement locks it for the whole machine."""
    temporary.mkdir(exist_ok=True)
    return os.environ | {"TMPDIR": str(temporary), "COLUMNS": "120"} | more


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole test session, whichever process of it we are."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def schedule() -> Callable[..., list[str]]:
    """``--set`` options of the short schedule; ``train__epochs="3"`` changes one."""
    return short_schedule


@pytest.fixture
def command_line(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Arguments of ``subprocess`` for a command in the test's own folder."""

    def build(name: str, *arguments: str | Path, **variables: str) -> dict[str, Any]:
        return {
            "args": [script(name), *map(str, arguments)],
            "cwd": tmp_path,
            "env": environment(tmp_path / "tmp", **variables),
            "stdin": subprocess.DEVNULL,
            "text": True,
        }

    return build


@pytest.fixture
def command(command_line: Callable[..., dict[str, Any]]) -> Command:
    """``command("greenprune", "run", ...)`` runs to its end in the test's own folder."""

    def run(name: str, *arguments: str | Path, **variables: str) -> Any:
        line = command_line(name, *arguments, **variables)
        return subprocess.run(**line, capture_output=True, check=False, timeout=300)

    return run


@pytest.fixture(scope="session")
def finished(shared_folder: Path) -> Finished:
    """The default job on a short schedule, walked once for all processes of the session."""
    place = shared_folder / "finished"
    with filelock.FileLock(shared_folder / "finished.lock"):
        place.mkdir(exist_ok=True)
        if not (place / "stdout").is_file():
            done = subprocess.run(
                [script("greenprune"), "run", "--json", "--name", "digits", *short_schedule()],
                cwd=place,
                env=environment(place / "tmp"),
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            (place / "stderr").write_text(done.stderr)
            (place / "stdout").write_text(done.stdout)
    stdout = (place / "stdout").read_text()
    return Finished(
        folder=place / "runs" / "digits",
        answer=json.loads(stdout),
        stdout=stdout,
        stderr=(place / "stderr").read_text(),
    )


@pytest.fixture
def messages() -> Callable[[str], list[str]]:
    """The lines on stderr that are not a stage's progress."""

    def others(stderr: str) -> list[str]:
        return [line for line in stderr.splitlines() if line and not line.startswith("[")]

    return others
