"""No process of a run outlives the launcher that started it, and none is cut off before it has saved.

torch's agents (torchrun, accelerate's launcher) and DeepSpeed's start each worker in a session of its own, or without
a tie: killed with -9 they leave workers behind that train on. So every worker looks after its parent, and stops as on
SIGTERM once that is another. Below `finetune train` orphans become its children (Linux), which tells them itself and
ends after them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ADOPTER = "FINETUNE_LAUNCH_PROCESS"  # names the `finetune train` that started the launcher, by its process number
# A variable that each launcher sets. Whoever starts processes by hand may leave them, as nohup does.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", ADOPTER)
_SET_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, from linux/prctl.h
_POLL = 0.5  # seconds between two looks


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Have this process stop as on SIGTERM when the launcher that started it is gone; nothing without one."""
    if any(name in environment for name in _LAUNCHERS):
        arguments = (os.getppid(), environment.get(ADOPTER, ""))
        threading.Thread(target=_look_after, args=arguments, daemon=True).start()


def _look_after(parent: int, adopter: str) -> None:
    while True:
        now = os.getppid()
        if now != parent and str(now) != adopter:  # an adopter tells its workers itself, once
            os.kill(os.getpid(), signal.SIGTERM)
            return
        parent = now
        time.sleep(_POLL)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Linux: workers whose launcher dies in the block become children of this process."""
    _adopt(True)
    try:
        yield
    finally:
        _adopt(False)


def _adopt(wanted: bool) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_SUBREAPER, int(wanted), 0, 0, 0)


def workers_below(pid: int) -> list[int]:
    """The workers that a launcher has started, without what they started themselves."""
    found = []
    for child in _children(pid):
        found += [child] if _is_worker(child) else workers_below(child)
    return found


def adopted(launcher: int = 0) -> list[int]:
    """Workers that have become children of this process; its launcher, whose words hold theirs, is none."""
    return [pid for pid in _children(os.getpid()) if pid != launcher and _is_worker(pid)]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread, or the process, is gone meanwhile
            found += map(int, listed.read_text().split())
    return found


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"finetune.train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def end_adopted(patience: float) -> None:
    """Tell adopted workers to save and to end, wait for that, and kill what is left.

    Args:
        patience: seconds to wait.
    """
    left = adopted()
    if not left:
        return
    print(f"note: the launcher was killed; its {len(left)} processes are told to stop", file=sys.stderr, flush=True)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while (left := [pid for pid in left if not _has_ended(pid)]) and time.monotonic() < deadline:
        time.sleep(_POLL / 5)
    for pid in {*left, *adopted()}:  # what those that ended had started themselves
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
