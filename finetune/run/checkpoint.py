"""A checkpoint on the disk: written whole or not at all, opened again before it counts, and kept or removed.

The order makes it safe: every file into a folder of another name, fsynced, with its hash taken on the way; all of it
opened again and compared with what was meant; the manifest; one rename; the parent folder fsynced. Whatever instant
the process ends at, a folder named checkpoint-N is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune.errors import ExportError, NonFiniteError
from finetune.files import commit_folder, disk_errors, write_hashed
from finetune.run.checkpoint_state import ADAPTER, TRAINED, WEIGHT, Snapshot
from finetune.run.checkpoint_tree import write_tensors
from finetune.run.folder import FORMAT, now

_BLOCK = 4096  # bytes; file systems give space in blocks


def write(taken: Snapshot, target: Path, go_on: Callable[[], None], keep: bool = True) -> int:
    """Write a snapshot.

    Args:
        taken: what to write.
        target: the checkpoint's folder; one that stands there is replaced, since a run that came here once more was
            continued from an earlier one.
        go_on: called between writes; raises when the write is to be given up.
        keep: whether the folder stays; else it is written, opened again and removed, which shows that it can be.

    Returns:
        The bytes it takes on the disk.

    Raises:
        DiskError: a write failed; nothing of it is left, and what stood at `target` still stands.
        ExportError: what can be read from the disk is not what was written.
        NonFiniteError: a trained weight is not finite.
    """
    staging = staging_of(target)
    with disk_errors(target):
        begin(target)
        try:
            known = lay(taken, staging, go_on)
            if keep:
                commit_folder(staging, target, manifest_facts(taken.step, taken.facts), known)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return on_disk(known)


def begin(target: Path) -> None:
    """Make an empty folder for the files of a checkpoint."""
    shutil.rmtree(staging_of(target), ignore_errors=True)
    os.mkdir(staging_of(target))


def lay(taken: Snapshot, staging: Path, go_on: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Write the files of a snapshot and open them again; gives their sizes and hashes."""
    known = {name: write_tensors(staging / name, held, go_on) for name, held in taken.tensors.items()}
    known |= {name: write_hashed(staging / name, [content]) for name, content in taken.plain.items()}
    _compare(taken, staging)
    return known


def commit_parts(
    target: Path, step: int, facts: dict[str, Any], known: dict[str, dict[str, Any]], keep: bool = True
) -> int:
    """Complete a checkpoint whose files several processes have written.

    Args:
        target: its folder.
        step: optimizer steps made.
        facts: what the manifest says of the run.
        known: size and hash of every file, as those who wrote them say.
        keep: whether it stays; else it is removed.

    Returns:
        The bytes it takes on the disk.

    Raises:
        ExportError: a file of another process is not to be seen here.
    """
    staging = staging_of(target)
    with disk_errors(target):
        for name, told in known.items():
            if not (staging / name).is_file() or (staging / name).stat().st_size != told["bytes"]:
                raise ExportError(
                    f"{target}: {name}, which another process has written, is not to be seen by rank 0; output_dir "
                    "must lie on a disk that all machines share"
                )
        if keep:
            commit_folder(staging, target, manifest_facts(step, facts), known)
        shutil.rmtree(staging, ignore_errors=True)
    return on_disk(known)


def on_disk(known: dict[str, dict[str, Any]]) -> int:
    """The bytes that files take."""
    return sum(-(-facts["bytes"] // _BLOCK) * _BLOCK for facts in known.values())


def staging_of(target: Path) -> Path:
    """Where a checkpoint is before it is whole; removed at the next start when a crash left it."""
    return target.with_name(f".{target.name}.tmp")


def manifest_facts(step: int, facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says beside its files."""
    return {"format": FORMAT, "step": step, "written": now(), **facts}


def _compare(taken: Snapshot, staging: Path) -> None:
    """Open again what was written; names, shapes and dtypes everywhere, every bit of the trained weights."""
    faults = []
    for file, meant in taken.tensors.items():
        with safe_open(staging / file, framework="pt") as opened:
            found = set(opened.keys())
            faults += [f"{file}: {name} is missing" for name in sorted(meant.keys() - found)]
            faults += [f"{file}: {name} was not meant" for name in sorted(found - meant.keys())]
            for name in sorted(found & meant.keys()):
                tensor = meant[name]
                if file in (ADAPTER, TRAINED) or name.startswith(f"{WEIGHT}/"):
                    if not bool(torch.isfinite(tensor).all()):
                        raise NonFiniteError(f"step {taken.step}: {name} is not finite; this state is not kept")
                    if not torch.equal(opened.get_tensor(name), tensor):
                        faults.append(f"{file}: {name} has other values")
                elif opened.get_slice(name).get_shape() != list(tensor.shape):
                    faults.append(f"{file}: {name} has another shape")
    for file, content in taken.plain.items():
        if (staging / file).read_bytes() != content:
            faults.append(f"{file}: has another content")
    if faults:
        raise ExportError(
            f"step {taken.step}: what can be read from {staging.parent} is not what was written; check the disk:\n  "
            + "\n  ".join(faults[:10])
        )
