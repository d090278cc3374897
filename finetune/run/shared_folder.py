"""Do all processes of a run see its folder? Each of them reads checkpoints there, and some modes have each write."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path

from finetune.errors import RefusedError
from finetune.run.ranks import World, from_all, from_main

_LONGEST = 75.0  # seconds for which a network file system may remember that there was no such file
_LOOK = 0.2


def refuse_unshared(launched: World, record: Path, timeout: float) -> None:
    """Compare a file that rank 0 has just written with what the others find in its place; all call it at once.

    Args:
        launched: from `finetune.run.ranks.world`.
        record: the file.
        timeout: seconds that the run gives a process to answer, of which a look takes half at most.

    Raises:
        RefusedError: it is not there for all, with the hosts on which it is not.
    """
    if launched.size == 1:
        return
    expected = from_main(launched, lambda: _digest(record))
    until = time.monotonic() + min(_LONGEST, timeout / 2)
    while (same := _digest(record) == expected) is False and time.monotonic() < until:
        time.sleep(_LOOK)
    found = from_all(launched, (same, socket.gethostname()))
    if blind := [f"rank {rank} on {host}" for rank, (there, host) in enumerate(found) if not there]:
        raise RefusedError(
            f"output_dir: what rank 0 writes into {record.parent} is not there for {', '.join(blind)}, which could "
            "read no checkpoint; name a folder on a disk that all hosts see, by the same path"
        )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
