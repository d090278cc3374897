"""One thread writes checkpoints while training goes on; one at a time, and a failure is never lost.

The loop pays for the copy of the state. A save that begins before the last one is on the disk waits for it, so that at
most one copy lives beside the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_LAST = 1.0  # seconds until a write that is told to end is left alone, in an operation that does not come back


class GivenUp(Exception):
    """The write was told to end."""


class Writer:
    """Runs one write at a time beside the training."""

    def __init__(self) -> None:
        # Not the thread's own join: one that a signal interrupts takes a thread for dead that goes on (Python 3.11).
        self._over = threading.Event()
        self._over.set()
        self._failure: BaseException | None = None
        self._given_up = threading.Event()

    def start(self, write: Callable[[Callable[[], None]], None]) -> None:
        """Begin a write, after the one before has ended.

        Args:
            write: called in the thread with a function that it calls now and then, which raises to end it.

        Raises:
            BaseException: what the write before failed with, if nobody has been told yet.
        """
        self.wait()
        self.raise_failure()
        self._given_up.clear()
        self._over.clear()
        threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True).start()

    def _run(self, write: Callable[[Callable[[], None]], None]) -> None:
        try:
            write(self._go_on)
        except GivenUp:
            pass
        except BaseException as error:  # told in the thread that trains
            self._failure = error
        finally:
            self._over.set()

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise GivenUp

    @property
    def busy(self) -> bool:
        """Whether a write goes on."""
        return not self._over.is_set()

    def pause(self, seconds: float) -> bool:
        """Wait so long at most for the write that goes on; whether there was one."""
        was_busy = self.busy
        self._over.wait(seconds)
        return was_busy

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the write that goes on; after `seconds` have it give up, unless the disk does not answer at all."""
        if not self._over.wait(seconds):
            self._given_up.set()
            self._over.wait(_LAST)

    def raise_failure(self) -> None:
        """Raise what a write has failed with, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
