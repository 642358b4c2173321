"""Files and folders that are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenprune import storage
from greenprune.errors import StorageError

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def failing(code: int) -> Any:
    """A function that fails as the operating system does."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_bytes_makes_folders_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    storage.write_bytes(path, b"old")
    storage.write_bytes(path, b"\0new")

    assert path.read_bytes() == b"\0new"
    assert names(path.parent) == ["file.bin"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644, "others may read it"


def test_text_is_utf8_and_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "text", "µJ\n")
    storage.write_json(tmp_path / "json", {"ε": [1, None]})

    assert (tmp_path / "text").read_bytes() == b"\xc2\xb5J\n"
    assert (tmp_path / "json").read_text(encoding="utf-8") == (
        '{\n  "ε": [\n    1,\n    null\n  ]\n}\n'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "json", float("nan"))
    assert "ε" in (tmp_path / "json").read_text(encoding="utf-8"), "the old file stays"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "no permission; choose another folder"),
        (errno.EPERM, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str, place: str
) -> None:
    path = tmp_path / "file.bin"
    storage.write_bytes(path, b"old")
    if place == "fsync":
        monkeypatch.setattr(os, "fsync", failing(code))
    else:
        monkeypatch.setattr(Path, "replace", failing(code))

    with pytest.raises(StorageError) as caught:
        storage.write_bytes(path, b"new")

    assert str(path) in str(caught.value)
    assert advice in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"], "nothing is left behind"


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> NoReturn:
        raise KeyboardInterrupt

    path = tmp_path / "file.bin"
    storage.write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", interrupt)

    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(path, b"new")

    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match=r"file.*cannot be written"):
        storage.write_bytes(tmp_path / "file" / "inside", b"")
    with (
        pytest.raises(StorageError, match=r"file.*cannot be written"),
        storage.atomic_folder(tmp_path / "file" / "inside"),
    ):
        pass


def test_atomic_folder_says_where_there_is_no_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", failing(errno.EACCES))

    with (
        pytest.raises(StorageError, match=r"made: .*no permission"),
        storage.atomic_folder(tmp_path / "made"),
    ):
        pytest.fail("there is no folder to fill")


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="no permission"):
            storage.write_bytes(tmp_path / "file", b"")
        with (
            pytest.raises(StorageError, match="no permission"),
            storage.atomic_folder(tmp_path / "folder"),
        ):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_atomic_folder_appears_at_the_end_and_whole(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "made"

    with storage.atomic_folder(destination) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content")
        assert not destination.exists()
        assert folder.parent == destination.parent, "a rename must not cross file systems"

    assert (destination / "sub" / "file").read_text() == "content"
    assert names(destination.parent) == ["made"]
    assert stat.S_IMODE(destination.stat().st_mode) == 0o755


def test_atomic_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    destination = tmp_path / "made"
    destination.mkdir()
    (destination / "old").write_text("old")

    with storage.atomic_folder(destination) as folder:
        (folder / "new").write_text("new")
        assert names(destination) == ["old"]

    assert names(destination) == ["new"]
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_a_failure_inside_atomic_folder_changes_nothing(
    tmp_path: Path, existed: bool, problem: type[BaseException]
) -> None:
    destination = tmp_path / "made"
    if existed:
        destination.mkdir()
        (destination / "old").write_text("old")

    def fill() -> None:
        with storage.atomic_folder(destination) as folder:
            (folder / "new").write_text("new")
            raise problem

    with pytest.raises(problem):
        fill()

    assert names(tmp_path) == (["made"] if existed else [])
    assert not existed or names(destination) == ["old"]


def test_a_full_disk_inside_atomic_folder_is_a_storage_error(tmp_path: Path) -> None:
    destination = tmp_path / "made"

    def fill() -> None:
        with storage.atomic_folder(destination) as folder:
            (folder / "half").write_text("half")
            failing(errno.ENOSPC)()

    with pytest.raises(StorageError, match=r"made: .*the disk is full; free some space"):
        fill()

    assert names(tmp_path) == []


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "made"
    destination.mkdir()
    (destination / "old").write_text("old")
    replace = Path.replace
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def once(self: Path, target: Path) -> Path:
        if Path(target) == destination and failures:
            raise failures.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(StorageError), storage.atomic_folder(destination) as folder:
        (folder / "new").write_text("new")

    assert names(destination) == ["old"]


KILLED = """
import os, pathlib, sys
from greenprune import storage
place = pathlib.Path(sys.argv[1])
os.fsync = lambda _: os._exit(9)  # as a kill: nothing below runs
if sys.argv[2] == "file":
    storage.write_bytes(place / "kept", b"new")
with storage.atomic_folder(place / "folder") as folder:
    (folder / "half").write_text("half")
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_killed_writer_leaves_only_partials_that_can_be_removed(
    tmp_path: Path, what: str
) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), what], check=False)

    assert done.returncode == 9
    left = [name for name in names(tmp_path) if name.startswith(storage.PARTIAL_PREFIX)]
    assert len(left) == 1
    assert (tmp_path / left[0]).is_dir() == (what == "folder")
    storage.remove_partial(tmp_path)
    assert names(tmp_path) == ["folder", "kept"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert names(tmp_path / "folder") == ["old"]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_reads_the_whole_file(tmp_path: Path, size: int) -> None:
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "file").write_bytes(content)

    assert storage.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)))
def test_sha256_of_does_not_depend_on_the_order_of_keys(content: dict[str, Any]) -> None:
    reordered = dict(reversed(content.items()))

    assert storage.sha256_of(content) == storage.sha256_of(reordered)
    assert storage.sha256_of(content) != storage.sha256_of([content])


def test_sha256_of_tells_values_apart() -> None:
    different = [1, "1", 1.5, None, True, [1], {"1": 1}, {"a": {"b": 1}}, {"a": {"b": 2}}]

    assert len({storage.sha256_of(content) for content in different}) == len(different)
