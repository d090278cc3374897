"""How a run ends: every way out becomes an exit code, a reason and an error for the user."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable

from finetune.errors import DiskError, ExitCode, FinetuneError, HangError, HardwareError, StoppedError
from finetune.run.folder import RunFolder
from finetune.run.shortage import is_shortage

# What gloo and NCCL say when a rank is gone or silent; neither has an error type of its own for it.
_SILENT_PEER = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Watchdog caught")


def as_fault(error: BaseException, remedies: Callable[[], Iterable[str]] = tuple) -> BaseException:
    """The error a user is shown for what ended the training; an unexpected one stays as it is, with its traceback.

    Args:
        error: what ended it.
        remedies: what would take less memory, a line each; asked only when memory ran out.
    """
    if isinstance(error, FinetuneError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return StoppedError("stopped at once on the second signal; the same command continues from the last checkpoint")
    if is_shortage(error):
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        lines = [f"  {remedy}" for remedy in remedies()]
        if lines:
            lines.insert(0, "Each of these takes less, and the upper ones leave the result alone:")
        lines.insert(0, f"out of memory: {first}")
        lines.append(
            "The same command continues from the last checkpoint; where a changed key counts as drift, it says with "
            "which --allow-drift, or that it needs a run of its own"
        )
        return HardwareError("\n".join(lines))
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SILENT_PEER):
        return HangError(
            f"another process of this run died, or did not answer within launch.timeout: {_peer_words(error)}; "
            "its own messages say why. The same command continues from the last checkpoint"
        )
    return error


def _peer_words(error: BaseException) -> str:
    """What gloo or NCCL says in its first line, without the place in its source and general advice."""
    first = str(error).splitlines()[0].partition(". This is typically")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", first)


def with_blame(fault: BaseException, blame: Callable[[], FinetuneError | str]) -> BaseException:
    """Of a HangError: what the process that is gone said, or else who it is, where the watchdog can tell; any other
    error as it is."""
    if not isinstance(fault, HangError) or not (named := blame()):
        return fault
    return named if isinstance(named, FinetuneError) else HangError(f"{named}. {fault}")


def code_and_reason(error: BaseException) -> tuple[int, str]:
    """What exit.json says of it."""
    if isinstance(error, FinetuneError):
        return error.exit_code, str(error)
    return ExitCode.FAILURE, f"{type(error).__name__}: {error}"


def leave_word(folder: RunFolder, code: int, reason: str, step: int) -> None:
    """Have exit.json say why a run failed. A disk that does not take it is told, and never hides the reason itself.

    Args:
        folder: the run's.
        code: the exit code.
        reason: why, in words.
        step: the last optimizer step made.
    """
    try:
        folder.write_exit(code, reason, step)
    except (DiskError, OSError) as error:
        print(f"warning  nothing but these lines says how the run ended: {error}", file=sys.stderr, flush=True)
