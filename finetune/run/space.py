"""Whether the checkpoints of a run fit on the disk: before the first step by a formula, after it by the size of one."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.errors import DiskError
from finetune.files import disk_errors, existing_parent
from finetune.run.folder import RunFolder


def most_checkpoints(limit: int, validated: bool) -> int:
    """How many checkpoints stand at once, the one that is being written included.

    Args:
        limit: training.save_total_limit.
        validated: whether checkpoints have a validation loss, so that the best may stand beside the newest.
    """
    return limit + 1 + (1 if validated else 0)


def need_space(folder: RunFolder, trained: int, checkpoints: int, goes: bool) -> None:
    """Refuse a run whose checkpoints will not fit on the disk.

    Args:
        folder: the run's folder.
        trained: trained parameters; each takes 12 bytes in a checkpoint (weight and two moments, float32). The result
            takes less than a checkpoint, and is written when one less stands there.
        checkpoints: how many will stand at once, from `most_checkpoints`.
        goes: whether all that stands there is removed first; else the run goes on, and its checkpoints are counted.

    Raises:
        DiskError: with what is needed and what is free.
    """
    one = 12 * trained
    with disk_errors(folder.root):
        free = shutil.disk_usage(existing_parent(folder.root)).free
        if goes:
            free, there = free + size_of(folder.root), 0
        else:
            there = sum(size_of(path) for path in folder.newest_first())
    needed = max(one, one * checkpoints - there)  # of those that stand already some may go only after the next
    if free < needed:
        more = "more " if there else ""
        raise DiskError(
            f"output_dir: {folder.root} needs {needed / 2**20:,.0f} MiB {more}for {checkpoints} checkpoints, and the "
            f"disk has {free / 2**20:,.0f} MiB free; free some space, choose another output_dir, or lower "
            "training.save_total_limit"
        )


def need_room(folder: RunFolder, size: int, checkpoints: int, saves: int) -> None:
    """Refuse to go on with a run whose checkpoints will not fit, now that the size of one is known.

    Args:
        folder: the run's folder.
        size: bytes of one checkpoint.
        checkpoints: how many will stand at once, from `most_checkpoints`.
        saves: how many saves are ahead.

    Raises:
        DiskError: with what is needed and what is free.
    """
    with disk_errors(folder.root):
        there = len(folder.newest_first())
        free = shutil.disk_usage(existing_parent(folder.root)).free
    missing = max(1, min(checkpoints - there, saves))  # going on, more may stand already than will be kept
    needed = size * missing
    if free < needed:
        raise DiskError(
            f"output_dir: a checkpoint of this run takes {size / 2**20:,.1f} MiB, and {folder.root} needs "
            f"{needed / 2**20:,.1f} MiB for {missing} more, and the disk has {free / 2**20:,.1f} MiB free; free "
            "some space, choose another output_dir, or lower training.save_total_limit"
        )


def size_of(folder: Path) -> int:
    """The bytes that a folder's files take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
