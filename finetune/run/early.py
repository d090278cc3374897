"""Signals that ask a run to stop before its first step, while nothing could be saved yet."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from finetune.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Asked(KeyboardInterrupt):
    """Raised in the main thread; no Exception, so that no library takes it for a fault of its own."""


class EarlyStop:
    """Ends the process on the first signal, with exit code 75, until training takes over the signals itself."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._over = False
        self._previous: dict[int, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[EarlyStop]:
        """Take over the signals for the block; only the main thread can.

        Raises:
            StoppedError: one came.
        """
        try:
            if threading.current_thread() is threading.main_thread():
                self._previous = {int(number): signal.signal(number, self._stop) for number in SIGNALS}
            yield self
        except _Asked:
            raise StoppedError(
                "stopped on request before the first step; nothing was trained by this start, and the same command "
                "starts again"
            ) from None
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def over(self) -> None:
        """Training listens itself; what comes after it finds the signals as they were before."""
        self._over = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._over and os.getpid() == self._owner:
            raise _Asked
        before = self._previous.get(number)
        if callable(before):
            before(number, frame)
        elif before is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
