"""All ranks wait for the write of one of them, however slow its disk is, and learn together what it led to.

An operation of all processes gives up after `launch.timeout`, and the watchdog ends who gets no further: a rank that
waited for its disk by itself would end a sound run. So all ask each other again and again whether anyone still writes,
and note each answer as progress. Where a rank has died or is stopped no answer comes, and the watchdog speaks as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from finetune.errors import ExportError, FinetuneError
from finetune.files import disk_errors
from finetune.run.checkpoint_writer import Writer

_LONG = 10.0  # seconds after which the user hears what is waited for; then after twice as many, and so on
_PAUSE = 0.25  # seconds at most between two questions


def is_busy_anywhere(args: TrainingArguments, writer: Writer) -> bool:
    """Whether a rank writes; all call it."""
    return bool(_most(args, int(writer.busy)))


def until_written(
    args: TrainingArguments, writer: Writer, note: Callable[[], None], long: Callable[[float], None]
) -> None:
    """Wait until no rank writes; all call it.

    Args:
        args: of this rank's trainer.
        writer: of this rank.
        note: told again and again that this rank and all others are there.
        long: told the seconds that were waited, now and then.
    """
    began, pause, next_word = time.monotonic(), 0.001, _LONG
    while is_busy_anywhere(args, writer):
        note()
        if (waited := time.monotonic() - began) > next_word:
            long(waited)
            next_word *= 2
        if not writer.pause(pause):
            time.sleep(pause)
        pause = min(_PAUSE, 2 * pause)
    writer.wait()


def newest_known(args: TrainingArguments, newest: int | None) -> int | None:
    """The latest step that any rank knows of; all call it."""
    step = _most(args, -1 if newest is None else newest)
    return None if step < 0 else step


def together(args: TrainingArguments, target: Path, part: Callable[[], None] | None) -> None:
    """Do this rank's part, None without one, and raise on every rank what failed on the first that failed.

    Args:
        args: of this rank's trainer.
        target: what errors of the disk are about.
        part: the work.

    Raises:
        DiskError: a rank could not write.
        ExportError: a rank failed otherwise, with an error that is none of ours; on that rank, its own.
    """
    failure: Exception | None = None
    try:
        with disk_errors(target):
            if part is not None:
                part()
    except Exception as error:
        failure = error
    if not _most(args, int(failure is not None)):
        return
    known = failure if isinstance(failure, FinetuneError) else failure and ExportError(f"{target}: {failure}")
    every: list[Exception | None] = [known] * args.world_size
    if args.world_size > 1:
        dist.all_gather_object(every, known)
    rank, first = next((rank, error) for rank, error in enumerate(every) if error is not None)
    if failure is not None and (known is not failure or rank == args.process_index):
        raise failure
    raise type(first)(f"{first} (on rank {rank})")


def _most(args: TrainingArguments, mine: int) -> int:
    """The greatest of a number of all ranks."""
    if args.world_size == 1:
        return mine
    value = torch.tensor([mine], device=args.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())
