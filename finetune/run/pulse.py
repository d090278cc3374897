"""Whether the run in a folder lives, also for who asks on another machine.

On its own machine a run is known by its process. For the others it writes a number into a file every few seconds. The
clocks of two machines may differ, and so may what each sees of a file's times, so nobody compares a time: who asks
reads the file until it changes, for longer than network file systems remember what they have read.

No torch: this is asked before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.run.say import Say

PULSE = "pulse"  # in the run folder
BEAT = 5.0  # seconds between two numbers
# Seconds without a new number after which a run of another machine is taken to have ended. By default NFS and FUSE
# remember a file's attributes for up to a minute.
SILENT = 75.0
_LOOK = 1.0  # seconds between two looks
# What was found silent, for the processes that this one starts, which would have to wait as long again.
_KNOWN_SILENT = "FINETUNE_SILENT_RUN"


class Pulse:
    """The number of a run, as long as it lives."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before `start`.

        Args:
            folder: the run's.
        """
        self._path = folder / PULSE
        self._count = int.from_bytes(os.urandom(4))  # never the number at which an earlier run has stopped
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="pulse")

    def start(self) -> None:
        """Write the first number, and go on beside the run."""
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """End it, and leave no number of a run that has ended; a disk that does not answer is not waited for."""
        self._over.set()
        if self._thread.ident is None:
            return
        self._thread.join(_LOOK)
        if not self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._write()

    def _write(self) -> None:
        """The next number, into the same file: a network file system may remember for a minute which file has a name,
        but asks the server for a file's content each time that it is opened.
        """
        self._count += 1
        with contextlib.suppress(OSError):  # a disk that fails is told of by who writes what counts
            target = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(target, f"{self._count:<15}\n".encode(), 0)
            finally:
                os.close(target)


def machine() -> str:
    """The boot of this machine, and in it the container, in which process ids mean the same; empty where the system
    does not tell. Names of hosts do not: several machines may have one, and a machine several.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def is_here(record: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a run's record was one of this machine's, and of this container's."""
    before, now = record.get("machine"), machine()
    return bool(before == now if before and now else record.get("host") == socket.gethostname())


def lives(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the process of a run lives; of another machine's, whether its number grows.

    Args:
        folder: the run's, which has no exit.json.
        record: what its run.json says.
    """
    pid = record.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    if not is_here(record):
        return _grows(folder, record)
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
        words = Path(f"/proc/{pid}/cmdline")
        return not words.exists() or b"finetune" in words.read_bytes()  # the number may be another process's by now
    except PermissionError:
        return True  # it lives, and is another user's
    except OSError:
        return False


def _grows(folder: Path, record: Mapping[str, Any]) -> bool:
    """Look until the number changes, or has been the same for too long."""
    path = folder / PULSE
    before = _read(path)
    state = hashlib.sha256(json.dumps([str(folder.absolute()), record, str(before)]).encode()).hexdigest()
    if os.environ.get(_KNOWN_SILENT) == state:
        return False
    host = record.get("host")
    Say(True)("waiting", f"up to {SILENT:.0f} s, to see whether the run in {folder} still goes on on {host}")
    until = time.monotonic() + SILENT
    while time.monotonic() < until:
        time.sleep(_LOOK)
        if (found := _read(path)) is not None and found != before:
            return True
    os.environ[_KNOWN_SILENT] = state
    return False


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
