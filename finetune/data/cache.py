"""Prepared rows are kept by what they were made from, so that a second start makes nothing.

An entry is a folder named by the hash of everything that decides its content: data, template, tokenizer, options, code.
It is made in a staging folder and renamed, so it exists whole or not at all, and only one process makes it while others
wait. Whoever uses an entry holds a shared lock, and only entries that nobody holds are ever removed.

    <root>/rows/<key>/        an entry; its manifest.json lists every file with size and hash
    <root>/locks/<key>.make   held while the entry is being made
    <root>/locks/<key>.use    held, shared, while the entry is used; its time of change is the last use
    <root>/sources.json       hashes of source files and of bases, remembered by size and times
    <root>/pruned             its time of change is when old entries were last looked for
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError, DiskError, EnvironmentFault
from finetune.files import MANIFEST, disk_errors, locked, manifest_faults, sha256, staged_folder, write_text

SETTING = "data.cache_dir"
LAYOUT = 1  # of the cache's folders
UNUSED_DAYS = 30.0
DAY = 86_400.0
# A file changed this many seconds ago can change again without its times showing it, where clocks tick coarsely.
SETTLED_SECONDS = 2.0
KEPT_SECONDS = 5.0  # after which hashes that were made are written down, however many are still to be made
REMEMBERED = 100_000  # hashes of source files, at most
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def default_root() -> Path:
    """$FINETUNE_CACHE, else finetune in $XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        EnvironmentFault: there is no home folder.
    """
    if chosen := os.environ.get("FINETUNE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):  # the XDG standard has relative ones ignored
        return Path(base) / "finetune"
    try:
        return Path.home() / ".cache" / "finetune"
    except RuntimeError as error:
        raise EnvironmentFault(f"no place for prepared rows: there is no home folder; set {SETTING}") from error


def key(facts: dict[str, Any]) -> str:
    """The name of what these facts decide: 32 hex digits, whatever the order of the keys.

    Args:
        facts: plain JSON values; anything else is a TypeError, because its text might not be stable.
    """
    text = json.dumps({"layout": LAYOUT, "facts": facts}, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def code_version() -> str:
    """SHA-256 over the code that turns rows into tokens, so that changed code never serves what older code made."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for room in ("data", "formats") for path in (package / room).glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """Something kept: its folder, its size in bytes, and when it was last used in seconds since 1970."""

    path: Path
    size: int
    used: float


class Cache:
    """A folder of entries. Keep the object as long as its entries are in use: their locks end with it."""

    def __init__(self, root: Path | str | None = None) -> None:
        """Nothing is read or made before the first use.

        Args:
            root: `data.cache_dir`; None is `default_root()`.
        """
        self.root = Path(root).expanduser().absolute() if root else default_root()
        self._held: dict[str, contextlib.ExitStack] = {}

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all entries."""
        while self._held:
            self._held.popitem()[1].close()

    def get_or_make(self, key: str, make: Callable[[Path], None], waiting: Callable[[], None] | None = None) -> Path:
        """The entry of this key; `make` writes it into an empty folder if it is absent or damaged.

        Several processes may ask at once: one makes, the others wait for it, and make it themselves if it fails.

        Args:
            key: from `key(facts)`.
            make: writes the entry's files. What it raises is raised, and nothing of the entry is left.
            waiting: called once if another process is making this entry.

        Returns:
            The entry's folder. It is not removed as long as this object lives and holds it.

        Raises:
            DiskError: the cache cannot be written.
            EnvironmentFault: its disk has no file locks.
        """
        entry = self._entry(key)
        try:
            self._hold(key)
        except DiskError:
            if is_whole(entry):
                return entry  # a cache that we may only read, filled by another; we could not remove entries either
            raise
        if is_whole(entry):
            return entry
        with contextlib.ExitStack() as stack:
            if not self._locked(stack, f"{key}.make", wait=False):
                if waiting is not None:
                    waiting()
                self._locked(stack, f"{key}.make")
            if not is_whole(entry):
                self._clear(key)
                with staged_folder(entry, {"key": key, "layout": LAYOUT}, SETTING) as staging:
                    make(staging)
        return entry

    def faults(self, key: str) -> list[str]:
        """What differs between an entry and its manifest, found by hashing all of it; empty when it is whole."""
        return manifest_faults(self._entry(key))

    def entries(self) -> list[Entry]:
        """All whole entries, least recently used first."""
        found = [
            Entry(folder, _size(folder), self._used(folder))
            for folder in self._folder("rows").glob("[!.]*")
            if is_whole(folder)
        ]
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def prune(self, unused_days: float = UNUSED_DAYS) -> tuple[int, int]:
        """Remove entries that nobody used for so many days, and what killed makers left; never one in use.

        Returns:
            How many folders went, and how many bytes.
        """
        folders = self._folder("rows")
        removed = freed = 0
        for folder in [path for path in sorted(folders.iterdir()) if path.is_dir()]:
            unfinished = folder.name.startswith(".")
            name = folder.name.split(".")[1] if unfinished else folder.name
            if not unfinished and time.time() - self._used(folder) < unused_days * DAY:
                continue
            with contextlib.ExitStack() as stack:
                # Its maker holds the first while it works, everyone who reads it the second.
                if not all(self._locked(stack, f"{name}.{lock}", wait=False) for lock in ("make", "use")):
                    continue
                size = _size(folder)
                with disk_errors(folder, SETTING):
                    _remove(folder)
            removed, freed = removed + 1, freed + size
        write_text(self.root / "pruned", "")
        return removed, freed

    def prune_daily(self) -> tuple[int, int]:
        """`prune`, at most once a day; (0, 0) otherwise, and where the cache may only be read."""
        with contextlib.suppress(FileNotFoundError):
            if time.time() - (self.root / "pruned").stat().st_mtime < DAY:
                return 0, 0
        with contextlib.suppress(DiskError):
            return self.prune()
        return 0, 0

    def file_hashes(self, paths: Sequence[Path]) -> list[str]:
        """Hex SHA-256 of the content of each file.

        A hash is remembered with the file's size, inode and times of change, so that a second start reads nothing. A
        file that changed within the last two seconds is not remembered: it could change again unseen. What has been
        read is remembered every few seconds, so that a start that is cut short need not be made up for.

        Raises:
            DataError: a file cannot be read, or changes while it is.
        """
        index = self.root / "sources.json"
        known = _remembered(index)
        new: dict[str, list[Any]] = {}
        found, kept = [], time.monotonic()
        try:
            for path in paths:
                name = os.path.realpath(path)
                entry = _hashed(path, known.get(name))
                found.append(str(entry[-1]))
                if entry != known.get(name) and time.time() - max(entry[2], entry[3]) / 1e9 > SETTLED_SECONDS:
                    new[name] = entry
                if time.monotonic() - kept >= KEPT_SECONDS:
                    self._remember(index, new)
                    new, kept = {}, time.monotonic()
        finally:
            self._remember(index, new)
        return found

    def _remember(self, index: Path, new: dict[str, list[Any]]) -> None:
        """Add hashes to the index, the latest at its end; older ones go when there are too many."""
        if not new:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(DiskError))  # a cache that may only be read: made anew each time
            self._locked(stack, "sources")
            kept = {name: entry for name, entry in _remembered(index).items() if name not in new} | new
            lines = [f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in list(kept)[-REMEMBERED:]]
            with disk_errors(index, SETTING):
                write_text(index, "{\n" + ",\n".join(lines) + "\n}\n")

    def _folder(self, name: str) -> Path:
        """A folder of the cache, made where absent; for its owner alone, because it holds training data."""
        with disk_errors(self.root, SETTING):
            self.root.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self.root, self.root / name):
                folder.mkdir(mode=0o700, exist_ok=True)
        return self.root / name

    def _entry(self, key: str) -> Path:
        return self.root / "rows" / key

    def _locked(self, stack: contextlib.ExitStack, name: str, shared: bool = False, wait: bool = True) -> bool:
        """Take a lock until `stack` closes; whether it was got."""
        path = self._folder("locks") / name
        try:
            return stack.enter_context(locked(path, shared, wait, SETTING))
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise EnvironmentFault(
                    f"{path}: this disk has no file locks ({error.strerror}); set {SETTING} to a local disk"
                ) from error
            raise

    def _hold(self, key: str) -> None:
        """Hold an entry, existing or not, so that nobody removes it; and note that it is used now."""
        self._folder("rows")
        if key not in self._held:
            stack = contextlib.ExitStack()
            self._locked(stack, f"{key}.use", shared=True)
            self._held[key] = stack
        with contextlib.suppress(PermissionError):  # in a cache of several users the lock may be another's
            os.utime(self.root / "locks" / f"{key}.use")

    def _used(self, folder: Path) -> float:
        for path in (self.root / "locks" / f"{folder.name}.use", folder):
            with contextlib.suppress(OSError):
                return path.stat().st_mtime
        return time.time()  # gone meanwhile

    def _clear(self, key: str) -> None:
        """Remove a damaged entry and what killed makers of it left. Its maker's lock is held."""
        entry = self._entry(key)
        with disk_errors(entry, SETTING):
            for left in [*entry.parent.glob(f".{key}.*.tmp"), entry]:
                if os.path.lexists(left):
                    _remove(left)


def is_whole(folder: Path) -> bool:
    """Whether every file of an entry's manifest is there with its size; contents are compared by `Cache.faults`."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(folder: Path) -> None:
    """Remove a folder; under a hidden name first, so that half of it is never taken for an entry."""
    aside = folder
    if not folder.name.startswith("."):
        aside = folder.with_name(f".{folder.name}.removed-{os.getpid()}.tmp")
        os.rename(folder, aside)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    else:
        aside.unlink()


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`, as they can be counted while others may remove them."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _state(path: Path) -> list[int]:
    """Size, inode, and times of change of content and inode in nanoseconds: what changes when a file does.

    The inode's time cannot be set by programs, so a copy that keeps the content's time is seen too.
    """
    found = os.stat(path)
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _hashed(path: Path, known: list[Any] | None) -> list[Any]:
    """A file's state and the hash of its content, which is taken from what is known of it in that state.

    Raises:
        DataError: it cannot be read, or changes while it is.
    """
    try:
        state = _state(path)
        if known is not None and known[:-1] == state:
            return known
        digest = sha256(path)
        if _state(path) != state:
            raise DataError(f"{path}: the file changes while it is read; run again once it is written")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return [*state, digest]


def _remembered(index: Path) -> dict[str, list[Any]]:
    """The index of hashes; empty where it is absent or unreadable, since it can be made again."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        return {name: entry for name, entry in _items(found) if isinstance(entry, list) and len(entry) == 5}
    except (OSError, ValueError):
        return {}


def _items(found: Any) -> Iterable[tuple[str, Any]]:
    return found.items() if isinstance(found, dict) else ()
