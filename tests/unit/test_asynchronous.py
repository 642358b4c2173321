"""Calls that are answered later: each exactly once, in order, and never more than may wait."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from greenprune.errors import BundleError
from greenprune.runtime import AdaptiveSession, Policy

HALF = Policy(threshold=0.5, allow_uncertified=True)


class Gate:
    """Holds a network until it is opened."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Event()

    def __call__(self) -> None:
        self.begun.release()
        self.may_end.wait()


@pytest.fixture
def answers() -> Queue[Any]:
    return Queue()


@pytest.fixture
def deliver(answers: Queue[Any]) -> Any:
    def put(outputs: Any, user_data: Any, error: Any) -> None:
        answers.put((None if outputs is None else outputs[0][0].tolist(), user_data, error))

    return put


def test_every_call_is_answered_once_and_in_order(
    tiny_bundle: Path, fakes: Any, batch: Any, answers: Any, deliver: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, max_pending=200)
    for index in range(100):
        inputs = batch([0.9 if index % 3 else 0.1], first=index)
        assert session.run_async(None, {"input": inputs}, deliver, index)
    session.close()
    found = [answers.get_nowait() for _ in range(100)]
    assert [(data, error) for _, data, error in found] == [(index, None) for index in range(100)]
    assert [tags[:2] for tags, _, _ in found] == [[i, 2 if i % 3 else 1] for i in range(100)]
    assert answers.empty()
    assert session.statistics.calls == 100


def test_an_error_is_delivered(
    tiny_bundle: Path, fakes: Any, batch: Any, answers: Any, deliver: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF)
    fakes["mild"].fail("mild is broken")
    session.run_async(None, {"input": batch([0.1])}, deliver, "frame")
    outputs, data, error = answers.get(timeout=60)
    assert (outputs, data) == (None, "frame")
    assert "mild is broken" in str(error)
    session.close()
    assert answers.empty()


def test_a_busy_session_takes_no_more_than_may_wait(
    tiny_bundle: Path, fakes: Any, batch: Any, answers: Any, deliver: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, max_pending=1)
    gate = fakes["aggressive"].before = Gate()
    feeds = {"input": batch([0.9])}
    assert session.run_async(None, feeds, deliver, 0)
    gate.begun.acquire()
    assert [session.run_async(None, feeds, deliver, index) for index in (1, 2)] == [False, False]
    gate.may_end.set()
    assert answers.get(timeout=60)[1] == 0
    assert session.run_async(None, feeds, deliver, 3)  # free again, at the latest in the callback
    session.close()
    assert answers.get_nowait()[1] == 3
    assert answers.empty()
    assert session.statistics.dropped == 2


@pytest.mark.parametrize("cancel", [False, True])
def test_closing_ends_what_is_pending(
    tiny_bundle: Path, fakes: Any, batch: Any, answers: Any, deliver: Any, cancel: bool
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, max_pending=5)
    gate = fakes["aggressive"].before = Gate()
    for index in range(5):
        assert session.run_async(None, {"input": batch([0.9], first=index)}, deliver, index)
    gate.begun.acquire()
    closing = threading.Thread(target=session.close, kwargs={"cancel_pending": cancel})
    closing.start()
    if cancel:  # all that had not begun, before the one that had is answered
        cancelled = [answers.get(timeout=60) for _ in range(4)]
        assert sorted(data for _, data, _ in cancelled) == [1, 2, 3, 4]
        assert all("cancelled" in str(error) for _, _, error in cancelled)
    gate.may_end.set()
    closing.join()
    rest = [answers.get_nowait() for _ in range(1 if cancel else 5)]
    assert [data for _, data, error in rest if error is None] == list(range(len(rest)))
    assert answers.empty()
    with pytest.raises(BundleError, match="closed"):
        session.run_async(None, {"input": batch([0.9])}, deliver)


def test_a_cancelled_callback_may_ask_again_and_close(
    tiny_bundle: Path, fakes: Any, batch: Any, answers: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, max_pending=3)
    gate = fakes["aggressive"].before = Gate()
    feeds = {"input": batch([0.9])}

    def callback(outputs: Any, user_data: Any, error: Any) -> None:
        answers.put((user_data, error))
        if error is not None:
            with pytest.raises(BundleError, match="closed"):
                session.run_async(None, feeds, callback, "again")
            session.close()  # waits for the one that runs

    for index in range(3):
        assert session.run_async(None, feeds, callback, index)
    gate.begun.acquire()
    closing = threading.Thread(target=session.close, kwargs={"cancel_pending": True}, daemon=True)
    closing.start()
    assert answers.get(timeout=60)[0] == 1
    gate.may_end.set()
    assert {answers.get(timeout=60)[0] for _ in range(2)} == {0, 2}
    closing.join(60)
    assert not closing.is_alive()
    assert answers.empty()


@pytest.mark.parametrize("cancel", [False, True])
def test_a_callback_that_exits_ends_nobody_else(
    tiny_bundle: Path,
    fakes: Any,
    batch: Any,
    answers: Any,
    cancel: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, max_pending=4)
    gate = fakes["aggressive"].before = Gate()
    feeds = {"input": batch([0.9])}

    def callback(outputs: Any, user_data: Any, error: Any) -> None:
        answers.put((user_data, error is None))
        raise SystemExit("no more")

    for index in range(3):
        assert session.run_async(None, feeds, callback, index)
    gate.begun.acquire()
    threading.Timer(0, gate.may_end.set).start()
    if not cancel:
        assert [answers.get(timeout=60) for _ in range(3)] == [(i, True) for i in range(3)]
        assert session.run_async(None, feeds, callback, 3)  # still answered
    session.close(cancel_pending=cancel)
    rest = [answers.get(timeout=60) for _ in range(3 if cancel else 1)]
    assert {data for data, _ in rest} == ({0, 1, 2} if cancel else {3})
    assert answers.empty()
    assert caplog.text.count("SystemExit: no more") == (3 if cancel else 4)


def test_closing_in_a_callback_cancels_what_waits_behind_it(
    tiny_bundle: Path, fakes: Any, batch: Any, answers: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, max_pending=3)
    gate = fakes["aggressive"].before = Gate()

    def callback(outputs: Any, user_data: Any, error: Any) -> None:
        session.close()  # cannot wait for calls that its own thread would answer
        answers.put((user_data, error))

    for index in range(3):
        assert session.run_async(None, {"input": batch([0.9])}, callback, index)
    gate.may_end.set()
    found = dict(answers.get(timeout=60) for _ in range(3))
    assert found[0] is None
    assert all("cancelled" in str(found[index]) for index in (1, 2))
    assert fakes["aggressive"].seen == [1]
    assert fakes["aggressive"].closed


def test_no_call_is_taken_while_the_session_closes(
    tiny_bundle: Path, fakes: Any, batch: Any, deliver: Any, answers: Any
) -> None:
    """Not even between two steps of closing: the thread for it would never end."""
    session = AdaptiveSession(tiny_bundle, policy=HALF)
    inner, late = session._lock, []

    class Lock:
        def __enter__(self) -> None:
            inner.acquire()

        def __exit__(self, *_: object) -> None:
            inner.release()
            session._lock = inner
            try:
                late.append(session.run_async(None, {"input": batch([0.9])}, deliver))
            except BundleError as error:
                late.append(str(error))

    session._lock = Lock()  # type: ignore[assignment]
    session.close()
    assert "closed" in str(late[0])
    assert answers.empty()


def test_a_callback_may_fail_ask_again_and_close(
    tiny_bundle: Path, fakes: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, max_pending=1)
    feeds = {"input": batch([0.9])}
    seen: list[Any] = []
    done = threading.Event()

    def callback(outputs: Any, user_data: Any, error: Any) -> None:
        seen.append((user_data, error))
        if user_data < 2:
            assert session.run_async(None, feeds, callback, user_data + 1)
        else:
            session.close()
            done.set()
        raise RuntimeError("callback is broken")

    session.run_async(None, feeds, callback, 0)
    assert done.wait(60)
    assert seen == [(0, None), (1, None), (2, None)]
    assert "callback is broken" in caplog.text
    with pytest.raises(BundleError, match="closed"):
        session.run(None, feeds)


def test_the_deadline_counts_the_wait(
    tiny_bundle: Path, fakes: Any, batch: Any, answers: Any, deliver: Any, clock: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, policy=HALF, deadline_ms=30)
    fakes["mild"].before = lambda: clock.advance(0.010)
    session.warmup()
    gate = fakes["aggressive"].before = Gate()
    for index in range(2):
        assert session.run_async(None, {"input": batch([0.1])}, deliver, index)
    gate.begun.acquire()
    clock.advance(0.015)
    gate.may_end.set()
    session.close()
    tags = [answers.get_nowait()[0][1] for _ in range(2)]
    assert tags == [1.0, 2.0]  # 15 + 10 of 30 ms; then only 5 are left
    assert session.statistics.degraded == 1
