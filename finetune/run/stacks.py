"""Stacks of a process that gets no further, written by itself or, where its threads cannot run, by a neighbour.

At SIGUSR2 the C handler of `faulthandler` writes them, also of a process whose main thread never lets another run. It
writes into a nameless file, so that a run that goes well leaves nothing; a neighbour reads that through /proc.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

_KEPT: list[Any] = []  # the file that the signal handler writes into, open as long as the process lives


def listen() -> int:
    """Have SIGUSR2 write the stacks of all threads; the descriptor of the file it writes into, -1 without one."""
    if not hasattr(signal, "SIGUSR2"):  # another system
        return -1
    if not _KEPT:
        try:
            _KEPT.append(tempfile.TemporaryFile())  # noqa: SIM115
        except OSError:  # no room for one: then they are shown
            faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
            return -1
        faulthandler.register(signal.SIGUSR2, file=_KEPT[0], all_threads=True)
    return int(_KEPT[0].fileno())


def write(folder: Path | None, rank: int, head: str) -> None:
    """Write this process's stacks.

    Args:
        folder: for rank-N.txt; None shows them on stderr, where there is no folder to write into yet.
        rank: this process's number.
        head: what stands above them.
    """
    with contextlib.suppress(OSError):
        if folder is None:
            print(head, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with open(_report(folder, rank), "w", encoding="utf-8") as stream:
            stream.write(f"{head}\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)


def write_for(folder: Path | None, rank: int, head: str, pid: int, descriptor: int) -> None:
    """Write the stacks that another process of this host has put down at SIGUSR2, unless it wrote them itself.

    Args:
        folder: for rank-N.txt; None: as `write`.
        rank: the other process's number.
        head: what stands above them.
        pid: the other process.
        descriptor: what `listen` gave it.
    """
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/fd/{descriptor}").read_text(encoding="utf-8", errors="replace")
        if folder is None:
            print(f"{head}\n\n{text}", file=sys.stderr, flush=True)
        elif text:
            folder.mkdir(parents=True, exist_ok=True)
            with open(_report(folder, rank), "x", encoding="utf-8") as stream:
                stream.write(f"{head}\n\n{text}")


def are_all(root: Path) -> bool:
    """Whether a run's folder holds no files but reports, and exit.json: what is left where processes hung before the
    first step."""
    for path in root.rglob("*"):
        report = path.parent == root / "hang" and path.match("rank-*.txt")
        if path.is_file() and not report and not (path == root / "exit.json" and b'"exit_code"' in path.read_bytes()):
            return False
    return True


def _report(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.txt"
