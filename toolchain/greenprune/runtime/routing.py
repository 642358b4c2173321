"""From one call's inputs to its answers: two networks, their faults, the deadline (device side)."""

from __future__ import annotations

import threading
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import BundleError
from greenprune.runtime.drift import DriftMonitor
from greenprune.runtime.faults import CircuitBreaker, MildLatency
from greenprune.runtime.feeds import Inputs
from greenprune.runtime.networks import SCORE, Networks
from greenprune.runtime.outcome import Outcome
from greenprune.runtime.policy import Point
from greenprune.runtime.selector import accepts, decide

Mask = NDArray[np.bool_]
ONE: tuple[Mask, Mask] = (np.zeros(1, dtype=np.bool_), np.ones(1, dtype=np.bool_))
"""Masks of one sample, shared and never written to: not accepted, accepted."""
for _mask in ONE:
    _mask.setflags(write=False)
Outputs = dict[str, NDArray[Any]]


class Router:
    """Aggressive on all, then mild where it is not sure, answers in the order of the inputs.

    Args:
        networks: opened as they are needed.
        degrades: whether the aggressive answer stands in where mild fails.
        breaker_faults: see :class:`~greenprune.runtime.faults.CircuitBreaker`.
        breaker_seconds: see there, and :class:`~greenprune.runtime.faults.MildLatency`.
        monitor: that draws the inputs to audit; None: no audits.
        lock: held around breaker, latencies and monitor, never while a network runs.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        degrades: bool,
        breaker_faults: int,
        breaker_seconds: float,
        monitor: DriftMonitor | None,
        lock: threading.Lock,
    ) -> None:
        self._networks, self._degrades, self._monitor = networks, degrades, monitor
        self._lock = lock
        self.breaker = CircuitBreaker(breaker_faults, breaker_seconds)
        self._mild_latency = MildLatency(breaker_seconds)

    def answer(self, point: Point, inputs: Inputs, due: float | None) -> Outcome:
        """Answer a call; ``due`` is its deadline on :func:`time.perf_counter`'s clock.

        Raises whatever the mild network raises, where nothing may or can stand in for it.
        """
        outcome = Outcome({}, point=point)
        if point.threshold is not None:
            self._ask_aggressive(outcome, point.threshold, inputs)
        if outcome.sure < len(inputs):
            self._escalate(outcome, inputs, due)
        if outcome.scores is not None and outcome.degraded is None:
            self._audit(outcome, inputs, due)
        return outcome

    def run_mild(self, inputs: Inputs, due: float | None, *, cold: bool = False) -> Any:
        """Run mild, whatever the deadline, and remember how long it took unless it is ``cold``."""
        runner = self._networks.get("mild")
        start = perf_counter()
        answers = runner.run(inputs)
        now = perf_counter()
        if not cold:
            left = None if due is None else due - start
            with self._lock:
                self._mild_latency.record(len(inputs), now - start, left, now)
        return answers

    def _ask_aggressive(self, outcome: Outcome, threshold: float, inputs: Inputs) -> None:
        """Its answers and scores; ``accepted`` stays None where nothing came."""
        outputs = self._run_aggressive(outcome, inputs)
        if outputs is None:
            return
        scores = outputs[SCORE]
        outcome.outputs, outcome.scores = outputs, scores
        if len(inputs) == 1:
            outcome.sure = int(accepts(float(scores[0]), threshold))
            outcome.accepted = ONE[outcome.sure]
        else:
            outcome.accepted = decide(scores, threshold)
            outcome.sure = int(np.count_nonzero(outcome.accepted))
        if outcome.sure == len(inputs):
            self._record(fault=False)
            return
        unscored = np.isnan(scores)
        if unscored.any():
            outcome.faulty = unscored
            outcome.reasons.append((unscored, "the score is not a number"))
        self._record(fault=bool(unscored.all()))

    def _run_aggressive(self, outcome: Outcome, inputs: Inputs) -> Outputs | None:
        """Its outputs, which the caller records; None, recorded, where it rests or fails."""
        if self.breaker.is_open:
            with self._lock:
                allowed = self.breaker.allows(perf_counter())
            if not allowed:
                outcome.fail(len(inputs), "the aggressive network failed too often and rests")
                return None
        outcome.aggressive_ran = True
        try:
            outputs = self._networks.get("aggressive").run(inputs)
            _check_scores(outputs, len(inputs))
        except Exception as error:  # whatever the runtime raises, mild can still answer
            outcome.fail(len(inputs), f"the aggressive network failed: {error}")
            self._record(fault=True)
            return None
        return outputs

    def _record(self, *, fault: bool) -> None:
        if fault or not self.breaker.untroubled:
            with self._lock:
                self.breaker.record(fault, perf_counter())

    def _escalate(self, outcome: Outcome, inputs: Inputs, due: float | None) -> None:
        """Mild on the samples that are not accepted, its answers put back in their places."""
        alone = outcome.faulty is not None and not outcome.outputs  # nothing can stand in
        if outcome.accepted is None:
            outcome.accepted = np.zeros(len(inputs), dtype=np.bool_)
        refused = ~outcome.accepted
        count = len(inputs) - outcome.sure
        if not alone and not (self._fits(count, due) or self._tries(due)):
            reason = "too little time was left before the deadline to run the mild network"
            if self._stand_in(outcome, inputs, refused, reason):
                return
            alone = True
        outcome.mild_ran = refused
        try:
            answers = self.run_mild(inputs[refused] if outcome.sure else inputs, due)
        except Exception as error:
            reason = f"the mild network failed: {error}"
            if alone or not self._degrades or not self._stand_in(outcome, inputs, refused, reason):
                raise
            outcome.faulty = refused if outcome.faulty is None else outcome.faulty | refused
            return
        if not outcome.sure:
            outcome.outputs = answers
            return
        outcome.outputs = {name: np.array(outcome.outputs[name]) for name in answers}
        for name, output in outcome.outputs.items():
            output[refused] = answers[name]

    def _stand_in(self, outcome: Outcome, inputs: Inputs, refused: Mask, reason: str) -> bool:
        """The aggressive network's answers to all, those that it was not sure of flagged; False
        where it has none."""
        if not outcome.outputs:  # not asked yet: nothing was to be accepted
            outputs = self._run_aggressive(outcome, inputs)
            if outputs is None:
                return False
            self._record(fault=bool(np.isnan(outputs[SCORE]).all()))
            outcome.outputs = outputs
        outcome.accepted = np.ones(len(inputs), dtype=np.bool_)
        outcome.degraded = refused
        outcome.reasons.append((refused, reason))
        return True

    def _audit(self, outcome: Outcome, inputs: Inputs, due: float | None) -> None:
        """Run mild on a few accepted samples; the answers stay the aggressive network's."""
        point, accepted = outcome.point, outcome.accepted
        if self._monitor is None or point is None or accepted is None:
            return
        if point.reference is None or point.reference.disagrees is None:
            return
        places = np.flatnonzero(accepted)
        with self._lock:
            places = places[self._monitor.draw(len(places))]
        if not len(places) or not self._fits(len(places), due):
            return
        try:
            answers = self.run_mild(inputs[places], due)
        except Exception:  # the samples have their answers; the next escalated one will tell
            return
        name = next(iter(answers))
        differ = answers[name].argmax(axis=1) != outcome.outputs[name][places].argmax(axis=1)
        outcome.audited = len(places)
        outcome.disagreed = int(np.count_nonzero(differ))
        outcome.mild_ran = ~accepted
        outcome.mild_ran[places] = True

    def _fits(self, samples: int, due: float | None) -> bool:
        """Whether there is time to run mild."""
        if due is None:
            return True
        with self._lock:
            return self._mild_latency.fits(samples, due - perf_counter())

    def _tries(self, due: float | None) -> bool:
        """Whether this call is the one to try whether mild is still too slow."""
        if due is None:
            return False
        now = perf_counter()
        with self._lock:
            return self._mild_latency.tries(due - now, now)


def _check_scores(outputs: Outputs, samples: int) -> None:
    shape = outputs[SCORE].shape
    if shape != (samples,):
        raise BundleError(f"its score has shape {list(shape)}, not {[samples]}")
