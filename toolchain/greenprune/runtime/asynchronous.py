"""Calls that are answered later, each exactly once (device side)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from greenprune.errors import BundleError

Work = Callable[[], Any]
Deliver = Callable[[Any, BaseException | None], None]
"""Takes the result or the error; the other one is None."""


class AsyncCalls:
    """One worker thread (a network uses all cores already) behind a bounded number of calls.

    Args:
        limit: of calls that are waiting or running; further ones are not taken.
    """

    def __init__(self, limit: int) -> None:
        self._slots = threading.BoundedSemaphore(limit)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="greenprune")
        self._worker: int | None = None

    def submit(self, work: Work, deliver: Deliver) -> bool:
        """Take a call, or not: then False, and nothing of it will be heard again.

        What ``deliver`` raises is logged by ``concurrent.futures``' logger.

        Raises:
            BundleError: closed.
        """
        if not self._slots.acquire(blocking=False):
            return False
        try:
            future = self._pool.submit(self._answer, work, deliver)
        except RuntimeError as error:
            self._slots.release()
            raise BundleError("the session is closed; open a new AdaptiveSession") from error
        future.add_done_callback(lambda done: self._finish(done, deliver))
        return True

    def close(self, *, cancel: bool) -> None:
        """Take no more, and end what is pending: answered, or the error that it was cancelled."""
        own = threading.get_ident() == self._worker  # closed by a delivery, which cannot wait
        self._pool.shutdown(wait=not own, cancel_futures=cancel)

    def _answer(self, work: Work, deliver: Deliver) -> None:
        self._worker = threading.get_ident()
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        self._slots.release()  # before the delivery, which may ask for the next
        deliver(result, failure)

    def _finish(self, done: Future[None], deliver: Deliver) -> None:
        """Of a cancelled call, which never began, and of a delivery that failed."""
        if done.cancelled():
            self._slots.release()
            deliver(None, BundleError("cancelled: the session was closed before it was answered"))
        elif (error := done.exception()) is not None:
            raise error  # logged, not lost
