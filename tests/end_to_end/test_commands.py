"""The small commands, help and version: what a person and a program read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import greenprune
from greenprune.registry import TARGETS

COMMANDS = {
    "greenprune": ["greenprune"],
    "run": ["greenprune", "run"],
    "prune": ["greenprune", "prune"],
    "export": ["greenprune", "export"],
    "bench": ["greenprune", "bench"],
    "report": ["greenprune", "report"],
    "doctor": ["greenprune", "doctor"],
    "targets": ["greenprune", "targets"],
    "recipes": ["greenprune", "recipes"],
    "greenprune-export": ["greenprune-export"],
    "greenprune-bench": ["greenprune-bench"],
}


def test_version(command: Any) -> None:
    done = command("greenprune", "--version")
    assert done.returncode == 0
    assert greenprune.__version__ in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(command: Any, name: str) -> None:
    done = command(*COMMANDS[name], "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Usage:" in done.stdout
    _, separator, examples = done.stdout.partition("Example")
    assert separator, "no example"
    assert "greenprune" in examples
    assert command(*COMMANDS[name], "-h").stdout == done.stdout


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("doctor", {"python", "greenprune", "packages", "targets", "meters"}, ["x86", "meters"]),
        ("targets", set(TARGETS), ["x86", "jetson-thor", "int8", "never yet run"]),
        ("recipes", {"lenet5-digits", "resnet56-cifar10"}, ["lenet5-digits", "resnet56-cifar10"]),
    ],
)
def test_what_is_there(command: Any, name: str, keys: set[str], words: list[str]) -> None:
    plain = command("greenprune", name)
    assert plain.returncode == 0, plain.stderr
    for word in words:
        assert word in plain.stdout
    done = command("greenprune", name, "--json")
    assert done.returncode == 0, done.stderr
    assert keys <= set(json.loads(done.stdout))
    assert done.stderr == ""


def test_doctor_says_how_to_get_what_is_missing(command: Any) -> None:
    found = json.loads(command("greenprune", "doctor", "--json").stdout)
    for name, meter in found["meters"].items():
        assert meter["works"] or meter["reason"], f"{name} does not work, and nobody says why"


def test_report_is_written_again(finished: Any, command: Any, tmp_path: Path) -> None:
    finished.copy(tmp_path / "runs")
    done = command("greenprune", "report", "--json")
    assert done.returncode == 0, done.stderr
    page = tmp_path / json.loads(done.stdout)["report"]
    assert "greenprune report" in page.read_text(encoding="utf-8")
    named = command("greenprune", "report", "digits", "-o", "out/page.html")
    assert named.returncode == 0, named.stderr
    assert named.stdout.strip() == "out/page.html"
    assert "greenprune report" in (tmp_path / "out" / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [["run", "--nonsense"], ["nonsense"], ["bench"], ["bench", "x.bundle", "--preset", "fast"]],
)
def test_wrong_usage(command: Any, arguments: list[str]) -> None:
    done = command("greenprune", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error:" in done.stderr
    assert "Traceback" not in done.stderr
