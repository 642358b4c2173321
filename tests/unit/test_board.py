"""What machine this is, on trees of files like those of real boards."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import jetson_tree

from greenprune.errors import MeasurementError, TargetError
from greenprune.harness import protocol
from greenprune.harness.environment import diagnose, print_diagnosis
from greenprune.meters import nvml
from greenprune.registry import load_target
from greenprune_targets import cuda
from greenprune_targets.board import BOARDS, JETPACKS, Board, check_board, describe

JETSONS = ("jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor")
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.parametrize("name", BOARDS.values())
def test_each_supported_board_is_recognised(tmp_path: Path, name: str) -> None:
    board = describe(jetson_tree.write(tmp_path, name))
    assert board.model == jetson_tree.MODELS[name]
    assert (board.name, board.supported, board.is_jetson) == (name, True, True)
    check_board(board, name)


@pytest.mark.parametrize(
    ("l4t", "release", "tensorrt", "cuda", "python"),
    [
        ("36.4.0", "6.1", "10.3", "12.6", "3.10"),
        ("36.4", "6.1", "10.3", "12.6", "3.10"),
        ("36.4.3", "6.2", "10.3", "12.6", "3.10"),
        ("39.2.0", "7.2", "10.16.2", "13.2", "3.12"),
    ],
)
def test_the_release_tells_what_jetpack_carries(
    tmp_path: Path, l4t: str, release: str, tensorrt: str, cuda: str, python: str
) -> None:
    jetpack = describe(jetson_tree.write(tmp_path, l4t=l4t)).jetpack
    assert jetpack is not None
    assert (jetpack.version, jetpack.tensorrt) == (release, tensorrt)
    assert (jetpack.cuda, jetpack.python) == (cuda, python)


def test_a_release_that_is_not_in_the_table_is_not_guessed_at(tmp_path: Path) -> None:
    board = describe(jetson_tree.write(tmp_path, l4t="41.1.0"))
    assert (board.l4t, board.jetpack, board.supported) == ("41.1.0", None, True)


def test_the_table_is_keyed_by_whole_releases() -> None:
    assert all(len(l4t.split(".")) == 3 for l4t in JETPACKS)


@pytest.mark.parametrize(
    ("mode", "name"), [(0, "15W"), (1, "25W"), (2, "MAXN_SUPER"), (7, "mode 7"), (None, None)]
)
def test_the_power_mode_has_its_name(tmp_path: Path, mode: int | None, name: str | None) -> None:
    assert describe(jetson_tree.write(tmp_path, power_mode=mode)).power_mode == name


def test_the_cuda_toolkit_is_read_and_a_broken_file_is_none(tmp_path: Path) -> None:
    assert describe(jetson_tree.write(tmp_path)).cuda == "12.6.68"
    (tmp_path / "usr/local/cuda/version.json").write_text("[]")
    assert describe(tmp_path).cuda is None


def test_a_machine_that_tells_nothing_is_no_jetson(tmp_path: Path) -> None:
    board = describe(tmp_path)
    assert not board.is_jetson
    assert board.model is board.name is board.power_mode is None
    with pytest.raises(TargetError, match="no Jetson; use --target cuda or x86"):
        check_board(board)


@pytest.mark.parametrize(
    ("model", "l4t"), [("xavier-nx", "35.4.1"), ("agx-xavier", "35.6.0"), ("nano", "32.7.1")]
)
def test_xavier_and_older_are_out_of_scope(tmp_path: Path, model: str, l4t: str) -> None:
    board = describe(jetson_tree.write(tmp_path, model, l4t))
    assert not board.supported
    with pytest.raises(TargetError, match=r"TensorRT 8\.5, Python 3\.8.*out of scope"):
        check_board(board)


@pytest.mark.parametrize("l4t", ["35.4.1", "36.3.0"])
def test_an_orin_with_an_old_jetpack_is_told_to_upgrade(tmp_path: Path, l4t: str) -> None:
    board = describe(jetson_tree.write(tmp_path, "orin-nx", l4t))
    with pytest.raises(TargetError, match=rf"L4T {l4t}.*install JetPack 6\.1 or later"):
        check_board(board)


def test_a_bundle_for_another_board_is_refused_by_name(tmp_path: Path) -> None:
    board = describe(jetson_tree.write(tmp_path, "orin-nano"))
    with pytest.raises(TargetError, match=r"for agx-orin was given, and this is orin-nano"):
        check_board(board, "agx-orin")


def test_a_jetson_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    jetson_tree.write(tmp_path)
    (tmp_path / "proc/device-tree/model").write_text("Acme Vision Box\0")
    with pytest.raises(TargetError, match=r"Acme Vision Box.*supported are agx-orin"):
        check_board(describe(tmp_path))


@pytest.fixture
def orin_nx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """This machine is one, with its TensorRT."""
    board = describe(jetson_tree.write(tmp_path, "orin-nx"))
    for module in ("jetson", "cuda"):
        monkeypatch.setattr(f"greenprune_targets.{module}.describe", lambda: board)
    monkeypatch.setattr("greenprune_targets.tensorrt_target.find_spec", lambda name: name)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    return board


@pytest.mark.usefixtures("orin_nx")
def test_only_its_own_target_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Jetson's GPU is none of the target cuda's either, whatever NVML says of it."""
    monkeypatch.setattr(cuda, "_has_gpu", lambda: True)
    here = [name for name in (*JETSONS, "cuda") if load_target(name).is_here()]
    assert here == ["jetson-orin-nx"]
    with pytest.raises(TargetError, match="a bundle for agx-orin was given, and this is orin-nx"):
        load_target("jetson-agx-orin").open(tmp_path / "dense.onnx", "tensorrt", 0)
    with pytest.raises(TargetError, match=r"found .*Orin NX.* --target jetson-orin-nx"):
        load_target("cuda").open(tmp_path / "dense.onnx", "tensorrt", 0)


def test_cuda_is_here_with_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenprune_targets.tensorrt_target.find_spec", lambda name: name)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("greenprune_targets.cuda.describe", lambda: describe(Path("no such")))
    monkeypatch.setattr(cuda, "_has_gpu", cuda._has_gpu.__wrapped__)
    for found in (True, False):
        monkeypatch.setattr(nvml, "is_here", lambda found=found: found)
        assert load_target("cuda").is_here() == found

    def fails() -> bool:
        raise MeasurementError("the driver fails")

    monkeypatch.setattr(nvml, "is_here", fails)
    assert not load_target("cuda").is_here()


@pytest.mark.parametrize("l4t", [l4t for l4t, jetpack in JETPACKS.items() if jetpack.cuda])
def test_the_extra_brings_cuda_python_of_the_jetpack(l4t: str) -> None:
    """By its Python; JetPack 6.0 is too old for greenprune."""
    jetpack = JETPACKS[l4t]
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    wanted = [Requirement(line) for line in extras["jetson"]]
    environment = {"python_version": jetpack.python}
    (chosen,) = [each for each in wanted if each.marker and each.marker.evaluate(environment)]
    assert chosen.name == "cuda-python"
    assert jetpack.version == "6.0" or chosen.specifier.contains(f"{jetpack.cuda}.0")
    following = int(str(jetpack.cuda).partition(".")[0]) + 1
    assert not chosen.specifier.contains(f"{following}.0"), "pip would take another CUDA's"


@pytest.mark.parametrize(
    ("target", "runtime", "command"),
    [
        ("x86", "openvino", "pip install openvino"),
        ("arm", "onnxruntime", "pip install onnxruntime"),
        ("cuda", "tensorrt", r"pip install 'greenprune\[cuda\]'"),
        ("jetson-thor", "tensorrt", "on the board, sudo apt install .*--system-site"),
    ],
)
def test_a_missing_runtime_s_command_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    runtime: str,
    command: str,
) -> None:
    found = load_target(target)
    monkeypatch.setattr(type(found), "runtimes_here", lambda self: ())
    dense = SimpleNamespace(artifacts={runtime: "dense"})
    manifest: Any = SimpleNamespace(name="digits", target=target, variants={"dense": dense})
    with pytest.raises(TargetError, match=f"installed here are none; {command}"):
        protocol.choose_runtimes(manifest, None)
    told = diagnose()
    assert told["targets"][target]["lacks"][runtime] == found.how_to_install(runtime)
    print_diagnosis(told)
    assert f"{runtime} is not installed: {found.how_to_install(runtime)}" in capsys.readouterr().out
