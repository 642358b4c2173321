"""A meter, and a stretch of work measured with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from greenprune.bundle import Provenance
from greenprune.errors import MeasurementError
from greenprune.meters.energy import Energy, weakest
from greenprune.meters.readers import Begun, Reader, Reading, polled

WIDE = 0.005
"""Half an interval as a share of its value, above which a measured window says so."""


@contextmanager
def failing(name: str) -> Iterator[None]:
    """Whatever a device raises, a user's too, makes the window invalid and not the work."""
    try:
        yield
    except MeasurementError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"meter '{name}': the device failed: {type(error).__name__}: {error}; measure again"
        ) from error


class Window:
    """A measured stretch; ``energy`` is set when it ends, and stays None without a meter."""

    energy: Energy | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A device with its reader, and what its joules are."""

    reader: Reader
    device: Any
    provenance: Provenance
    scope: str
    note: str = ""


class Meter:
    """A source of joules, or several that add up. Use
    :func:`~greenprune.meters.opening.open_meter`; windows may lie inside each other.

    ``name`` opens the same meter again, ``provenance`` is the weakest of its sources' and None
    where nothing is measured.
    """

    def __init__(self, name: str, sources: Sequence[Source] = ()) -> None:
        self.name = name
        self.provenance: Provenance | None = weakest(source.provenance for source in sources)
        self.scope = "; ".join(source.scope for source in sources)
        self.note = "; ".join(source.note for source in sources if source.note)
        self._sources = tuple(sources)

    @property
    def period_seconds(self) -> float | None:
        """Between two updates of the slowest counter or sensor, measured when first asked for;
        None of an estimate and of no meter. A window of 100 and more has a narrow interval.

        Raises:
            MeasurementError: a counter stands still or cannot be read.
        """
        with failing(self.name):
            periods = [source.reader.period_seconds for source in self._sources]
        return max((period for period in periods if period is not None), default=None)

    @contextmanager
    def measure(self) -> Iterator[Window]:
        """Measure what runs inside ``with``; the window's energy is there after it.

        Devices are read in the background inside windows alone.

        A meter that fails does not stop the work: the error is raised after it.

        Raises:
            MeasurementError: the window is invalid, with the cause: a counter could not be read,
                did not move, stood still, wrapped beyond repair, or samples are missing.
        """
        window = Window()
        with ExitStack() as polling:
            try:
                with failing(self.name):
                    begun = self._begin(polling)
            except MeasurementError:
                polling.close()
                yield window
                raise
            try:
                yield window
            except BaseException:
                # what was spent is worth knowing; what went wrong is worth more than a failed
                # reading
                with suppress(MeasurementError):
                    window.energy = self._finish(begun)
                raise
            window.energy = self._finish(begun)

    def _begin(self, polling: ExitStack) -> list[tuple[Source, Begun]]:
        """Begin the slowest counter first, and last what does not wait: the wait for a counter's
        tick lengthens the stretch of those that have begun. Periods are known before the first."""
        for source in self._sources:
            polling.enter_context(polled(source.device))
        slowest_first = sorted(
            self._sources,
            key=lambda source: (source.reader.ticks, source.reader.period_seconds or 0.0),
            reverse=True,
        )
        begun = [(source, source.reader.begin()) for source in slowest_first]
        start = max((started.start for _, started in begun), default=0.0)
        for _, started in begun:
            started.start = start
        return begun

    def _finish(self, begun: Sequence[tuple[Source, Begun]]) -> Energy | None:
        """Finish the fastest counter first, so that it does not wait for a slower one's tick, and
        last what was read whole when the work ended."""
        fastest_first = begun[::-1]
        pairs = sorted(fastest_first, key=lambda pair: not pair[0].reader.ticks)
        with failing(self.name):
            for source, started in pairs:
                source.reader.stop(started)
            return self._energy([source.reader.finish(started) for source, started in pairs])

    def close(self) -> None:
        """Stop the reading in the background."""
        for source in self._sources:
            source.device.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _energy(self, readings: Sequence[Reading]) -> Energy | None:
        if self.provenance is None:
            return None
        low, value, high = (
            sum(getattr(reading, part) for reading in readings) / 1e6
            for part in ("low_uj", "value_uj", "high_uj")
        )
        notes = [self.note, *(reading.note for reading in readings)]
        half = max(high - value, value - low)
        if self.provenance.startswith("measured") and half > WIDE * value:
            notes.append(
                f"the interval reaches {100 * half / value:.2g}% from the value; a longer window "
                "narrows it"
            )
        return Energy(
            value=value,
            low=low,
            high=high,
            provenance=self.provenance,
            scope=self.scope,
            meter=self.name,
            seconds=max(reading.seconds for reading in readings),
            note="; ".join(note for note in notes if note),
        )
