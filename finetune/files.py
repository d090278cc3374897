"""How a file becomes durable: the only place that writes, renames, hashes and locks.

A write goes to a temporary file beside its target, is fsynced, renamed over the target, and the folder is fsynced:
after a crash the target is either the old file or the whole new one. Modes follow the umask, because a server that
runs as another user must be able to read an adapter (safetensors writes 0600 whatever the umask).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import DiskError, RefusedError

MANIFEST = "manifest.json"
_NEARLY_FULL = 64 * 2**20  # bytes free below which torch's writer is taken to have failed for want of space


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of a write into a DiskError that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DiskError(f"{path}: cannot write here ({error.strerror}); choose another output_dir") from error
        if error.errno == errno.EIO:
            raise DiskError(f"{path}: the disk reported an I/O error; check the disk") from error
        raise
    except Exception as error:
        # safetensors and torch report a full disk in exceptions of their own, without an errno.
        full = "os error 28" in str(error) or "No space left" in str(error)
        stream_broke = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
        if full or (stream_broke and shutil.disk_usage(existing_parent(path)).free < _NEARLY_FULL):
            raise _no_space(path) from error
        raise


def _no_space(path: Path) -> DiskError:
    free = shutil.disk_usage(existing_parent(path)).free
    return DiskError(
        f"{path}: no space left on the disk ({free / 2**20:.0f} MiB free); free some space or choose another "
        "output_dir, then run the same command again"
    )


def existing_parent(path: Path) -> Path:
    """`path`, or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def fsync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file below `folder` durable and readable as the umask allows."""
    mode = 0o666 & ~_umask()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            os.chmod(path, mode)
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
    for path in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        fsync_folder(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically and durably."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically and durably; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file below `folder` but its manifest, by relative path."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def manifest_faults(folder: Path) -> list[str]:
    """What differs between `folder` and its manifest; empty when the folder is whole."""
    path = folder / MANIFEST
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is missing or unreadable"]
    found = tree_hashes(folder)
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not in the manifest" for name in found if name not in expected]
    faults += [f"{name} differs from its hash" for name in expected if name in found and found[name] != expected[name]]
    return faults


@contextlib.contextmanager
def staged_folder(target: Path, manifest: dict[str, Any] | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `target` whole, or not at all.

    Args:
        target: the folder to make. It must not exist when the block ends.
        manifest: when given, a manifest.json with these facts and every file's size and hash is added.

    Raises:
        DiskError: a write failed; nothing is left behind.
        RefusedError: `target` exists.
    """
    if target.exists():
        raise RefusedError(f"{target} exists already; remove it or choose another place")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        try:
            yield staging
            if manifest is not None:
                write_json(staging / MANIFEST, {**manifest, "files": tree_hashes(staging)})
            fsync_tree(staging)
            os.chmod(staging, 0o777 & ~_umask())
            os.rename(staging, target)
            fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if absent); it is released when the process ends, however it ends."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a+")  # noqa: SIM115 - held for the block, closed below
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
    finally:
        stream.close()
