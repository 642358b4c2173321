"""What machine this is, on trees of files like those of real boards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import jetson_tree

from greenprune.errors import TargetError
from greenprune_targets.board import BOARDS, JETPACKS, check_board, describe


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
