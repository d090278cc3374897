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
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from finetune.errors import DiskError, FinetuneError, RefusedError

MANIFEST = "manifest.json"
_DEFECTS = (errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOENT)  # of a write: no disk is to blame for these
_NEARLY_FULL = 64 * 2**20  # bytes free below which torch's writer is taken to have failed for want of space


def _umask() -> int:
    with contextlib.suppress(OSError, StopIteration):  # Linux tells; checkpoints are written by a thread of their own
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    current = os.umask(0o077)  # else it is read by setting it: what another thread makes meanwhile stays private
    os.umask(current)
    return current


@contextlib.contextmanager
def disk_errors(path: Path, setting: str = "output_dir") -> Iterator[None]:
    """Turn an OSError of a write into a DiskError that names the place, and the setting that would choose another."""
    try:
        yield
    except FinetuneError:
        raise  # explained already
    except OSError as error:
        if explained := _explained(path, error.errno, setting):
            raise explained from error
        raise
    except Exception as error:
        # safetensors and torch report a failed write in exceptions of their own, without an errno.
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told and (explained := _explained(path, int(told[1]), setting)):
            raise explained from error
        stream_broke = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
        nearly_full = stream_broke and shutil.disk_usage(existing_parent(path)).free < _NEARLY_FULL
        if nearly_full or "No space left" in str(error):
            raise _no_space(path, setting) from error
        raise


def _explained(path: Path, number: int | None, setting: str) -> DiskError | None:
    """What the user can do about a failed write; None where the fault is not of the user's making."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(path, setting)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DiskError(f"{path}: cannot write here ({os.strerror(number)}); choose another {setting}")
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return DiskError(f"{path}: a file stands where a folder is needed, or the reverse; choose another {setting}")
    if number == errno.ENAMETOOLONG:
        return DiskError(f"{path}: the name is too long for this disk; choose a shorter {setting}")
    if number == errno.EIO:
        return DiskError(f"{path}: the disk reported an I/O error; check the disk")
    if number is None or number in _DEFECTS:
        return None
    # What disks of a network, and those that a program serves, fail with has many numbers.
    return DiskError(
        f"{path}: a write failed ({os.strerror(number)}); see that the disk is there and well, or choose another "
        f"{setting}, then run the same command again"
    )


def _no_space(path: Path, setting: str) -> DiskError:
    left = ""
    with contextlib.suppress(OSError):  # a disk that fails may not say this either
        left = f" ({shutil.disk_usage(existing_parent(path)).free / 2**20:.0f} MiB free)"
    return DiskError(
        f"{path}: no space left on the disk{left}; free some space or choose another "
        f"{setting}, then run the same command again"
    )


def existing_parent(path: Path) -> Path:
    """`path`, or its nearest ancestor that exists."""
    path = path.absolute()
    while not os.path.exists(path):  # Path.exists raises below a folder that may not be searched
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


@contextlib.contextmanager
def staged_file(target: Path, setting: str = "output_dir") -> Iterator[BinaryIO]:
    """A stream into a temporary file that becomes `target` when the block ends well; it replaces an older one.

    Args:
        target: the file to write.
        setting: what chooses the place, for the message when a write fails.

    Raises:
        DiskError: a write failed; nothing is left behind.
    """
    with disk_errors(target, setting):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_folder(target.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably."""
    with staged_file(path) as stream:
        stream.write(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically and durably."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically and durably; NaN is refused, since JSON has none."""
    write_text(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file durably; give its size in bytes and its SHA-256, taken on the way so that it is not read again.

    It stands at `path` from its first byte on: for files of a folder that is renamed when it is whole.
    """
    hashed, size = hashlib.sha256(), 0
    with open(path, "xb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            hashed.update(chunk)
            size += len(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": hashed.hexdigest()}


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def tree_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file below `folder` but its own manifest, by relative path."""
    return {name: _facts(path) for name, path in _files(folder).items()}


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def manifest_text(facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    """A manifest as JSON: the facts, size and hash of each file, and last a seal, which is the hash of all of that."""
    content = {**facts, "files": files}
    return _json({**content, "seal": sha256_text(_json(content))})


def _sealed(text: str) -> dict[str, Any] | None:
    """What a manifest says, without its seal; None when that does not say so.

    Raises:
        ValueError, KeyError, TypeError: it is no manifest.
    """
    content = dict(json.loads(text))
    content.pop("seal", None)
    facts = {name: value for name, value in content.items() if name != "files"}
    return content if manifest_text(facts, content["files"]) == text else None


def read_sealed(folder: Path) -> dict[str, Any]:
    """What the manifest of `folder` says of it, when it carries its seal; else nothing. Its files are not looked at."""
    try:
        return _sealed((folder / MANIFEST).read_bytes().decode("utf-8")) or {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def manifest_faults(folder: Path, sealed: bool = False) -> list[str]:
    """What differs between `folder` and its manifest; empty when the folder is whole.

    Args:
        folder: with a manifest.json.
        sealed: the manifest itself must carry its seal, too.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        expected = dict(json.loads(text)["files"])
        if sealed and _sealed(text) is None:
            return [f"{MANIFEST} differs from its seal"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is missing or unreadable"]
    found = _files(folder)
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not in the manifest" for name in found if name not in expected]
    for name in sorted(expected.keys() & found.keys()):
        try:
            if _facts(found[name]) != expected[name]:
                faults.append(f"{name} differs from its hash")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    return faults


@contextlib.contextmanager
def staged_folder(target: Path, manifest: dict[str, Any] | None = None, setting: str = "output_dir") -> Iterator[Path]:
    """A temporary folder that becomes `target` whole, or not at all.

    Args:
        target: the folder to make. It must not exist when the block ends.
        manifest: when given, a manifest.json with these facts and every file's size and hash is added.
        setting: the recipe's key that chooses the place, for the message when a write fails.

    Raises:
        DiskError: a write failed; nothing is left behind.
        RefusedError: `target` exists.
    """
    _refuse_existing(target)
    with disk_errors(target, setting):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        try:
            yield staging
            if manifest is not None:
                write_text(staging / MANIFEST, manifest_text(manifest, tree_hashes(staging)))
            fsync_tree(staging)
            os.chmod(staging, 0o777 & ~_umask())
            _refuse_existing(target)  # it may have been made meanwhile, and an empty folder would be replaced
            os.rename(staging, target)
            fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def commit_folder(staging: Path, target: Path, facts: dict[str, Any], known: dict[str, dict[str, Any]]) -> None:
    """Complete a staged folder with its manifest, make it durable and give it its name; what stood there goes.

    Args:
        staging: beside `target`, so that a rename is enough.
        target: its name; a folder of that name is replaced.
        facts: what the manifest says beside files and hashes.
        known: what `write_hashed` gave for files that it wrote; the others are hashed here.
    """
    files = known | {name: _facts(path) for name, path in _files(staging).items() if name not in known}
    write_hashed(staging / MANIFEST, [manifest_text(facts, files).encode("utf-8")])
    fsync_tree(staging)
    os.chmod(staging, 0o777 & ~_umask())
    if target.exists():
        remove_folder(target)
    os.rename(staging, target)
    fsync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash leaves it whole or under a temporary name, never half under its own."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise RefusedError(f"{target} exists already; remove it or choose another place")


@contextlib.contextmanager
def locked(
    path: Path, shared: bool = False, wait: bool = True, setting: str = "output_dir", remove: bool = False
) -> Iterator[bool]:
    """Hold a lock on `path` (made if absent); it is released when the process ends, however it ends.

    Args:
        path: the file that stands for what is locked.
        shared: several may hold it at once, but none exclusively meanwhile.
        wait: whether to wait for others; if not, the block must ask whether it got the lock.
        setting: the recipe's key that chooses the place, for the message when the file cannot be made.
        remove: the file goes when the block ends; all who lock it must say so, and none may share it. A process that
            is killed leaves it behind for the next.

    Yields:
        Whether the lock is held; always True with `wait`.
    """
    assert not (shared and remove), "a lock that others hold cannot be removed"
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    with contextlib.ExitStack() as stack:
        while True:
            with disk_errors(path, setting):
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = stack.enter_context(open(path, "a+"))
            try:
                fcntl.flock(stream, kind)
            except BlockingIOError:
                held = False
                break
            held = True
            if not remove or _is_at(stream, path):
                break
            stream.close()  # it was removed while this process waited for it, and says nothing any more
        try:
            yield held
        finally:
            if held and remove and _is_at(stream, path):
                with contextlib.suppress(OSError):
                    path.unlink()


def _is_at(stream: IO[str], path: Path) -> bool:
    """Whether an open file is the one that stands at `path`."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
