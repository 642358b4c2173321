"""Calls that are answered later, each exactly once (device side)."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from greenprune.errors import BundleError
from greenprune.runtime.networks import CLOSED

Work = Callable[[], Any]
Deliver = Callable[[Any, BaseException | None], None]
"""Takes the result or the error; the other one is None. What it raises is logged."""


class AsyncCalls:
    """One worker thread (a network uses all cores already) behind a bounded number of calls.

    Args:
        limit: of calls that are waiting or running; further ones are not taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="greenprune")
        self._worker: int | None = None
        self._lock = threading.Lock()  # of all that follows; never held in a delivery
        self._waiting: deque[tuple[Work, Deliver]] = deque()
        self._running = 0
        self._closed = False

    def submit(self, work: Work, deliver: Deliver) -> bool:
        """Take a call, or not: then False, and nothing of it will be heard again.

        Raises:
            BundleError: closed.
        """
        with self._lock:
            if self._closed:
                raise BundleError(CLOSED)
            if len(self._waiting) + self._running >= self._limit:
                return False
            self._pool.submit(self._answer_next)
            self._waiting.append((work, deliver))
            return True

    def close(self, *, cancel: bool) -> None:
        """Take no more, and end what is pending: answered, or the error that it was cancelled.

        Closed by a delivery, whose thread is the one that would answer, it always cancels.
        """
        own = threading.get_ident() == self._worker
        cancelled = []
        with self._lock:
            self._closed = True
            if cancel or own:
                cancelled = list(self._waiting)
                self._waiting.clear()
        for _, deliver in cancelled:
            error = BundleError("cancelled: the session was closed before it was answered")
            _tell(deliver, None, error)
        self._pool.shutdown(wait=not own)

    def _answer_next(self) -> None:
        self._worker = threading.get_ident()
        with self._lock:
            if not self._waiting:  # cancelled
                return
            work, deliver = self._waiting.popleft()
            self._running = 1
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with self._lock:  # before the delivery, which may ask for the next
            self._running = 0
        _tell(deliver, result, failure)


def _tell(deliver: Deliver, result: Any, error: BaseException | None) -> None:
    try:
        deliver(result, error)
    except BaseException:  # SystemExit too: it would end the thread, and others their answers
        logging.getLogger(__name__).exception("the callback of a call failed")
