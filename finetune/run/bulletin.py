"""Where the processes of a run tell each other how it goes: a store that is not the process group's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finetune.errors import ExitCode, FinetuneError
from finetune.run.ranks import World, from_main


def bulletin(launched: World, timeout: float) -> Any:
    """A store on rank 0's host; collective.

    Args:
        launched: from `finetune.run.ranks.world`.
        timeout: seconds that an operation waits for what is not there.
    """
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    made = None
    if launched.is_main:
        made = dist.TCPStore(host, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    port = from_main(launched, lambda: made.port if made is not None else 0)
    return made or dist.TCPStore(
        host, port, None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )


def in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """What the store answers; None where it is gone with rank 0, or silent, as where rank 0 is stopped.

    Args:
        ask: operations on the store; torch's have no timeout that would hold then.
        seconds: to wait for the answer.
    """
    answer: list[Any] = []

    def asked() -> None:
        with contextlib.suppress(RuntimeError):
            answer.append(ask())

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def failure(told: dict[str, Any], whole: bool) -> FinetuneError | str:
    """The error that another process has told, with its exit code; of a hang the verdict.

    Args:
        told: its `rank`, `exit_code` and `reason`.
        whole: whether all lines of the reason are wanted.
    """
    if told["exit_code"] == ExitCode.HANG:
        return str(told["reason"])
    reason = told["reason"] if whole else told["reason"].splitlines()[0]
    error = FinetuneError(f"rank {told['rank']} (counted from 0): {reason}")
    error.exit_code = told["exit_code"]
    return error
