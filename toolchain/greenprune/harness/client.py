"""The parent's side of a worker: start it, ask it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

from greenprune.errors import MeasurementError

CLOSE_SECONDS = 3.0
WORKER = "greenprune.harness.worker"
START = "import sys; sys.path[:] = filter(None, sys.path); from {} import main; main()"
"""Python puts the current folder first, and a file in it must never pass for a package: it may be
a bundle that somebody sent."""


class WorkerError(MeasurementError):
    """A worker answered with an error of its own."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Client:
    """A worker process; ``name`` stands in messages, and ``module`` has the ``main`` that serves.

    ``single_seconds`` is how long its first inference took, 0 until that is known.
    """

    def __init__(self, name: str, module: str = WORKER) -> None:
        self.name = name
        self.single_seconds = 0.0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-c", START.format(module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(_import_paths())},
        )

    @property
    def pid(self) -> int:
        """Of the worker's process."""
        return self._process.pid

    def ask(self, command: str, limit_seconds: float, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            WorkerError: the worker refused.
            MeasurementError: it died, or did not answer within ``limit_seconds``.
        """
        self.send(command, **arguments)
        return self.receive(limit_seconds)

    def send(self, command: str, **arguments: Any) -> None:
        """Send one request; its answer must be received before the next."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: receive() tells why
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self, limit_seconds: float) -> dict[str, Any]:
        """Wait for the answer to the last request; errors as in :meth:`ask`."""
        assert self._process.stdout is not None
        timer = threading.Timer(limit_seconds, self._process.kill)
        timer.daemon = True  # interrupted before the cancelling, it must not hold up the exit
        try:
            timer.start()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            status = self._process.wait()
            raise MeasurementError(
                f"{self.name}: its process ended (status {status}) or gave no answer within "
                f"{limit_seconds:.0f} s; it last said: {self._last_words()}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}", reply["kind"])
        answer: dict[str, Any] = reply["answer"]
        return answer

    def close(self) -> None:
        """End the process; it is killed if it does not end by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"


def _import_paths() -> list[str]:
    """This process's import paths: the worker must find the same greenprune and targets.

    Without the empty one, which stands for the current folder.
    """
    return [path for path in sys.path if path]
