"""The session's routing, its options and its checks, on networks that the test controls."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from greenprune import bundle
from greenprune.bundle import Preprocessing
from greenprune.errors import BundleError, DataError, GreenpruneError
from greenprune.runtime import AdaptiveSession, Policy, RunInfo, decide, statistics
from greenprune.runtime.faults import percentile
from greenprune.runtime.preprocessing import preprocess
from greenprune.runtime.selector import accepts


def ask(session: AdaptiveSession, inputs: Any) -> tuple[Any, RunInfo]:
    (logits,), info = session.run_with_info(["logits"], {"input": inputs})
    (again,) = session.run(None, {"input": inputs})
    np.testing.assert_array_equal(logits, again)
    return logits, info


def at(threshold: float) -> Policy:
    return Policy(threshold=threshold, allow_uncertified=True)


@given(
    scores=st.lists(
        st.one_of(st.floats(0, 1, width=32), st.sampled_from([np.nan, np.inf, -np.inf, 0.5])),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sample_is_routed_on_its_own_and_answers_stay_in_order(
    tiny_bundle_source: Path, fakes: Any, batch: Any, scores: list[float]
) -> None:
    # a breaker that never opens: it would be the one thing that ties samples together
    session = AdaptiveSession(tiny_bundle_source, policy=at(0.5), breaker_faults=10**9)
    logits, info = ask(session, batch(scores))
    accepted = np.asarray(scores, dtype=np.float32) >= 0.5
    np.testing.assert_array_equal(logits[:, 0], np.arange(len(scores)))
    np.testing.assert_array_equal(logits[:, 1], np.where(accepted, 2.0, 1.0))
    assert info.routes == tuple("aggressive" if yes else "mild" for yes in accepted)
    np.testing.assert_array_equal(info.scores, np.float32(scores))
    assert [fault is not None for fault in info.faults] == np.isnan(scores).tolist()
    assert not any(info.degraded)
    for index in range(len(scores)):  # alone as in company
        alone, told = ask(session, batch(scores[index : index + 1], first=index))
        np.testing.assert_array_equal(alone, logits[index : index + 1])
        assert told.routes == (info.routes[index],)


def test_mild_runs_on_the_escalated_alone(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(tiny_bundle, policy=at(0.5), drift=None)
    session.run(None, {"input": batch([0.9, 0.1, 0.8, 0.2, 0.3])})
    session.run(None, {"input": batch([0.9, 0.5])})
    assert (fakes["aggressive"].seen, fakes["mild"].seen) == ([5, 2], [3])
    found = session.statistics
    assert (found.calls, found.faults, found.degraded, found.late, found.failed) == (2, 0, 0, 0, 0)
    assert found.routes == {"aggressive": 4, "mild": 3, "dense": 0}
    assert found.latency_p50_ms is not None
    assert found.latency_p99_ms is None  # of two calls there is none


@pytest.mark.parametrize("route", ["mild", "aggressive", "dense"])
def test_a_forced_route_opens_and_runs_one_network(
    tiny_bundle: Path, fakes: Any, batch: Any, route: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=Policy(route=route))
    _, info = ask(session, batch([0.1, np.nan]))
    assert [name for name, runner in fakes.items() if runner.opened] == [route]
    assert info.routes == (route, route)
    assert np.isnan(info.scores).all()
    assert info.certified == (False, False)
    assert session.statistics.routes[route] == 4
    assert session.threshold is None


def test_a_bundle_that_accepts_nothing_is_mild_alone(
    tiny_bundle: Path, fakes: Any, batch: Any
) -> None:
    record = bundle.open_bundle(tiny_bundle).manifest.selector
    changed = dataclasses.replace(record, threshold=None, table=())
    bundle.update_manifest(tiny_bundle, {"selector": changed})
    session = AdaptiveSession(tiny_bundle)
    logits, info = ask(session, batch([1.0, np.inf]))
    assert not fakes["aggressive"].opened
    assert info.routes == ("mild", "mild")
    assert info.certified == (False, False)
    assert (logits[:, 1] == 1.0).all()


def test_networks_are_opened_when_they_are_needed(
    tiny_bundle: Path, fakes: Any, batch: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=at(0.5), mild="lazy", drift=None)
    session.run(None, {"input": batch([0.9])})
    assert not fakes["mild"].opened
    (logits,) = session.run(None, {"input": batch([0.1])})
    assert fakes["mild"].opened
    assert logits[0, 1] == 1.0
    other = AdaptiveSession(tiny_bundle, policy=at(0.5))
    assert not fakes["dense"].opened
    other.policy = Policy(route="dense")
    assert fakes["dense"].opened


BAD_FEEDS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda one: {}, "expected exactly the input 'input', got: nothing"),
    (lambda one: {"x": one}, "'input', got: x"),
    (lambda one: {"input": one, "x": one}, "got: input, x"),
    (lambda one: {"input": one.astype(np.float64)}, "float32 array .*got float64"),
    (
        lambda one: {"input": one[0]},
        r"shape \['N', 1, 16, 16\].*got float32 of shape \[1, 16, 16\]",
    ),
    (lambda one: {"input": one[:, :, :8]}, r"\[1, 1, 8, 16\]"),
    (lambda one: {"input": one[:0]}, "N >= 1"),
    (lambda one: {"input": [[1.0]]}, "got list"),
    (lambda one: one, "expected a dict of the input 'input', got: ndarray$"),
    (lambda one: None, "expected a dict of the input 'input', got: NoneType$"),
    (lambda one: {"input": one * np.nan}, "expected finite values, got 256 .* in sample 0"),
    (
        lambda one: {"input": np.concatenate([one, np.full_like(one, np.inf)])},
        "'input': .*got 256 that are NaN or infinite, the first in sample 1",
    ),
]


@pytest.mark.parametrize(("feeds", "message"), BAD_FEEDS)
def test_feeds_are_checked(
    tiny_bundle: Path, fakes: Any, batch: Any, feeds: Any, message: str
) -> None:
    session = AdaptiveSession(tiny_bundle)
    for call in (session.run, session.run_with_info, partial(session.run_async, callback=print)):
        with pytest.raises(DataError, match=message):
            call(None, feeds(batch([1])))
        with pytest.raises(DataError, match="unknown output 'x'; expected some of: logits"):
            call(["x"], {"input": batch([1])})
        with pytest.raises(DataError, match="expected a list of names or None, got 'logits'"):
            call("logits", {"input": batch([1])})
    assert session.statistics.calls == session.statistics.failed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "toaster"}, "runtime 'toaster'; this bundle has: .*onnxruntime"),
        ({"mild": "sleepy"}, "mild = 'sleepy': expected one of resident, lazy"),
        ({"on_fault": "ignore"}, "on_fault = 'ignore': expected one of raise, degrade"),
        ({"deadline_ms": 0}, "deadline_ms = 0: expected a number above 0"),
        ({"deadline_ms": float("nan")}, "deadline_ms = nan"),
        ({"breaker_faults": 0}, "breaker_faults = 0"),
        ({"max_pending": -1}, "max_pending = -1"),
        ({"max_pending": 1.5}, "max_pending = 1.5: expected a whole number, at least 1"),
        ({"breaker_faults": 2.5}, "breaker_faults = 2.5: expected a whole number"),
        ({"breaker_seconds": "long"}, "breaker_seconds = 'long': expected a finite number"),
        ({"deadline_ms": True}, "deadline_ms = True: expected a finite number"),
        ({"threads": -1}, "threads = -1: expected a whole number, at least 0"),
        ({"threads": "2"}, "threads = '2': expected a whole number"),
        ({"policy": "mild"}, "policy = 'mild': expected a Policy"),
        ({"drift": True}, "drift = True: expected a DriftGuard"),
    ],
)
def test_options_are_checked(tiny_bundle: Path, fakes: Any, options: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        AdaptiveSession(tiny_bundle, **options)


def test_numbers_of_numpy_are_numbers(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(
        tiny_bundle,
        deadline_ms=np.float32(30),  # type: ignore[arg-type]
        max_pending=np.int64(4),  # type: ignore[arg-type]
        threads=np.int32(1),  # type: ignore[arg-type]
    )
    session.run(None, {"input": batch([1])}, deadline_ms=np.int64(10))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [None, 0.01, "mild"])
def test_only_a_policy_is_one(tiny_bundle: Path, fakes: Any, policy: Any) -> None:
    session = AdaptiveSession(tiny_bundle)
    before = session.policy
    with pytest.raises(BundleError, match=r"policy = .*: expected a Policy, as in Policy\("):
        session.policy = policy
    assert session.policy is before


def test_networks_that_do_not_fit_the_manifest_are_refused(tiny_bundle: Path, fakes: Any) -> None:
    fakes["aggressive"].output_names = ("logits",)
    with pytest.raises(BundleError, match="outputs logits, score, found 'input' and logits"):
        AdaptiveSession(tiny_bundle)
    assert fakes["aggressive"].closed


def test_a_closed_session_says_so(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    with AdaptiveSession(tiny_bundle) as session:
        session.warmup()
        assert session.statistics.calls == 0
    session.close()
    assert fakes["mild"].closed
    assert fakes["aggressive"].closed
    feeds = {"input": batch([1])}
    for call in (
        session.warmup,
        lambda: session.run(None, feeds),
        lambda: session.run_async(None, feeds, print),
        lambda: setattr(session, "policy", Policy(route="mild")),
    ):
        with pytest.raises(BundleError, match="closed"):
            call()


def test_closing_waits_for_the_calls_that_run(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    session = AdaptiveSession(tiny_bundle, policy=at(0.5))
    begun, may_end = threading.Event(), threading.Event()
    fakes["aggressive"].before = lambda: (begun.set(), may_end.wait())
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(session.run, None, {"input": batch([0.9])})
        begun.wait()
        closing = pool.submit(session.close)
        while not session._closed:  # until it waits
            threading.Event().wait(0)
        assert not fakes["aggressive"].closed
        may_end.set()
        assert call.result()[0][0, 1] == 2.0
        closing.result()
    assert fakes["aggressive"].closed


def test_a_refused_policy_leaves_alone_what_others_opened(
    tiny_bundle: Path, fakes: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call opens the lazy mild network while a policy waits to open dense, which is broken."""
    session = AdaptiveSession(tiny_bundle, policy=at(0.5), mild="lazy", drift=None)
    opening, waiting = threading.Event(), threading.Event()
    inner, target = session._networks._lock, session._networks._target
    open_it = target.open

    class Lock:
        def __enter__(self) -> None:
            if opening.is_set():
                waiting.set()
            inner.acquire()

        def __exit__(self, *_: object) -> None:
            inner.release()

    def open_slowly(artifact: Path, runtime: str, threads: int) -> Any:
        if artifact.stem == "dense":
            raise RuntimeError("dense is broken")
        opening.set()
        waiting.wait()
        return open_it(artifact, runtime, threads)

    session._networks._lock = Lock()  # type: ignore[assignment]
    monkeypatch.setattr(target, "open", open_slowly)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(session.run, None, {"input": batch([0.1])})
        opening.wait()
        with pytest.raises(RuntimeError, match="dense is broken"):
            session.policy = Policy(route="dense")
        assert call.result()[0][0, 1] == 1.0
    assert not fakes["mild"].closed
    assert (session.run(None, {"input": batch([0.1])})[0][0, 1]) == 1.0


def test_what_a_refused_policy_opened_is_closed(tiny_bundle: Path, fakes: Any) -> None:
    session = AdaptiveSession(tiny_bundle, policy=Policy(route="dense"))
    fakes["mild"].output_names = ("other",)
    with pytest.raises(BundleError, match="outputs logits"):
        session.policy = at(0.5)
    assert fakes["aggressive"].closed
    assert not fakes["dense"].closed


def test_a_session_that_closes_opens_nothing_more(
    tiny_bundle: Path, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=Policy(route="mild"))
    needs = session._needs

    def close_meanwhile(*arguments: Any, **options: Any) -> Any:
        session.close()
        return needs(*arguments, **options)

    monkeypatch.setattr(session, "_needs", close_meanwhile)
    with pytest.raises(BundleError, match="closed"):
        session.policy = Policy(route="dense")
    assert not fakes["dense"].opened


def test_an_error_in_the_books_does_not_hang_closing(
    tiny_bundle: Path, fakes: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=at(0.5))
    monkeypatch.setattr(session, "_counters", None)
    with pytest.raises(AttributeError):
        session.run(None, {"input": batch([0.9])})
    closing = threading.Thread(target=session.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()


def test_latencies_are_sorted_while_calls_go_on(
    tiny_bundle: Path, fakes: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=at(0.5), drift=None)
    for _ in range(100):
        session.run(None, {"input": batch([0.9])})
    locked: list[bool] = []

    def spy(values: Any, share: float) -> float:
        locked.append(session._lock.locked())
        return percentile(values, share)

    monkeypatch.setattr(statistics, "percentile", spy)
    found = session.statistics
    assert locked == [False, False]
    assert found.latency_p50_ms is not None
    assert found.latency_p99_ms is not None
    assert found.latency_p50_ms <= found.latency_p99_ms


def test_threads_share_a_session(tiny_bundle: Path, fakes: Any, batch: Any) -> None:
    """While the policy changes all the time: no call sees half of one."""
    session = AdaptiveSession(tiny_bundle, policy=at(0.3), drift=None)
    gate = threading.Barrier(8)
    seen: set[tuple[Any, ...]] = set()

    def work(worker: int) -> bool:
        scores = np.random.default_rng(worker).random(8).astype(np.float32)
        gate.wait()
        for turn in range(300):
            if worker == 0:
                session.policy = at(0.3) if turn % 2 else Policy(max_accuracy_loss=0.05)
            (logits,), info = session.run_with_info(None, {"input": batch(scores, first=worker)})
            seen.add((info.threshold, *info.certified))
            expected = np.where(decide(scores, info.threshold), 2, 1)
            if not ((logits[:, 0] == worker) & (logits[:, 1] == expected)).all():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert seen == {(0.3, *[False] * 8), (0.5, *[True] * 8)}
    found = session.statistics
    assert (found.calls, sum(found.routes.values())) == (2400, 19200)


def test_it_looks_like_an_onnx_runtime_session(tiny_bundle: Path) -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession(tiny_bundle / "graphs/mild.onnx")
    session = AdaptiveSession(tiny_bundle)
    for ours, theirs in (
        (session.get_inputs(), real.get_inputs()),
        (session.get_outputs(), real.get_outputs()),
    ):
        assert [(node.name, node.shape, node.type) for node in ours] == [
            (node.name, node.shape, node.type) for node in theirs
        ]
    session.policy = Policy(route="mild")
    feeds = {"input": np.ones((2, 1, 16, 16), dtype=np.float32)}
    for each in (session, real):
        for names in (None, [], ["logits"], ("logits",)):
            (logits,) = each.run(output_names=names, input_feed=feeds)
            np.testing.assert_array_equal(logits, real.run(None, feeds)[0])
    for call in (session.run_with_info, partial(session.run_async, callback=print)):
        call(output_names=[], input_feed=feeds)  # type: ignore[operator]
    session.close()


@given(st.lists(st.floats(width=32), max_size=30), st.one_of(st.none(), st.floats(0, 1)))
def test_decide_accepts_at_or_above_the_threshold(
    scores: list[float], threshold: float | None
) -> None:
    found = decide(np.asarray(scores, dtype=np.float32), threshold)
    assert found.dtype == np.bool_
    assert found.tolist() == [threshold is not None and score >= threshold for score in scores]
    if threshold is not None:
        each = np.asarray(scores, dtype=np.float32)
        assert [accepts(float(score), threshold) for score in each] == found.tolist()


def settings_for(channels: Any) -> Preprocessing:
    return Preprocessing(
        channels=channels, size=(4, 6), mean=(0.2, 0.4, 0.6)[:channels], std=(0.5,) * channels
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_what_training_does(channels: int) -> None:
    torch = pytest.importorskip("torch")
    data = pytest.importorskip("greenprune.data")
    image = np.random.default_rng(0).integers(0, 256, (4, 6, channels), dtype=np.uint8)
    expected = data.normalise(
        torch.from_numpy(image.transpose(2, 0, 1)[None].copy()), settings_for(channels)
    )
    found = preprocess(image, settings_for(channels))
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.flags.c_contiguous
    if channels == 1:
        np.testing.assert_array_equal(preprocess(image[:, :, 0], settings_for(1)), found)


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (np.zeros((4, 6), np.uint8), 3),
        (np.zeros((4, 6, 3), np.uint8), 1),
        (np.zeros((6, 4), np.uint8), 1),
        (np.zeros((4, 6), np.float32), 1),
        (np.zeros((1, 4, 6, 1), np.uint8), 1),
        ("image.png", 1),
    ],
)
def test_images_that_do_not_fit_are_refused(image: Any, channels: int) -> None:
    with pytest.raises(DataError, match=r"image: expected .*got"):
        preprocess(image, settings_for(channels))


def test_a_bundle_without_preprocessing_says_so(tiny_bundle: Path, fakes: Any) -> None:
    bundle.update_manifest(tiny_bundle, {"preprocessing": None})
    with pytest.raises(GreenpruneError, match="states no preprocessing"):
        AdaptiveSession(tiny_bundle).preprocess(np.zeros((16, 16), np.uint8))


def test_the_runtime_is_free_of_torch_and_of_what_it_does_not_need() -> None:
    code = (
        "import sys\n"
        "import greenprune.runtime, greenprune.runtime.runners, greenprune.bundle\n"
        "import greenprune_calibration, greenprune_targets.x86\n"
        "extra = {'torch', 'rich', 'click', 'pyJoules', 'openvino', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {extra}' if extra else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
