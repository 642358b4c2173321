"""AdaptiveSession: a bundle's pair of networks, called like an ONNX Runtime session (device side).

Each input goes through the aggressive network; where its selector's score is below the threshold,
the mild network answers instead. The worst case costs both.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import BundleError, DataError
from greenprune.runtime import checks, preprocessing
from greenprune.runtime import policy as policies
from greenprune.runtime.drift import DriftGuard, DriftMonitor
from greenprune.runtime.feeds import Feeds, Interface, NodeArg, node
from greenprune.runtime.networks import CLOSED, Networks
from greenprune.runtime.outcome import Outcome, RunInfo, estimate_mj
from greenprune.runtime.policy import NOTHING, Plan, Point, Policy
from greenprune.runtime.routing import Router
from greenprune.runtime.statistics import Counters, Statistics

if TYPE_CHECKING:
    from greenprune.bundle import DialRow
    from greenprune.runtime.asynchronous import AsyncCalls

Callback = Callable[[list[NDArray[Any]] | None, Any, BaseException | None], None]
WARMUP_RUNS = 10
GUARD = DriftGuard()


class AdaptiveSession:
    """A bundle opened for inference; safe to call from several threads.

    A sample's answer and route do not depend on the other samples of its batch (to float rounding,
    which may vary with the batch's size). Policy, breaker, deadline and alarm hold for a whole
    call.

    Args:
        bundle_path: the bundle's folder.
        policy: how far the aggressive network is trusted; by default the row that the bundle
            starts with. See :attr:`policy`.
        runtime: one that the bundle has artifacts for; None takes the bundle's own choice.
        threads: for the runtime; 0 means one for each core.
        mild: ``resident`` opens the mild network with the session, ``lazy`` when it is first
            needed, which makes that call slow.
        on_fault: when mild fails: ``raise`` passes its error on; ``degrade`` returns the aggressive
            network's answer, flagged ``degraded``. A failing aggressive network, or a score that
            is not a number, always sends its samples to mild.
        deadline_ms: of each call, from its beginning. Where what is left is too short for mild's
            99th percentile (known from :meth:`warmup` and earlier calls), the aggressive answer is
            returned, flagged ``degraded`` and outside the guarantee. A network that has begun is
            not stopped: a call that ends too late is flagged ``late``.
        drift: the guard of the guarantee, which holds for inputs like the certificate's; None
            turns it off. It costs its share of mild's energy, 1%, and makes an audited call as
            slow as an escalated one. Audits need a bundle whose dial tells how often its networks
            disagreed; without, the rate of accepted inputs is watched alone, which costs nothing.
        on_drift: called once with the reason when the guard raises its alarm; None warns.
        breaker_faults: so many calls in a row for which the aggressive network failed leave it in
            peace for ``breaker_seconds``: mild answers, then one call tries again.
        breaker_seconds: see there; also how often a mild network that looks too slow for the
            deadline is tried again.
        max_pending: calls of :meth:`run_async` that may wait or run at once.

    Raises:
        BundleError: the bundle is damaged or does not have what is asked for.
        TargetError: the runtime refuses an artifact.
        MissingPackageError: the runtime is not installed.
    """

    def __init__(
        self,
        bundle_path: Path | str,
        *,
        policy: Policy | None = None,
        runtime: str | None = None,
        threads: int = 0,
        mild: Literal["resident", "lazy"] = "resident",
        on_fault: Literal["raise", "degrade"] = "raise",
        deadline_ms: float | None = None,
        drift: DriftGuard | None = GUARD,
        on_drift: Callable[[str], None] | None = None,
        breaker_faults: int = 5,
        breaker_seconds: float = 30.0,
        max_pending: int = 4,
    ) -> None:
        from greenprune import bundle  # here, so that importing the runtime is quick

        lazy = checks.one_of("mild", mild, ("resident", "lazy")) == "lazy"
        degrades = checks.one_of("on_fault", on_fault, ("raise", "degrade")) == "degrade"
        if deadline_ms is not None:
            deadline_ms = checks.positive("deadline_ms", deadline_ms)
        breaker_faults = checks.whole("breaker_faults", breaker_faults, least=1)
        breaker_seconds = checks.positive("breaker_seconds", breaker_seconds)
        max_pending = checks.whole("max_pending", max_pending, least=1)
        threads = checks.whole("threads", threads, least=0)
        if drift is not None and not isinstance(drift, DriftGuard):
            raise BundleError(f"drift = {drift!r:.60}: expected a DriftGuard, or None")
        opened = bundle.open_bundle(bundle_path)
        self._manifest = manifest = opened.manifest
        self.runtime = runtime or manifest.runtime
        self._interface = Interface(manifest)
        self._energies_mj = policies.energies_mj(manifest, self.runtime)
        self._provenance = policies.provenance(manifest) if self._energies_mj else None
        self._lazy, self._deadline_ms = lazy, deadline_ms
        self._stands_in = degrades or deadline_ms is not None
        self._on_drift, self._max_pending = on_drift, max_pending
        self._lock = threading.Lock()  # of all that follows
        self._idle = threading.Condition(self._lock)
        self._closed = False
        self._running = 0
        self._counters = Counters()
        self._monitor = DriftMonitor(drift) if drift else None
        self._async: AsyncCalls | None = None
        self._networks = Networks(opened, self.runtime, threads)
        self._router = Router(
            self._networks,
            degrades=degrades,
            breaker_faults=breaker_faults,
            breaker_seconds=breaker_seconds,
            monitor=self._monitor,
            lock=self._lock,
        )
        self._plan = self._prepare(Policy() if policy is None else policy)

    @property
    def policy(self) -> Policy:
        """How far the aggressive network is trusted; may be set at any time.

        Calls in flight end under the policy that they began with. A policy that the bundle cannot
        keep raises BundleError, which lists the rows of the dial, and changes nothing. An alarm of
        the drift guard outlives it: see :meth:`reset_drift`.
        """
        return self._plan.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        plan = self._prepare(policy)
        with self._lock:
            self._plan = plan

    @property
    def dial(self) -> tuple[DialRow, ...]:
        """The rows that :attr:`policy` chooses among; certified means on this session's runtime."""
        return policies.dial(self._manifest, self.runtime)

    @property
    def threshold(self) -> float | None:
        """Accept where ``score >= threshold``, for the next call; None accepts nothing."""
        with self._lock:
            return None if self._plan.route else self._point(self._plan).threshold

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self._manifest.class_names

    @property
    def statistics(self) -> Statistics:
        """Counts since the session was opened, taken together at one moment."""
        with self._lock:
            counts, controller = self._counters.copy(), self._plan.controller
            alarm, breaker_open = self._alarm(), self._router.breaker.is_open
            over_budget = controller is not None and controller.out_of_reach
        p50, p99 = counts.latency_ms()
        return Statistics(
            calls=counts.calls,
            routes=counts.routes,
            faults=counts.faults,
            degraded=counts.degraded,
            late=counts.late,
            failed=counts.failed,
            dropped=counts.dropped,
            audits=counts.audits,
            disagreements=counts.disagreements,
            drift=alarm,
            breaker_open=breaker_open,
            over_budget=over_budget,
            energy_mj=estimate_mj(counts.ran, self._energies_mj) if self._energies_mj else None,
            energy_provenance=self._provenance,
            latency_p50_ms=p50,
            latency_p99_ms=p99,
        )

    def get_inputs(self) -> list[NodeArg]:
        """As ONNX Runtime's: name, shape and type of the input."""
        return [node(self._manifest.input)]

    def get_outputs(self) -> list[NodeArg]:
        """As ONNX Runtime's: name, shape and type of each output."""
        return [node(output) for output in self._manifest.outputs]

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One decoded image, uint8 [H, W, C] or [H, W], to an input, float32 [1, C, H, W].

        Raises:
            DataError: the image does not have the size and channels that the bundle states; or
                the bundle states no preprocessing.
        """
        settings = self._manifest.preprocessing
        if settings is None:
            raise DataError(
                f"the bundle '{self._manifest.name}' states no preprocessing: its networks were "
                "trained on inputs that were prepared elsewhere; prepare them the same way"
            )
        return preprocessing.preprocess(image, settings)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Feeds,
        *,
        deadline_ms: float | None = None,
    ) -> list[NDArray[Any]]:
        """As ONNX Runtime's: the outputs asked for (None or none: all), for the one input.

        Args:
            output_names: as in :meth:`get_outputs`.
            input_feed: the input's name to float32 [N, C, H, W], N >= 1, finite.
            deadline_ms: of this call; None: the session's.

        Raises:
            DataError: an unknown name, a wrong dtype or shape, a value that is not finite.
            BundleError: the session is closed; with a lazy mild network, its file is unusable.

        What the mild network raises is passed on unless ``on_fault="degrade"``.
        """
        start = perf_counter()
        names = self._interface.names(output_names)
        outputs = self._call(self._interface.checked(input_feed), start, deadline_ms).outputs
        return [outputs[name] for name in names]

    def run_with_info(
        self,
        output_names: Sequence[str] | None,
        input_feed: Feeds,
        *,
        deadline_ms: float | None = None,
    ) -> tuple[list[NDArray[Any]], RunInfo]:
        """:meth:`run`, and what happened to each sample."""
        start = perf_counter()
        names = self._interface.names(output_names)
        inputs = self._interface.checked(input_feed)
        outcome = self._call(inputs, start, deadline_ms)
        info = outcome.info(len(inputs), self._energies_mj, self._provenance)
        return [outcome.outputs[name] for name in names], info

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Feeds,
        callback: Callback,
        user_data: Any = None,
        *,
        deadline_ms: float | None = None,
    ) -> bool:
        """:meth:`run` in a thread of the session, in the order of the calls.

        ``callback(outputs, user_data, error)`` is called exactly once for a call that was taken,
        from that thread (from :meth:`close`'s for a cancelled one); ``error`` is None, or
        ``outputs`` is. What it raises is logged. The deadline counts from here, the wait included.
        The array must not be changed before: it is not copied.

        Returns:
            Whether the call was taken. False where ``max_pending`` calls wait or run: then the
            callback is never called, and the app drops the frame or tries again
            (``max_pending=1`` drops while busy).

        Raises:
            DataError: as :meth:`run`, at once.
            BundleError: the session is closed.
        """
        from greenprune.runtime.asynchronous import AsyncCalls

        start = perf_counter()
        names = self._interface.names(output_names)
        inputs = self._interface.checked(input_feed)
        self._due(start, deadline_ms)

        def work() -> list[NDArray[Any]]:
            outputs = self._call(inputs, start, deadline_ms, taken=True).outputs
            return [outputs[name] for name in names]

        with self._lock:
            if self._closed:
                raise BundleError(CLOSED)
            if self._async is None:
                self._async = AsyncCalls(self._max_pending)
            calls = self._async
        taken = calls.submit(work, lambda outputs, error: callback(outputs, user_data, error))
        if not taken:
            with self._lock:
                self._counters.dropped += 1
        return taken

    def warmup(self) -> None:
        """Open the networks that the policy needs and run each on blank images, so that the first
        real call is not the slow one and mild's latency is known."""
        plan, _ = self._enter()
        blank = self._interface.blank()
        try:
            for variant in self._needs(plan, lazy=False):
                for run in range(WARMUP_RUNS):
                    if variant == "mild":
                        self._router.run_mild(blank, None, cold=run < WARMUP_RUNS // 2)
                    else:
                        self._networks.get(variant).run(blank)
        finally:
            with self._lock:
                self._leave()

    def reset_drift(self) -> None:
        """Forget the drift guard's observations and its alarm; the policy holds again."""
        with self._lock:
            if self._monitor:
                self._monitor.reset()

    def close(self, *, cancel_pending: bool = False) -> None:
        """Give the networks' memory back once all calls have ended; twice does no harm.

        Args:
            cancel_pending: calls of :meth:`run_async` that have not begun get an error instead of
                an answer; always so where one of their callbacks closes the session.
        """
        with self._lock:
            self._closed = True
            calls = self._async
        if calls is not None:
            calls.close(cancel=cancel_pending)
        with self._lock:
            self._idle.wait_for(lambda: not self._running)
        self._networks.close()

    def __enter__(self) -> AdaptiveSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self,
        inputs: NDArray[np.float32],
        start: float,
        deadline_ms: float | None,
        *,
        taken: bool = False,
    ) -> Outcome:
        due = self._due(start, deadline_ms)
        plan, point = self._enter(taken=taken)
        outcome: Outcome | None = None
        alarmed = False
        try:
            if plan.route is not None:
                outputs = self._networks.get(plan.route).run(inputs)
                outcome = Outcome(outputs, route=plan.route)
            else:
                outcome = self._router.answer(point, inputs, due)
        finally:
            now = perf_counter()
            with self._lock:
                try:
                    if outcome is None:
                        self._counters.failed += 1
                    else:
                        outcome.late = due is not None and now > due
                        alarmed = self._learn(plan, outcome, len(inputs), now - start)
                finally:
                    self._leave()
        if alarmed:
            self._tell_drift(str(outcome.drift))
        return outcome

    def _enter(self, *, taken: bool = False) -> tuple[Plan, Point]:
        """The plan and point of a call that begins now, or was ``taken`` before the session began
        to close; close() waits for it."""
        with self._lock:
            if self._closed and not taken:
                raise BundleError(CLOSED)
            self._running += 1
            return self._plan, self._point(self._plan)

    def _leave(self) -> None:
        self._running -= 1
        if self._closed and not self._running:
            self._idle.notify_all()

    def _point(self, plan: Plan) -> Point:
        return NOTHING if self._alarm() else plan.point()

    def _alarm(self) -> str | None:
        return self._monitor.alarm if self._monitor else None

    def _learn(self, plan: Plan, outcome: Outcome, samples: int, seconds: float) -> bool:
        """Take in a call, under the lock; whether it raised the drift guard's alarm."""
        self._counters.add(outcome, samples, seconds)
        if plan.controller is not None:
            spent = estimate_mj(outcome.ran(samples), self._energies_mj)
            plan.controller.observe(outcome.scores, samples, spent or 0.0)
        alarmed = self._monitor is not None and self._monitor.observe(outcome)
        outcome.drift = self._alarm()
        return alarmed

    def _tell_drift(self, reason: str) -> None:
        try:
            if self._on_drift is None:
                warnings.warn(reason, RuntimeWarning, stacklevel=4)
            else:
                self._on_drift(reason)
        except Exception:  # the call has its answer, which must not be lost
            import logging

            logging.getLogger(__name__).exception("nobody could be told: %s", reason)

    def _prepare(self, policy: Policy) -> Plan:
        """The plan of a policy, with the networks that it needs opened."""
        if not isinstance(policy, Policy):
            raise BundleError(
                f"policy = {policy!r:.60}: expected a Policy, as in Policy(max_accuracy_loss=0.01)"
            )
        plan = policies.make_plan(policy, self._manifest, self.runtime)
        self._networks.open(self._needs(plan, lazy=self._lazy))
        return plan

    def _needs(self, plan: Plan, *, lazy: bool) -> list[str]:
        """The networks to hold ready for a plan."""
        if plan.route is not None:
            return [plan.route]
        asked = self._stands_in or any(point.threshold is not None for point in plan.points)
        return ["aggressive"] * asked + ["mild"] * (not lazy)

    def _due(self, start: float, deadline_ms: float | None) -> float | None:
        if deadline_ms is None:
            deadline_ms = self._deadline_ms
        else:
            deadline_ms = checks.positive("deadline_ms", deadline_ms)
        return None if deadline_ms is None else start + deadline_ms / 1e3
