"""Work of rank 0, or of one rank of each host, that all ranks wait for, however long it takes.

An operation of all processes gives up after `launch.timeout`: who waits in it for a rank that reads a terabyte would
take it for dead. So the work is done in a thread, and all ranks tell each other once a second that they are there.
A rank that dies or is stopped meanwhile is noticed as anywhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from finetune.run.ranks import World, from_all

BEAT = 1.0  # seconds between two words of rank 0
SILENT = 10.0  # seconds after which a reader wonders


def from_main_in_time(launched: World, make: Callable[[], Any], long: Callable[[], None] = lambda: None) -> Any:
    """`make()` of rank 0, on every rank; all call it at once.

    Args:
        launched: from `finetune.run.ranks.world`.
        make: the work, in a thread of its own, which a signal to this process does not wait for. What it gives, or
            raises, is sent to the other ranks, so it must be small, and it calls no operation of all processes.
        long: told once, on rank 0, when the work takes more than a few seconds.

    Raises:
        BaseException: what `make` raised, on all ranks.
    """
    box: list[tuple[Any, BaseException | None]] = []
    thread = threading.Thread(target=lambda: box.append(_outcome(make)), daemon=True)
    if launched.is_main:
        thread.start()
    waited, told = 0.0, False
    while True:
        if launched.is_main:
            thread.join(BEAT)
            waited += BEAT
        outcome = from_all(launched, box[0] if box else None)[0]  # rank 0, too, waits here for one that is stopped
        if outcome is not None:
            made, error = box[0] if launched.is_main else outcome
            if error is not None:
                raise error
            return made
        if launched.is_main and waited >= SILENT and not told:
            told = True
            long()


def on_each_host_in_time(launched: World, make: Callable[[], Any], long: Callable[[], None] = lambda: None) -> None:
    """`make()` of the first rank of each host; all ranks call this at once, and go on when all hosts are done.

    Args:
        launched: from `finetune.run.ranks.world`.
        make: the work, in a thread of its own; what it raises is sent to the other ranks, and it calls no operation of
            all processes.
        long: told once, on rank 0, when the work takes more than a few seconds.

    Raises:
        BaseException: what `make` raised on the first host on which it did, on all ranks.
    """
    box: list[tuple[Any, BaseException | None]] = []
    works = launched.local_rank == 0
    thread = threading.Thread(target=lambda: box.append((None, _outcome(make)[1])), daemon=True)
    if works:
        thread.start()
    else:
        box.append((None, None))
    waited, told = 0.0, False
    while True:
        if works:
            thread.join(BEAT)
            waited += BEAT
        outcomes = from_all(launched, box[0] if box else None)
        if all(outcome is not None for outcome in outcomes):
            for _, error in outcomes:
                if error is not None:
                    raise error
            return
        if launched.is_main and waited >= SILENT and not told:
            told = True
            long()


def _outcome(make: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return make(), None
    except BaseException as error:
        return None, error
