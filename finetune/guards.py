"""What ends a run that gets no further, and what its processes tell each other when one of them fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ExitCode, HangError
from finetune.preflight import Checked

if TYPE_CHECKING:
    from finetune.run.ranks import World
    from finetune.run.watch import Watch


def watch_of(timeout: float, checked: Checked, launched: World) -> Watch:
    """The watchdog of one process; it looks once the group is formed.

    Args:
        timeout: launch.timeout.
        checked: with the run's folder.
        launched: this process's place.
    """
    from finetune.run.ending import leave_word
    from finetune.run.launch import tell_hang
    from finetune.run.watch import Watch

    folder = checked.folder

    def place() -> Path | None:
        return folder.hang if watch.has_begun or _may_write(checked) else None

    def ended(code: int, verdict: str, step: int) -> None:
        stacks = f"stacks are in {folder.hang}" if place() else "stacks stand above"
        reason = f"{verdict}; {stacks}. The same command continues from the last checkpoint"
        if place() and (launched.is_main or not folder.exit.exists()):  # rank 0 may have said why it ended
            leave_word(folder, code, reason, step)
        if code == ExitCode.HANG:
            tell_hang(reason)

    watch = Watch(launched, place, timeout, ended)
    return watch


def _may_write(checked: Checked) -> bool:
    """Whether reports may be written before the run's first files are: into what is empty, or this very run's."""
    from finetune.run import stacks

    folder = checked.folder
    return stacks.are_all(folder.root) or (folder.is_run() and folder.product is None and not checked.overwrite)


@contextlib.contextmanager
def watched(watch: Watch, checked: Checked, explained: Callable[[BaseException], BaseException]) -> Iterator[None]:
    """Have a failure of the block named, whoever's it is, and told to the other processes before this one leaves them.

    Args:
        watch: from `watch_of`; training, which is inside the block, may have done all this with it and stopped it.
        checked: with the run's folder.
        explained: the error a user is shown for what ended the block.

    Raises:
        BaseException: what `explained` gives, or who is to blame.
    """
    from finetune.run.ending import code_and_reason, leave_word, with_blame

    try:
        yield
    except Exception as error:
        shown = found = explained(error)
        if not watch.is_over:
            watch.give_way()
            shown = with_blame(found, watch.blame)
            first = watch.confess(*code_and_reason(shown))
            named = isinstance(shown, HangError) and shown is not found
            if named and (first or watch.speaks()) and _may_write(checked):
                leave_word(checked.folder, *code_and_reason(shown), 0)
        if shown is error:
            raise
        raise shown from error
    except KeyboardInterrupt:
        if not watch.is_over:
            watch.give_way()
            watch.confess(ExitCode.STOPPED, "stopped on request before the first step")
        raise
    finally:
        watch.stop()
