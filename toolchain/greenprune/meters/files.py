"""Numbers out of the kernel's files, with errors that say what to do."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from greenprune.errors import MeasurementError


def read_text(path: Path) -> str:
    """The text of a small file; few system calls, as sensors are read often."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 4096).decode(errors="replace")
    finally:
        os.close(descriptor)


def read_number(path: Path) -> int:
    """The whole number in a file.

    Raises:
        MeasurementError: it cannot be read (with the command that grants access, where that is the
            cause) or is no number.
    """
    with _explained(path):
        return int(read_text(path))


class NumberFile:
    """A file that is read a hundred times a second, and so stays open: one system call a reading.

    The kernel renews its files at each reading from their start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def read(self) -> int:
        """As :func:`read_number`."""
        with _explained(self.path):
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptor)
            return int(os.pread(self._descriptor, 64, 0))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise MeasurementError(
            f"{path}: no permission to read the energy counter; run: {access_command([path])}"
        ) from error
    except (OSError, ValueError) as error:
        raise MeasurementError(
            f"{path}: expected a number: {error}; "
            "measure again, or use --meter estimate where the sensor does not work"
        ) from error


def access_command(paths: Iterable[Path]) -> str:
    """The command that lets every user read these files until the next boot."""
    return f"sudo chmod a+r {' '.join(str(path) for path in paths)}"
