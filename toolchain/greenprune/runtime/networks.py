"""The networks of a bundle, opened when a session needs them (device side)."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from greenprune.errors import BundleError

if TYPE_CHECKING:
    from greenprune.bundle import Bundle
    from greenprune.registry import Runner

SCORE = "score"
CLOSED = "the session is closed; open a new AdaptiveSession"


class Networks:
    """Runners by variant; each is opened once, checked, and stays open until :meth:`close`.

    Args:
        opened: the bundle.
        runtime: that opens its artifacts.
        threads: for the runtime; 0 means one for each core.

    Raises:
        TargetError: an unknown target.
    """

    def __init__(self, opened: Bundle, runtime: str, threads: int) -> None:
        from greenprune import registry

        self._target = registry.load_target(opened.manifest.target)
        self._opened, self._runtime, self._threads = opened, runtime, threads
        self._lock = threading.Lock()  # held while a network opens, never while one runs
        self._runners: dict[str, Runner] = {}
        self._closed = False

    def get(self, variant: str) -> Runner:
        """The variant's runner, opened now if it was not yet.

        Raises:
            BundleError: a missing, damaged or unfitting artifact; or the networks are closed.
            TargetError: the runtime refuses it.
            MissingPackageError: the runtime is not installed.
        """
        runner = self._runners.get(variant)
        if runner is not None:
            return runner
        self.open([variant])
        return self._runners[variant]

    def open(self, variants: Iterable[str]) -> None:
        """Open all of these, or none of those that were not open before.

        Raises as :meth:`get`.
        """
        with self._lock:
            if self._closed:
                raise BundleError(CLOSED)
            opened: dict[str, Runner] = {}  # nobody else has them yet
            try:
                for variant in variants:
                    if variant not in self._runners:
                        opened[variant] = self._open(variant)
            except BaseException:
                for runner in opened.values():
                    runner.close()
                raise
            self._runners.update(opened)

    def close(self) -> None:
        """Give the memory back, and open nothing more."""
        with self._lock:
            self._closed = True
            for runner in self._runners.values():
                runner.close()
            self._runners = {}

    def _open(self, variant: str) -> Runner:
        manifest = self._opened.manifest
        artifact = self._opened.artifact(variant, self._runtime)
        runner = self._target.open(artifact, self._runtime, self._threads)
        expected = [output.name for output in manifest.outputs]
        if variant == "aggressive":
            expected.append(SCORE)
        if runner.input_name != manifest.input.name or set(expected) - set(runner.output_names):
            found = f"'{runner.input_name}' and {', '.join(runner.output_names)}"
            runner.close()
            raise BundleError(
                f"{artifact}: expected the input '{manifest.input.name}' and the outputs "
                f"{', '.join(expected)}, found {found}; make the bundle again"
            )
        return runner
