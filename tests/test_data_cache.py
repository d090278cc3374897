"""The cache of prepared rows: made once, whole or not at all, never served when damaged, never removed when in use."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import files
from finetune.data import cache as module
from finetune.data.cache import Cache, code_version, default_root, is_whole, key
from finetune.errors import DataError, DiskError, EnvironmentFault

KEY = key({"what": "a test"})
LONG_AGO = time.time() - 90 * 86_400


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache") as made:
        yield made


def writes(text: str) -> Callable[[Path], None]:
    """A maker of an entry with one file."""
    return lambda folder: files.write_text(folder / "rows.txt", text)


def refuses(folder: Path) -> None:
    raise AssertionError("the entry is there")


def test_an_entry_is_made_once(cache: Cache) -> None:
    made = cache.get_or_make(KEY, writes("one"))
    assert (made / "rows.txt").read_text() == "one"
    assert cache.get_or_make(KEY, refuses) == made
    with Cache(cache.root) as later:
        assert later.get_or_make(KEY, refuses) == made
    assert cache.get_or_make(key({"what": "else"}), writes("two")) != made


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(facts=st.dictionaries(st.text(), json_values, min_size=1, max_size=4), name=st.text())
def test_a_key_is_of_the_facts_and_not_of_their_order(facts: dict[str, Any], name: str) -> None:
    assert key(facts) == key(dict(reversed(facts.items())))
    assert len(key(facts)) == 32
    assert key(facts) != key({**facts, name: [facts.get(name)]})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, Path("x"), b"x"])
def test_a_key_is_only_of_values_with_a_stable_text(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        key({"x": value})


@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_maker_that_fails_leaves_nothing_and_the_next_one_makes_it(cache: Cache, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(type(error)):
        cache.get_or_make(KEY, fail)
    assert list((cache.root / "rows").iterdir()) == []
    assert (cache.get_or_make(KEY, writes("whole")) / "rows.txt").read_text() == "whole"


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry / "rows.txt", 2),
        lambda entry: (entry / "rows.txt").unlink(),
        lambda entry: (entry / files.MANIFEST).unlink(),
        lambda entry: (entry / files.MANIFEST).write_text("{"),
        lambda entry: (entry / files.MANIFEST).write_text('{"files": ["rows.txt"]}'),
        lambda entry: (entry / files.MANIFEST).write_text('{"files": {"rows.txt": 3}}'),
    ],
    ids=["shortened", "a file missing", "no manifest", "half a manifest", "a list", "no sizes"],
)
def test_a_damaged_entry_is_made_again_even_while_another_reads_it(
    cache: Cache, damage: Callable[[Path], None]
) -> None:
    with Cache(cache.root) as other, open(other.get_or_make(KEY, writes("first")) / "rows.txt") as reading:
        damage(cache.root / "rows" / KEY)
        assert (cache.get_or_make(KEY, writes("second")) / "rows.txt").read_text() == "second"
        assert reading.read() in ("first", "fi")  # the file that was opened, not the new one
    assert [path.name for path in (cache.root / "rows").iterdir()] == [KEY]


def test_a_changed_byte_is_found_by_the_full_check_alone(cache: Cache) -> None:
    entry = cache.get_or_make(KEY, writes("first"))
    assert cache.faults(KEY) == []
    (entry / "rows.txt").write_text("fIrst")
    assert is_whole(entry)
    assert cache.faults(KEY) == ["rows.txt differs from its hash"]


SCRIPT = """
import sys, time, pathlib
from finetune.data.cache import Cache
root, key, log, seconds = sys.argv[1:]
def note(word):
    with open(log, "a") as stream:
        stream.write(word + "\\n")
def make(folder):
    note("making")
    (folder / "rows.txt").write_text("made")
    time.sleep(float(seconds))
    note("made")
with Cache(root) as cache:
    entry = cache.get_or_make(key, make, lambda: note("waiting"))
    assert (entry / "rows.txt").read_text() == "made"
    note("got")
"""


def start(cache: Cache, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(cache.root), KEY, str(log), str(seconds)])


def until(log: Path, word: str) -> None:
    """Wait for a word in the log; a test that waits in vain ends by its time limit."""
    while not log.exists() or word not in log.read_text().split():
        time.sleep(0.01)


def test_of_processes_that_ask_at_once_one_makes_and_the_others_wait(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(cache, log, 1.0)
    until(log, "making")
    others = [start(cache, log, 0) for _ in range(2)]
    assert [process.wait() for process in (first, *others)] == [0, 0, 0]
    words = log.read_text().split()
    assert words.count("making") == 1
    assert words.count("got") == 3
    assert words.count("waiting") >= 1
    assert words.index("made") < words.index("got")


def test_a_killed_maker_leaves_a_cache_that_works_and_those_who_wait_take_over(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    killed = start(cache, log, 100)
    until(log, "making")
    waiter = start(cache, log, 0)
    until(log, "waiting")
    assert not (cache.root / "rows" / KEY).exists()
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert waiter.wait() == 0
    assert log.read_text().split().count("making") == 2
    assert [path.name for path in (cache.root / "rows").iterdir()] == [KEY]  # the killed one's folder went too
    cache.get_or_make(KEY, refuses)


def test_what_it_holds_is_private(cache: Cache) -> None:
    umask = os.umask(0o022)
    try:
        cache.get_or_make(KEY, writes("x"))
    finally:
        os.umask(umask)
    for folder in (cache.root, cache.root / "rows", cache.root / "locks"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"FINETUNE_CACHE": "/a/b", "XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/finetune"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/finetune"),
        ({"FINETUNE_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/finetune"),
        ({"FINETUNE_CACHE": "~/rows", "HOME": "/h"}, "/h/rows"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], expected: str) -> None:
    for name in ("FINETUNE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert default_root() == Path(expected)
    assert Cache(None).root == Path(expected)
    assert Cache("/elsewhere").root == Path("/elsewhere")


def test_without_a_home_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FINETUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(EnvironmentFault, match=r"set data\.cache_dir"):
        default_root()


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, number: int) -> Iterator[None]:
    def fail(*words: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        yield


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize(("place", "name"), [(Path, "mkdir"), (files.tempfile, "mkdtemp"), (os, "rename")])
def test_a_cache_that_cannot_be_written_names_the_setting(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, number: int
) -> None:
    with (
        failing(monkeypatch, place, name, number),
        pytest.raises(DiskError, match=r"choose another data\.cache_dir"),
    ):
        cache.get_or_make(KEY, writes("x"))
    assert not (cache.root / "rows" / KEY).exists()


def test_a_file_in_its_place_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"data\.cache_dir"):
        Cache(tmp_path / "file").get_or_make(KEY, writes("x"))


def test_a_disk_without_locks_names_the_setting(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        failing(monkeypatch, files.fcntl, "flock", errno.ENOLCK),
        pytest.raises(EnvironmentFault, match=r"no file locks .*set data\.cache_dir to a local disk"),
    ):
        cache.get_or_make(KEY, writes("x"))


def test_a_cache_that_may_only_be_read_serves_what_it_has(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache.get_or_make(KEY, writes("x"))
    with Cache(cache.root) as reader, failing(monkeypatch, Path, "mkdir", errno.EROFS):
        assert reader.get_or_make(KEY, refuses) == entry
        with pytest.raises(DiskError):
            reader.get_or_make(key({"what": "else"}), writes("x"))


def aged(cache: Cache, name: str, seconds: float = LONG_AGO) -> None:
    os.utime(cache.root / "locks" / f"{name}.use", (seconds, seconds))


def test_pruning_removes_what_nobody_used_for_long(tmp_path: Path) -> None:
    old, new, used = (key({"n": n}) for n in range(3))
    with Cache(tmp_path) as cache:
        for name in (old, new, used):
            cache.get_or_make(name, writes("x" * 1_000))
        for name in (old, used):
            aged(cache, name)
        assert [entry.path.name for entry in cache.entries()][2] == new
        assert sum(entry.size for entry in cache.entries()) > 3_000
    with Cache(tmp_path) as cache:
        cache.get_or_make(used, refuses)  # which counts as use
        removed, freed = cache.prune()
        assert removed == 1
        assert freed > 1_000
        assert {entry.path.name for entry in cache.entries()} == {new, used}
        assert cache.prune() == (0, 0)


def test_pruning_leaves_what_is_in_use_here_or_elsewhere(cache: Cache) -> None:
    with Cache(cache.root) as other:
        other.get_or_make(KEY, writes("x"))
        aged(other, KEY)
        assert cache.prune() == (0, 0)
        assert other.prune() == (0, 0)
    assert cache.prune()[0] == 1


def test_pruning_removes_what_killed_makers_left_but_not_what_is_being_made(cache: Cache) -> None:
    left = cache.root / "rows" / f".{KEY}.abc.tmp"

    def make(folder: Path) -> None:
        (folder / "rows.txt").write_text("x")
        with Cache(cache.root) as other:
            assert other.prune() == (0, 0)

    cache.get_or_make(KEY, make)
    cache.close()
    left.mkdir()
    (left / "half").write_text("12345")
    assert cache.prune() == (1, 5)
    assert [path.name for path in (cache.root / "rows").iterdir()] == [KEY]


def test_pruning_by_the_day_ends_no_run(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get_or_make(KEY, writes("x"))
    with failing(monkeypatch, Path, "mkdir", errno.EROFS):
        assert cache.prune_daily() == (0, 0)
        with pytest.raises(DiskError):
            cache.prune()


def test_pruning_by_the_day_looks_once(cache: Cache) -> None:
    cache.get_or_make(KEY, writes("x"))
    cache.close()
    aged(cache, KEY)
    assert cache.prune_daily()[0] == 1
    cache.get_or_make(KEY, writes("x"))
    cache.close()
    aged(cache, KEY)
    assert cache.prune_daily() == (0, 0)
    os.utime(cache.root / "pruned", (LONG_AGO, LONG_AGO))
    assert cache.prune_daily()[0] == 1


def source_file(folder: Path, text: str, name: str = "rows.jsonl") -> Path:
    """A file that has not changed for a minute."""
    path = folder / name
    path.write_text(text)
    minute_ago = time.time_ns() - 60 * 10**9
    os.utime(path, ns=(minute_ago, minute_ago))
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read for a hash."""
    seen: list[Path] = []

    def count(path: Path) -> str:
        seen.append(path)
        return files.sha256(path)

    monkeypatch.setattr(module, "sha256", count)
    # The inode's time cannot be set back, so a file of the test is never old; its content's time must do.
    real = module._state
    monkeypatch.setattr(module, "_state", lambda path: [*real(path)[:3], real(path)[2]])
    return seen


def test_a_file_is_hashed_once(cache: Cache, tmp_path: Path, hashed: list[Path]) -> None:
    paths = [source_file(tmp_path, text, f"{text}.jsonl") for text in ("a", "b")]
    expected = [files.sha256(path) for path in paths]
    assert cache.file_hashes(paths) == expected
    assert Cache(cache.root).file_hashes([*reversed(paths)]) == [*reversed(expected)]
    assert hashed == paths
    link = tmp_path / "link"
    link.symlink_to(paths[0])
    assert cache.file_hashes([link]) == expected[:1]
    assert hashed == paths


def test_the_index_is_read_once_for_all_files(
    cache: Cache, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [source_file(tmp_path, str(number), f"{number}.jsonl") for number in range(8)]
    cache.file_hashes(paths)
    read: list[Path] = []
    real = module._remembered
    monkeypatch.setattr(module, "_remembered", lambda index: read.append(index) or real(index))
    cache.file_hashes(paths)
    assert (len(read), len(hashed)) == (1, 8)


@pytest.mark.parametrize("killed", [False, True], ids=["by an error", "by a kill"])
def test_what_was_hashed_is_remembered_when_a_start_is_cut_short(
    cache: Cache, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    paths = [source_file(tmp_path, str(number), f"{number}.jsonl") for number in range(4)]
    count = module.sha256

    def cut_short(path: Path) -> str:
        if path == paths[3]:
            if killed:  # nothing is written down any more
                monkeypatch.setattr(Cache, "_remember", lambda *given: None)
            raise KeyboardInterrupt
        return count(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256", cut_short)
        patch.setattr(module, "KEPT_SECONDS", 0.0 if killed else 60.0)
        with pytest.raises(KeyboardInterrupt):
            cache.file_hashes(paths)
    assert hashed == paths[:3]
    Cache(cache.root).file_hashes(paths)
    assert hashed == paths


def test_a_changed_file_is_hashed_again(cache: Cache, tmp_path: Path, hashed: list[Path]) -> None:
    path = source_file(tmp_path, "one")
    first = cache.file_hashes([path])
    source_file(tmp_path, "two")
    assert cache.file_hashes([path]) != first
    replaced = source_file(tmp_path, "six", "other")
    os.utime(replaced, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(replaced, path)  # same size, same time, another inode
    assert cache.file_hashes([path]) == [files.sha256(path)]
    assert len(hashed) == 3


@pytest.mark.parametrize("ahead", [-1.0, 0.0, 3_600.0])
def test_a_file_that_just_changed_is_not_remembered(
    cache: Cache, tmp_path: Path, hashed: list[Path], ahead: float
) -> None:
    path = source_file(tmp_path, "one")
    moment = time.time() + ahead
    os.utime(path, (moment, moment))
    cache.file_hashes([path])
    path.write_text("two")
    os.utime(path, (moment, moment))  # as coarse clocks would leave it
    assert cache.file_hashes([path]) == [files.sha256(path)]
    assert len(hashed) == 2


def test_the_inodes_time_tells_of_a_change_that_hides_its_own(cache: Cache, tmp_path: Path) -> None:
    path = source_file(tmp_path, "one")
    before = module._state(path)
    times = path.stat().st_mtime_ns
    time.sleep(0.05)
    path.write_text("two")
    os.utime(path, ns=(times, times))
    after = module._state(path)
    assert after[:3] == before[:3]
    assert after != before


def test_a_file_that_changes_while_it_is_read_is_refused(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source_file(tmp_path, "one")

    def read_while_written(path: Path) -> str:
        found = files.sha256(path)
        path.write_text("one more")
        return found

    monkeypatch.setattr(module, "sha256", read_while_written)
    with pytest.raises(DataError, match="changes while it is read"):
        cache.file_hashes([path])


def test_hashes_that_cannot_be_remembered_are_made_each_time(
    cache: Cache, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source_file(tmp_path, "x")
    for place, name in ((Path, "mkdir"), (files.tempfile, "mkstemp")):
        with failing(monkeypatch, place, name, errno.EROFS):
            found = cache.file_hashes([path])
            assert found == [files.sha256(path)]
    assert len(hashed) == 2


def test_a_file_that_is_not_there_is_named(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        cache.file_hashes([tmp_path / "absent.jsonl"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}', '{"x": [1]}', "\x00"])
def test_a_damaged_index_is_made_again(cache: Cache, tmp_path: Path, hashed: list[Path], text: str) -> None:
    path = source_file(tmp_path, "one")
    cache.file_hashes([path])
    (cache.root / "sources.json").write_text(text)
    assert cache.file_hashes([path]) == [files.sha256(path)]
    assert cache.file_hashes([path]) == [files.sha256(path)]
    assert len(hashed) == 2


def test_the_index_keeps_the_latest(
    cache: Cache, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    paths = [source_file(tmp_path, str(n), f"{n}.jsonl") for n in range(5)]
    cache.file_hashes(paths[:2])
    cache.file_hashes(paths[2:])
    assert list(json.loads((cache.root / "sources.json").read_text())) == [str(path) for path in paths[2:]]


def test_a_name_that_is_no_text_is_remembered_too(cache: Cache, tmp_path: Path, hashed: list[Path]) -> None:
    path = source_file(tmp_path, "one", os.fsdecode(b"r\xffws \xe6.jsonl"))
    assert cache.file_hashes([path]) == cache.file_hashes([path])
    assert len(hashed) == 1


def test_the_code_version_is_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = []
    for text, name in (("a = 1\n", "a.py"), ("a = 2\n", "a.py"), ("a = 2\n", "b.py")):
        package = tmp_path / str(len(versions))
        (package / "data").mkdir(parents=True)
        (package / "formats").mkdir()
        (package / "data" / name).write_text(text)
        monkeypatch.setattr(module, "__file__", str(package / "data" / "cache.py"))
        versions.append(code_version.__wrapped__())
    assert len(set(versions)) == 3
    monkeypatch.undo()
    assert code_version() == code_version.__wrapped__() not in versions
