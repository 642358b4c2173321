"""Traces of known energy: never zero for a failure, never wrong and called valid."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import power_traces as traces


@settings(deadline=None, max_examples=500)
@given(seed=st.integers(0, 2**32))
def test_no_trace_is_wrong_and_called_valid(seed: int) -> None:
    trace = traces.draw_trace(seed)
    outcome = traces.measure_trace(trace)
    assert not outcome.wrong
    assert outcome.sound


@pytest.mark.parametrize("kind", traces.KINDS)
def test_recoverable_traces_are_valid(kind: str) -> None:
    drawn = (traces.draw_trace(seed) for seed in range(10**9))
    recoverable = (trace for trace in drawn if trace.kind == kind and trace.recoverable)
    valid = [traces.measure_trace(next(recoverable)).valid for _ in range(40)]
    assert sum(valid) >= 38


LOSSES = {
    "wrap of unknown range",
    "freeze",
    "freeze to the end",
    "long gap",
    "reset",
    "unreadable for a while",
    "vanished",
}


@pytest.mark.parametrize("fault", sorted(LOSSES))
def test_what_loses_energy_is_an_error(fault: str) -> None:
    drawn = (traces.draw_trace(seed) for seed in range(10**9))
    lossy = (trace for trace in drawn if trace.fault == fault)
    for _ in range(10):
        outcome = traces.measure_trace(next(lossy))
        assert outcome.energy is None
        assert outcome.error
