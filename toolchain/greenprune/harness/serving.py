"""A worker's side of the talk with its client: a line of JSON asks, a line of JSON answers.

A request is ``{"command": ...}`` and what goes with it; an answer is ``{"answer": ...}`` or
``{"error": text, "kind": name of the exception}``. The end of the requests ends the worker.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import IO, Any

from greenprune.errors import GreenpruneError

Handle = Callable[[str, dict[str, Any]], Any]
"""What a worker does at a command, with the rest of its request; a GreenpruneError is told."""


def answer(requests: IO[str], answers: IO[str], handle: Handle) -> None:
    """Answer requests until they end."""
    for line in requests:
        request = json.loads(line)
        command = request.pop("command")
        try:
            reply: dict[str, Any] = {"answer": handle(command, request)}
        except GreenpruneError as error:
            reply = {"error": str(error), "kind": type(error).__name__}
        answers.write(json.dumps(reply, allow_nan=False) + "\n")
        answers.flush()


def serve(handle: Handle) -> None:
    """Answer on the real stdin and stdout; whatever else writes to stdout is sent to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing stdin
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        answer(sys.stdin, answers, handle)
