"""The passing of time, as meters see it: monotonic, with pauses and calls in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Clock:
    """The machine's own clock. A simulation passes another one with the same three methods."""

    def now(self) -> float:
        """Seconds since some moment; they never go back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def every(self, seconds: float, call: Callable[[], object]) -> Callable[[], None]:
        """Call something in the background, so often, until the answer of this is called."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(seconds):
                call()

        threading.Thread(target=run, name="greenprune-meter", daemon=True).start()
        return stop.set
