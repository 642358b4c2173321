"""AdaptiveSession: a bundle's pair of networks, called like an ONNX Runtime session (device side).

Each input goes through the aggressive network; where its selector's score is below the threshold,
the mild network answers instead. The worst case costs both.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import BundleError, DataError
from greenprune.runtime import preprocessing
from greenprune.runtime.selector import decide

if TYPE_CHECKING:
    from greenprune import bundle, registry

Route = Literal["aggressive", "mild", "dense"]
ROUTES: tuple[Route, ...] = get_args(Route)
SCORE = "score"
WARMUP_RUNS = 10
ONNX_TYPES = {"float32": "tensor(float)"}


class NodeArg(NamedTuple):
    """An input or output, with the names that ONNX Runtime gives these fields."""

    name: str
    shape: list[int | str]
    type: str


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What happened to each sample of one call."""

    routes: tuple[Route, ...]
    """The network that answered."""
    scores: NDArray[np.float32]
    """[N]; NaN where the selector was not asked or failed."""
    threshold: float | None
    certified: bool
    """Whether the bundle's certificate covers this session: its runtime, its threshold."""
    faults: tuple[str | None, ...]
    """Why a sample went to mild other than by its score; None where nothing went wrong."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts since the session was opened."""

    calls: int
    routes: dict[Route, int]
    """Samples by the network that answered."""
    faults: int
    """Samples that went to mild for a fault of the aggressive network or its score."""


class _Outcome(NamedTuple):
    """The answers to one call, and how they came about."""

    outputs: dict[str, NDArray[Any]]
    accepted: NDArray[np.bool_] | None = None
    """None where the route was fixed."""
    scores: NDArray[Any] | None = None
    faulty: NDArray[np.bool_] | None = None
    """The samples that ``fault`` sent to mild; None where nothing went wrong."""
    fault: str | None = None


class AdaptiveSession:
    """A bundle opened for inference; safe to call from several threads.

    A sample's answer and route do not depend on the other samples of its batch (to float rounding,
    which may vary with the batch's size).

    Args:
        bundle_path: the bundle's folder.
        runtime: one that the bundle has artifacts for; None takes the bundle's own choice.
        threads: for the runtime; 0 means one for each core.
        threshold: accept where ``score >= threshold``; by default the bundle's; None accepts
            nothing, so that mild answers everything and aggressive is not run.
        route: a network that answers everything; None lets the selector decide.

    Raises:
        BundleError: the bundle is damaged or does not have what is asked for.
        TargetError: the runtime refuses an artifact.
        MissingPackageError: the runtime is not installed.
    """

    def __init__(
        self,
        bundle_path: Path | str,
        *,
        runtime: str | None = None,
        threads: int = 0,
        threshold: float | EllipsisType | None = ...,
        route: Route | None = None,
    ) -> None:
        from greenprune import bundle  # here, so that importing the runtime is quick

        if route is not None and route not in ROUTES:
            raise BundleError(f"route = {route!r}: expected None or one of {', '.join(ROUTES)}")
        opened = bundle.open_bundle(bundle_path)
        self._manifest = manifest = opened.manifest
        self._threshold = _threshold(manifest.selector, threshold)
        self._route: Route | None = route
        if route is None and self._threshold is None:
            self._route = "mild"
        self.runtime = runtime or manifest.runtime
        self._certified = route is None and _is_certified(manifest, self.runtime, self._threshold)
        self._input = manifest.input.name
        self._shape = manifest.input.shape[1:]
        self._outputs = tuple(output.name for output in manifest.outputs)
        self._lock = threading.Lock()
        self._calls = self._faults = 0
        self._samples: dict[Route, int] = dict.fromkeys(ROUTES, 0)
        self._runners = _open(opened, self._route, self.runtime, threads)

    @property
    def threshold(self) -> float | None:
        """Accept where ``score >= threshold``; None accepts nothing."""
        return self._threshold

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self._manifest.class_names

    @property
    def statistics(self) -> Statistics:
        """Counts since the session was opened, taken together at one moment."""
        with self._lock:
            return Statistics(calls=self._calls, routes=dict(self._samples), faults=self._faults)

    def get_inputs(self) -> list[NodeArg]:
        """As ONNX Runtime's: name, shape and type of the input."""
        return [_node(self._manifest.input)]

    def get_outputs(self) -> list[NodeArg]:
        """As ONNX Runtime's: name, shape and type of each output."""
        return [_node(output) for output in self._manifest.outputs]

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
        self, output_names: Sequence[str] | None, feeds: Mapping[str, NDArray[np.float32]]
    ) -> list[NDArray[Any]]:
        """As ONNX Runtime's: the outputs asked for (None: all), for feeds of the one input.

        Args:
            output_names: as in :meth:`get_outputs`.
            feeds: the input's name to float32 [N, C, H, W], N >= 1.

        Raises:
            DataError: an unknown name, a wrong dtype or shape.
            BundleError: the session is closed.

        What the mild network raises is passed on; a failing aggressive network only sends its
        samples to mild.
        """
        names = self._names(output_names)
        outcome = self._answer(self._checked(feeds))
        return [outcome.outputs[name] for name in names]

    def run_with_info(
        self, output_names: Sequence[str] | None, feeds: Mapping[str, NDArray[np.float32]]
    ) -> tuple[list[NDArray[Any]], RunInfo]:
        """:meth:`run`, and what happened to each sample."""
        names = self._names(output_names)
        inputs = self._checked(feeds)
        outcome = self._answer(inputs)
        nothing = np.zeros(len(inputs), dtype=np.bool_)
        routes: tuple[Route, ...] = (self._route or "mild",) * len(inputs)
        if outcome.accepted is not None:
            routes = tuple("aggressive" if yes else "mild" for yes in outcome.accepted)
        scores = np.full(len(inputs), np.nan) if outcome.scores is None else outcome.scores
        faulty = nothing if outcome.faulty is None else outcome.faulty
        return [outcome.outputs[name] for name in names], RunInfo(
            routes=routes,
            scores=scores.astype(np.float32),
            threshold=self._threshold,
            certified=self._certified,
            faults=tuple(outcome.fault if bad else None for bad in faulty),
        )

    def warmup(self) -> None:
        """Run each network of the session on blank images, so that the first real call is not
        the slow one."""
        blank = np.zeros((1, *(size or 1 for size in self._shape)), dtype=np.float32)
        for runner in self._open_runners().values():
            for _ in range(WARMUP_RUNS):
                runner.run(blank)

    def close(self) -> None:
        """Give the networks' memory back, once no call is running; twice does no harm."""
        runners, self._runners = self._runners, {}
        for runner in runners.values():
            runner.close()

    def __enter__(self) -> AdaptiveSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_runners(self) -> dict[str, registry.Runner]:
        runners = self._runners
        if not runners:
            raise BundleError("the session is closed; open a new AdaptiveSession")
        return runners

    def _answer(self, inputs: NDArray[np.float32]) -> _Outcome:
        """One network on all, or the pair: aggressive on all, then mild where it is not sure."""
        runners = self._open_runners()
        if self._route is not None:
            outputs = runners[self._route].run(inputs)
            self._count(self._route, len(inputs))
            return _Outcome(outputs)
        try:
            outputs = runners["aggressive"].run(inputs)
            scores = _checked_scores(outputs, len(inputs))
        except Exception as error:  # whatever the runtime raises, mild can still answer
            outputs = runners["mild"].run(inputs)
            self._count("mild", len(inputs), faults=len(inputs))
            everything = np.ones(len(inputs), dtype=np.bool_)
            fault = f"the aggressive network failed: {error}"
            return _Outcome(outputs, ~everything, None, everything, fault)
        accepted = decide(scores, self._threshold)
        if np.count_nonzero(accepted) == len(inputs):
            self._count("aggressive", len(inputs))
            return _Outcome(outputs, accepted, scores)
        return self._escalate(runners["mild"], inputs, outputs, scores, accepted)

    def _escalate(
        self,
        mild: registry.Runner,
        inputs: NDArray[np.float32],
        outputs: dict[str, NDArray[Any]],
        scores: NDArray[Any],
        accepted: NDArray[np.bool_],
    ) -> _Outcome:
        """Mild on the samples that are not accepted, its answers put back in their places."""
        escalated = np.flatnonzero(~accepted)
        answers = mild.run(inputs[escalated])
        mixed = {name: np.array(outputs[name]) for name in self._outputs}
        for name, output in mixed.items():
            output[escalated] = answers[name]
        unscored = np.isnan(scores)
        faults = int(np.count_nonzero(unscored))
        self._count("aggressive", len(inputs) - len(escalated))
        self._count("mild", len(escalated), calls=0, faults=faults)
        if not faults:
            return _Outcome(mixed, accepted, scores)
        return _Outcome(mixed, accepted, scores, unscored, "the score is not a number")

    def _count(self, route: Route, samples: int, *, calls: int = 1, faults: int = 0) -> None:
        with self._lock:
            self._calls += calls
            self._samples[route] += samples
            self._faults += faults

    def _names(self, output_names: Sequence[str] | None) -> Sequence[str]:
        if output_names is None:
            return self._outputs
        for name in output_names:
            if name not in self._outputs:
                raise DataError(
                    f"unknown output '{name}'; expected some of: {', '.join(self._outputs)}"
                )
        return output_names

    def _checked(self, feeds: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        if len(feeds) != 1 or self._input not in feeds:
            raise DataError(
                f"feeds: expected exactly the input '{self._input}', got: "
                f"{', '.join(map(str, feeds)) or 'nothing'}"
            )
        inputs = feeds[self._input]
        if (
            not isinstance(inputs, np.ndarray)
            or inputs.dtype != np.float32
            or inputs.ndim != 1 + len(self._shape)
            or inputs.shape[1:] != self._shape
            or not len(inputs)
        ):
            found = (
                f"{inputs.dtype} of shape {list(inputs.shape)}"
                if isinstance(inputs, np.ndarray)
                else type(inputs).__name__
            )
            raise DataError(
                f"input '{self._input}': expected a float32 array of shape "
                f"{['N', *self._shape]}, N >= 1, got {found}; session.preprocess(image) makes one"
            )
        return inputs


def _checked_scores(outputs: Mapping[str, NDArray[Any]], samples: int) -> NDArray[Any]:
    scores = outputs[SCORE]
    if scores.shape != (samples,):
        raise BundleError(f"its score has shape {list(scores.shape)}, not {[samples]}")
    return scores


def _threshold(record: bundle.SelectorRecord, asked: float | EllipsisType | None) -> float | None:
    threshold = record.threshold if isinstance(asked, EllipsisType) else asked
    if threshold is None:
        return None
    if not isinstance(threshold, (int, float, np.floating)) or not math.isfinite(threshold):
        raise BundleError(f"threshold = {threshold!r}: expected a finite number or None")
    return float(threshold)


def _is_certified(manifest: bundle.Manifest, runtime: str, threshold: float | None) -> bool:
    """Whether some row of the dial was certified for this threshold, where it was made."""
    record = manifest.selector
    return record.certified_on == manifest.setting(runtime) and any(
        row.certified and row.threshold == threshold for row in record.table
    )


def _open(
    opened: bundle.Bundle, route: Route | None, runtime: str, threads: int
) -> dict[str, registry.Runner]:
    """The runners that a route needs, each checked to take and give what the session relies on."""
    from greenprune import registry

    manifest = opened.manifest
    outputs = [output.name for output in manifest.outputs]
    wanted = {route: outputs} if route else {"aggressive": [*outputs, SCORE], "mild": outputs}
    target = registry.load_target(manifest.target)
    runners: dict[str, registry.Runner] = {}
    try:
        for variant, names in wanted.items():
            artifact = opened.artifact(variant, runtime)
            runner = runners[variant] = target.open(artifact, runtime, threads)
            if runner.input_name != manifest.input.name or set(names) - set(runner.output_names):
                raise BundleError(
                    f"{artifact}: expected the input '{manifest.input.name}' and the outputs "
                    f"{', '.join(names)}, found '{runner.input_name}' and "
                    f"{', '.join(runner.output_names)}; make the bundle again"
                )
    except BaseException:
        for runner in runners.values():
            runner.close()
        raise
    return runners


def _node(spec: bundle.TensorSpec) -> NodeArg:
    shape: list[int | str] = ["batch" if size is None else size for size in spec.shape]
    return NodeArg(spec.name, shape, ONNX_TYPES.get(spec.dtype, f"tensor({spec.dtype})"))
