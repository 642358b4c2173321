"""How long and how often: the presets of the protocol."""

from __future__ import annotations

from dataclasses import dataclass

from greenprune.errors import MeasurementError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Durations in seconds; a warm-up ends when its last three slices' medians agree.

    A window takes ``window_seconds``, ``window_inferences`` and ``counter_updates`` of the meter at
    least, whichever is longest.
    """

    name: str
    windows: int
    window_seconds: float
    window_inferences: int = 10
    counter_updates: int = 100
    warmup_seconds: float = 2.0
    warmup_inferences: int = 10
    warmup_slice_seconds: float = 1.0
    warmup_cap_seconds: float = 60.0
    idle_seconds: float = 30.0
    rest_seconds: float = 10.0
    """Between blocks, where no temperature can be read."""


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="quick",
            windows=6,
            window_seconds=0.2,
            counter_updates=10,
            warmup_seconds=0.3,
            warmup_slice_seconds=0.1,
            warmup_cap_seconds=1.5,
            idle_seconds=0.3,
            rest_seconds=0.0,
        ),
        Preset(name="standard", windows=10, window_seconds=10.0),
        Preset(name="report", windows=20, window_seconds=10.0, window_inferences=662),
        Preset(name="mlperf-tiny", windows=5, window_seconds=10.0),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        MeasurementError: there is none.
    """
    if name not in PRESETS:
        raise MeasurementError(f"preset '{name}': unknown; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
