"""What our pyJoules devices share: reading in the background, and a memory for what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from greenprune.errors import MeasurementError
from greenprune.meters._pyjoules import Device, Domain
from greenprune.meters.clock import Clock


class NamedDomain(Domain):  # type: ignore[misc]
    """A pyJoules domain that is known by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def get_device_type(self) -> str:
        return "greenprune"


class MeterDevice(Device):  # type: ignore[misc]
    """A pyJoules device whose ``get_energy`` is cumulative, in microjoules for each domain.

    It is read once when it is opened, and in the background only inside :meth:`polled`.
    ``breaks`` counts the readings that failed, ``problem`` is the last of them: a window in which
    the count grew is invalid, also where the counter could be read again at its end.
    """

    def __init__(self, domains: list[NamedDomain], clock: Clock, poll_seconds: float) -> None:
        super().__init__()
        self._available_domains = domains
        self.configure()
        self.clock = clock
        self.breaks = 0
        self.problem: MeasurementError | None = None
        self._lock = threading.Lock()
        self._poll_seconds = poll_seconds
        self._polling = threading.Lock()
        self._polled = 0
        self._stop: Callable[[], None] = lambda: None
        self.get_energy()

    @staticmethod
    def available_domains() -> list[Domain]:
        """Empty: the domains depend on the machine's files, which only an instance knows."""
        return []

    def get_energy(self) -> list[float]:
        """Microjoules of each domain since the device was opened.

        Raises:
            MeasurementError: a reading failed or cannot be true.
        """
        with self._lock:
            try:
                return self.read()
            except MeasurementError as problem:
                self.breaks += 1
                self.problem = problem
                raise

    def read(self) -> list[float]:
        """One reading, by one thread at a time; what a kind of device is."""
        raise NotImplementedError

    def forget(self) -> None:
        """The next reading starts anew: nobody looked for a while."""
        raise NotImplementedError

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Read in the background inside ``with``; several of these may overlap."""
        with self._polling:
            if not self._polled:
                with self._lock:
                    self.forget()
                self._stop = self.clock.every(self._poll_seconds, self.poll)
            self._polled += 1
        try:
            yield
        finally:
            with self._polling:
                self._polled -= 1
                if not self._polled:
                    self._stop()

    def poll(self) -> None:
        """One reading in the background; a failure is remembered."""
        with suppress(MeasurementError):
            self.get_energy()

    def close(self) -> None:
        """Stop the reading in the background."""
        self._stop()
