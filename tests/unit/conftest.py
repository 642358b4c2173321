"""Networks that a test controls, for the tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenprune import registry

SHAPE = (1, 16, 16)
NOT_FINITE = {1e9: np.nan, 2e9: np.inf, 3e9: -np.inf}
"""A session takes finite inputs alone: what stands for such scores in an input."""


class FakeRunner:
    """Answers with the first pixel: logits [pixel, tag, 0, 0] and the second pixel as score."""

    def __init__(self, variant: str) -> None:
        self.tag = {"dense": 0.0, "mild": 1.0, "aggressive": 2.0}[variant]
        self.input_name = "input"
        self.output_names = ("logits", "score") if variant == "aggressive" else ("logits",)
        self.before: Callable[[], None] | None = None
        """Called at the start of each run: to raise, to wait, to let a clock go on."""
        self.seen: list[int] = []
        """Batch sizes of the runs that were answered."""
        self.opened = self.closed = False

    def run(self, inputs: Any) -> dict[str, Any]:
        if self.before is not None:
            self.before()
        self.seen.append(len(inputs))
        logits = np.zeros((len(inputs), 4), dtype=np.float32)
        logits[:, 0], logits[:, 1] = inputs[:, 0, 0, 0], self.tag
        scores = [NOT_FINITE.get(float(pixel), pixel) for pixel in inputs[:, 0, 0, 1]]
        outputs = {"logits": logits, "score": np.array(scores, dtype=np.float32)}
        return {name: outputs[name] for name in self.output_names}

    def fail(self, message: str) -> None:
        """From now on."""

        def raise_it() -> None:
            raise RuntimeError(message)

        self.before = raise_it

    def close(self) -> None:
        self.closed = True


class FakeTarget:
    def __init__(self) -> None:
        self.runners = {name: FakeRunner(name) for name in ("mild", "aggressive", "dense")}
        self.here = True

    def is_here(self) -> bool:
        return self.here

    def arithmetic(self, precision: str) -> str:
        return ""

    def open(self, artifact: Path, runtime: str, threads: int) -> FakeRunner:
        runner = self.runners[artifact.stem]
        runner.opened = True
        return runner


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRunner]:
    """The runners by variant, that all sessions of the test share."""
    target = FakeTarget()
    monkeypatch.setattr(registry, "load_target", lambda name: target)
    return target.runners


@pytest.fixture(scope="session")
def batch() -> Callable[..., Any]:
    """Makes inputs from scores and, where given, first pixels (else 0, 1, 2 ...)."""

    def make(scores: Any, first: Any = None) -> Any:
        scores = np.asarray(scores, dtype=np.float32)
        inputs = np.zeros((len(scores), *SHAPE), dtype=np.float32)
        inputs[:, 0, 0, 0] = np.arange(len(scores)) if first is None else first
        codes = {str(value): code for code, value in NOT_FINITE.items()}
        inputs[:, 0, 0, 1] = [codes.get(str(score), score) for score in scores.tolist()]
        return inputs

    return make


class Clock:
    """In seconds; goes on when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all sessions of the test."""
    from greenprune.runtime import routing, session

    clock = Clock()
    for module in (routing, session):
        monkeypatch.setattr(module, "perf_counter", clock)
    return clock
