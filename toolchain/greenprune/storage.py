"""Files that are either whole or absent: atomic writes, folders and checksums (device side)."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import StorageError

PARTIAL_PREFIX = ".partial-"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError below into a StorageError that names ``path`` and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # a failed copy names its source, and that is not what is full
            raise StorageError(
                f"{path}: cannot be written: the disk is full; free some space and run the same "
                "command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "no permission; choose another folder or change its permissions"
        else:
            advice = error.strerror or str(error)
        raise StorageError(f"{error.filename or path}: cannot be written: {advice}") from error


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """:func:`storage_errors` for code that reads too: a full disk alone becomes a StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with storage_errors(path):
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, whole.

    Raises:
        StorageError: the disk is full or the folder is not writable; ``path`` is untouched.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def save_array(path: Path, array: NDArray[Any]) -> None:
    """:func:`write_bytes` of a ``.npy`` file of plain numbers (np.save loses the error's cause)."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_bytes(path, content.getvalue())


def write_text(path: Path, content: str) -> None:
    """:func:`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """:func:`write_bytes` of indented JSON; NaN and infinity are refused, they are not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``destination`` on success and vanishes on failure.

    An existing ``destination`` is replaced. A process killed inside leaves only a
    ``.partial-`` folder, which :func:`remove_partial` clears.
    """
    with storage_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f"{PARTIAL_PREFIX}{destination.name}-", dir=destination.parent)
        )
        temporary.chmod(0o755)
    try:
        with full_disk(destination):
            yield temporary
        with storage_errors(destination):
            _sync_files(temporary)
            if destination.exists():
                old = destination.with_name(f"{PARTIAL_PREFIX}old-{temporary.name}")
                destination.replace(old)
                try:
                    temporary.replace(destination)
                except BaseException:
                    old.replace(destination)
                    raise
                shutil.rmtree(old, ignore_errors=True)  # remove_partial takes what is left
            else:
                temporary.replace(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def has_partial(folder: Path, name: str) -> bool:
    """Whether a killed writer of the folder ``name`` left something in ``folder``."""
    return any(folder.glob(f"{PARTIAL_PREFIX}{glob.escape(name)}-*"))


def remove_partial(folder: Path, name: str = "") -> None:
    """Remove what killed writers of the folder ``name`` (of anything) left in ``folder``."""
    ours = f"{glob.escape(name)}-" if name else ""
    old = f"old-{PARTIAL_PREFIX}{ours}"
    for path in (*folder.glob(f"{PARTIAL_PREFIX}{ours}*"), *folder.glob(f"{PARTIAL_PREFIX}{old}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(content: Any) -> str:
    """The SHA-256 of JSON-like ``content`` in canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def user_cache(kind: str) -> Path:
    """``$XDG_CACHE_HOME/greenprune/<kind>``, else under ``~/.cache``: what is made on this machine
    and does not travel."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "greenprune" / kind
