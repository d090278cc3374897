"""How files become durable: whole or not at all, with the fault named, under the disk errors that happen."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import files
from finetune.errors import DiskError, FinetuneError, RefusedError

FAULTS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left on the disk",
    errno.EACCES: "cannot write here",
    errno.EROFS: "cannot write here",
    errno.EIO: "I/O error",
    errno.ESTALE: r"a write failed \(Stale file handle\)",
    errno.ENOTCONN: "see that the disk is there",
    errno.ETIMEDOUT: "see that the disk is there",
    errno.EFBIG: r"a write failed \(File too large\)",
    errno.ENAMETOOLONG: "too long",
}
# Each step of an atomic write that can fail.
STEPS = ("mkstemp", "write", "fsync", "replace")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> Iterator[None]:
    """`step` of a write fails with an errno while the block runs."""

    def fail(*words: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    class Broken:
        """A stream whose write fails."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *error: object) -> None:
            self.stream.close()

        write = fail

    real = os.fdopen
    with monkeypatch.context() as patch:
        if step == "mkstemp":
            patch.setattr(files.tempfile, "mkstemp", fail)
        elif step == "write":
            patch.setattr(os, "fdopen", lambda *words, **named: Broken(real(*words, **named)))
        else:
            patch.setattr(os, step, fail)
        yield


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", FAULTS)
def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    path = tmp_path / "record.json"
    files.write_text(path, "old")
    with failing(monkeypatch, step, number), pytest.raises(DiskError, match=FAULTS[number]) as caught:
        files.write_text(path, "new")
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 74
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_that_no_user_can_mend_keeps_its_own_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(monkeypatch, "fsync", errno.EBADF), pytest.raises(OSError, match="descriptor") as caught:
        files.write_text(tmp_path / "x", "new")
    assert not isinstance(caught.value, FinetuneError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file/inside.json", "folder"])
def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError, match="a file stands where a folder is needed"):
        files.write_text(tmp_path / where, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (RuntimeError("I/O error: Permission denied (os error 13)"), "cannot write here"),
        (RuntimeError("I/O error: Input/output error (os error 5)"), "I/O error"),
        (RuntimeError("write failed: No space left on device"), "no space left"),
    ],
)
def test_a_writer_with_exceptions_of_its_own_is_understood(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(DiskError, match=said), files.disk_errors(tmp_path / "x"):
        raise error


def test_torchs_writer_is_believed_to_lack_space_only_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "PytorchStreamWriter failed writing file data/0: file write failed"
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"), files.disk_errors(tmp_path):
        raise RuntimeError(broken)
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskError, match="0 MiB free"), files.disk_errors(tmp_path):
        raise RuntimeError(broken)


def test_a_fault_explained_inside_is_not_explained_again(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught, files.disk_errors(tmp_path / "outer"):
        raise DiskError("inner: No space left on device (os error 28)")
    assert str(caught.value).startswith("inner")


def test_other_exceptions_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.disk_errors(tmp_path):
        raise KeyError("step")


def test_a_file_written_piece_by_piece_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made" / "rows.jsonl"
    with files.staged_file(target) as stream:
        stream.write(b"one\n")
        assert not target.exists()
        stream.write(b"two\n")
    assert target.read_bytes() == b"one\ntwo\n"

    def stopped() -> None:
        with files.staged_file(target) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert target.read_bytes() == b"one\ntwo\n"
    assert os.listdir(target.parent) == ["rows.jsonl"]


def test_nan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_comes_back_as_it_went(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "deep" / "er" / "value.json"
    if _has_surrogate(value):
        with pytest.raises(UnicodeEncodeError):
            files.write_json(path, value)
        return
    files.write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def _has_surrogate(value: Any) -> bool:
    return any(0xD800 <= ord(letter) <= 0xDFFF for letter in json.dumps(value, ensure_ascii=False))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "file", "x")
        with files.staged_folder(tmp_path / "folder") as staging:
            (staging / "inner").mkdir()
            (staging / "inner" / "weights").write_text("x")
            os.chmod(staging / "inner" / "weights", 0o600)
    finally:
        after = os.umask(before)
    assert after == umask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder" / "inner" / "weights").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_staged_folder_appears_with_a_manifest_of_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "made" / "here"
    with files.staged_folder(target, {"step": 3}) as staging:
        (staging / "a").write_text("one")
        (staging / "deep").mkdir()
        (staging / "deep" / "manifest.json").write_text("not the folder's own")
        assert not target.exists()
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["files"] == {
        "a": {"bytes": 3, "sha256": files.sha256(target / "a")},
        "deep/manifest.json": {"bytes": 20, "sha256": files.sha256(target / "deep" / "manifest.json")},
    }
    assert files.manifest_faults(target) == []
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with files.staged_folder(tmp_path / "target") as staging:
            (staging / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_inside_the_block_is_a_disk_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="no space left"), files.staged_folder(tmp_path / "target"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("keep")


def _link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


MADE: list[Callable[[Path], Any]] = [Path.mkdir, _folder, Path.touch, _link]


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("early", [True, False])
def test_what_stands_there_is_never_replaced(tmp_path: Path, make: Callable[[Path], Any], early: bool) -> None:
    target = tmp_path / "target"
    if early:
        make(target)

    def write() -> None:
        with files.staged_folder(target):
            make(target)

    with pytest.raises(RefusedError, match="exists already"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    if make is _folder:
        assert (target / "mine").read_text() == "keep"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_finds_every_change(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    target = tmp_path_factory.mktemp("manifest") / "checkpoint"
    names = data.draw(st.lists(st.sampled_from(["a", "b", "c/d", "c/e"]), unique=True, min_size=1))
    with files.staged_folder(target, {}) as staging:
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(data.draw(st.binary(min_size=1, max_size=40)))
    assert files.manifest_faults(target) == []
    victim = data.draw(st.sampled_from(names))
    change = data.draw(st.sampled_from(["flip", "cut", "remove", "add"]))
    content = bytearray((target / victim).read_bytes())
    if change == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (target / victim).write_bytes(content)
        expected = f"{victim} differs from its hash"
    elif change == "cut":
        (target / victim).write_bytes(content[:-1])
        expected = f"{victim} differs from its hash"
    elif change == "remove":
        (target / victim).unlink()
        expected = f"{victim} is missing"
    else:
        (target / "extra").write_text("x")
        expected = "extra is not in the manifest"
    assert files.manifest_faults(target) == [expected]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": 3}', '{"files": ["a"]}', "\udcff"])
def test_a_broken_manifest_is_a_fault_and_no_crash(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "a").write_text("x")
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    assert files.manifest_faults(tmp_path) == ["manifest.json is missing or unreadable"]


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.staged_folder(tmp_path / "x", {}) as staging:
        (staging / "a").write_text("x")

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sha256", fail)
    assert files.manifest_faults(tmp_path / "x") == ["a cannot be read (Input/output error)"]


def test_the_nearest_parent_that_exists(tmp_path: Path) -> None:
    assert files.existing_parent(tmp_path / "a" / "b") == tmp_path
    assert files.existing_parent(tmp_path) == tmp_path


HOLDER = """
import sys, time
from pathlib import Path
from finetune.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_excludes_another_process_and_ends_with_it(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "sub" / "lock"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, cwd=root, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with open(path) as stream, pytest.raises(BlockingIOError):
            files.fcntl.flock(stream, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
        other.send_signal(signal.SIGKILL)
        with files.locked(path):
            assert path.is_file()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with open(path) as stream:
        files.fcntl.flock(stream, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)


COUNTER = """
import sys
from pathlib import Path
from finetune.files import locked
count = Path(sys.argv[2])
for _ in range(300):
    with locked(Path(sys.argv[1]), remove=True):
        number = int(count.read_text())
        count.write_text("")
        count.write_text(str(number + 1))
"""


def test_a_lock_that_is_removed_excludes_processes_that_race_for_it(tmp_path: Path, root: Path) -> None:
    lock, count = tmp_path / "lock", tmp_path / "count"
    count.write_text("0")
    words = [sys.executable, "-c", COUNTER, str(lock), str(count)]
    racers = [subprocess.Popen(words, cwd=root) for _ in range(3)]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    assert count.read_text() == "900"
    assert not lock.exists()


def test_a_lock_of_a_killed_process_is_taken_and_removed(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with files.locked(tmp_path / "lock", remove=True):
        assert (tmp_path / "lock").exists()
        with files.locked(tmp_path / "lock", wait=False, remove=True) as held:
            assert not held
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
