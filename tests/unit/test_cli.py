"""The commands: what they print, where, and with which exit status."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from greenprune import cli, recipe, registry
from greenprune._version import __version__
from greenprune.errors import DataError, GreenpruneError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit status, stdout, stderr."""

    def run(*arguments: str, command: Callable[[Sequence[str]], None] = cli.main) -> Any:
        with pytest.raises(SystemExit) as caught:
            command(list(arguments))
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


def replaced_by(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let ``greenprune recipes`` end in ``error``."""

    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(recipe, "built_in_recipes", fail)


def test_version(call: Run) -> None:
    status, out, _ = call("--version")

    assert (status, __version__ in out) == (0, True)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command(call: Run, flag: str) -> None:
    status, out, _ = call(flag)

    assert status == 0
    for name in ("run", "prune", "export", "bench", "report", "doctor", "targets", "recipes"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize("name", sorted(cli.commands.commands))
def test_every_command_explains_itself(call: Run, name: str) -> None:
    status, out, _ = call(name, "--help")

    assert status == 0
    assert out.startswith(f"Usage: greenprune {name}")
    assert "--json" in out


@pytest.mark.parametrize(
    ("command", "name"),
    [(cli.export_main, "greenprune-export"), (cli.bench_main, "greenprune-bench")],
)
def test_the_two_short_commands(
    call: Run, command: Callable[[Sequence[str]], None], name: str
) -> None:
    status, out, _ = call("--help", command=command)

    assert (status, out.split(" [")[0]) == (0, f"Usage: {name}")


def test_recipes_as_json_and_as_text(call: Run) -> None:
    status, out, err = call("recipes", "--json")

    assert (status, err) == (0, "")
    assert json.loads(out) == recipe.built_in_recipes()
    _, text, _ = call("recipes")
    assert [line.split()[0] for line in text.splitlines()] == list(recipe.built_in_recipes())


def test_targets_as_json_and_as_text(call: Run) -> None:
    status, out, err = call("targets", "--json")

    assert (status, err) == (0, "")
    found = json.loads(out)
    assert set(registry.TARGETS) <= set(found)
    assert found["x86"]["status"] == "ready"
    assert "onnxruntime" in found["x86"]["runtimes_here"]
    assert "never yet run on NVIDIA hardware" in found["cuda"]["status"]
    for target in found.values():
        assert target["description"]
        assert set(target["runtimes_here"]) <= set(target["runtimes"])
    _, text, _ = call("targets")
    names = [line.split()[0] for line in text.splitlines()]
    assert names == [*found, *registry.ALIASES]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "none.toml"), "recipe 'none.toml': no such file"),
        (("run", "--set", "train.epoch=3"), "unknown key 'train.epoch' (did you mean 'epochs'?)"),
        (("prune", "--set", "train.epochs"), "expected KEY=VALUE"),
        (("export",), "no finished run"),
        (("bench", "none.bundle"), "none.bundle"),
        (("report",), "run"),
        (("rnu",), "No such command 'rnu'"),
        (("run", "--color"), "No such option"),
        (("bench",), "Missing argument"),
        (("bench", "x", "--preset", "slow"), "quick"),
        (("bench", "x", "--threads", "many"), "not a valid integer"),
    ],
)
def test_what_the_user_must_change_is_status_2_and_one_message(
    call: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)

    status, out, err = call(*arguments)

    assert (status, out) == (2, "")
    assert told in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_our_errors_carry_the_commands_name(call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced_by(monkeypatch, DataError("images: expected some, found none; add some"))

    assert call("recipes") == (
        2,
        "",
        "greenprune: images: expected some, found none; add some\n",
    )


def test_every_error_of_the_tree_is_status_2(call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced_by(monkeypatch, GreenpruneError("told"))

    assert call("recipes")[0] == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.ENOENT])
def test_an_error_of_the_system_is_status_2_and_names_the_file(
    call: Run, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    replaced_by(monkeypatch, OSError(code, os.strerror(code), "some/file"))

    status, _, err = call("recipes")

    assert status == 2
    assert err.startswith("greenprune: some/file: ")


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced_by(monkeypatch, RuntimeError("a defect"))

    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["recipes"])


def test_an_interrupt_is_status_130_and_says_how_to_go_on(
    call: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced_by(monkeypatch, KeyboardInterrupt())

    status, out, err = call("recipes")

    assert (status, out) == (130, "")
    assert "interrupted; the same command goes on where this one stopped" in err


def test_run_hands_its_options_to_the_public_function(
    call: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from greenprune import api

    seen: dict[str, Any] = {}

    def run(given: str | None, **options: Any) -> dict[str, Any]:
        seen.update(options, recipe=given)
        return {"run": "ε"}

    monkeypatch.setattr(api, "run", run)

    status, out, _ = call(
        "run", "mine.toml", "--set", "a=1", "--set", "b=2", "--name", "n", "--runs", "r", "--json"
    )

    assert (status, json.loads(out)) == (0, {"run": "ε"})
    assert seen == {
        "recipe": "mine.toml",
        "overrides": ("a=1", "b=2"),
        "name": "n",
        "runs": Path("r"),
    }


LIGHT = """
import sys
from greenprune import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    heavy = {"torch", "torchvision", "onnx", "openvino", "sklearn", "matplotlib"} & set(sys.modules)
    sys.exit(f"imported: {heavy}" if heavy else end.code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "--json"], ["targets", "--json"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_and_its_device_side_import_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import greenprune, greenprune.cli, greenprune.harness, greenprune.runtime\n"
        "import greenprune.nncec, greenprune.meters, greenprune.bundle, greenprune.registry\n"
        "assert set(greenprune.__all__) <= set(dir(greenprune))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "greenprune.cli", "recipes", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, json.loads(done.stdout)) == (0, recipe.built_in_recipes())
