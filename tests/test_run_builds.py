"""Locks that killed compilations leave behind, and tools that are missing."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from finetune.errors import EnvironmentFault
from finetune.run import builds
from finetune.run.builds import (
    compile_optimizer,
    extensions_folder,
    missing_tools,
    refuse_missing_tools,
    remove_stale_locks,
)


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A folder in which something was compiled and killed an hour ago."""
    folder = tmp_path / "py311_cpu" / "cpu_adam"
    folder.mkdir(parents=True)
    for name in ("lock", "build.ninja"):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - 3600, time.time() - 3600))
    return folder


def test_a_lock_that_nobody_works_under_is_removed_and_nothing_else(build: Path, tmp_path: Path) -> None:
    assert remove_stale_locks(tmp_path) == [build / "lock"]
    assert [path.name for path in build.iterdir()] == ["build.ninja"]
    assert remove_stale_locks(tmp_path) == []


def test_a_lock_of_a_running_compilation_stays(build: Path, tmp_path: Path) -> None:
    compiler = subprocess.Popen(["sleep", "60"], cwd=build)
    try:
        assert remove_stale_locks(tmp_path) == []
    finally:
        compiler.kill()
        compiler.wait()
    assert remove_stale_locks(tmp_path) == [build / "lock"]


def test_a_lock_made_just_now_stays(build: Path, tmp_path: Path) -> None:
    os.utime(build / "lock")
    assert remove_stale_locks(tmp_path) == []


def test_the_folder_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert extensions_folder(os.environ).resolve() == Path(get_default_build_root()).resolve()
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert missing_tools() == ["ninja", "a C++ compiler"]
    with pytest.raises(EnvironmentFault, match="ninja and a C\\+\\+ compiler cannot be found; install that"):
        refuse_missing_tools()
    for name in ("ninja", "g++"):
        (tmp_path / name).touch(0o755)
    assert missing_tools() == []


def test_locks_are_found_where_a_variable_names_the_folder(tmp_path: Path) -> None:
    """torch then leaves the folder for the versions of Python and CUDA out."""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert remove_stale_locks(tmp_path) == [], "its compiler may run on another host"
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    assert remove_stale_locks(tmp_path) == [lock]


def test_the_lock_that_this_process_holds_stays(build: Path, tmp_path: Path) -> None:
    with (build / "lock").open():
        assert remove_stale_locks(tmp_path) == []
    assert remove_stale_locks(tmp_path) == [build / "lock"]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> type:
    """What compiles, replaced; the looks for locks come quickly."""
    op_builder = pytest.importorskip("deepspeed.ops.op_builder")

    class Builder:
        name = "cpu_adam"

        def load(self) -> None:
            raise NotImplementedError

    monkeypatch.setattr(op_builder, "CPUAdamBuilder", Builder)
    monkeypatch.setattr(builds, "SWEEP", 0.01)
    monkeypatch.setattr(builds, "refuse_missing_tools", lambda: None)
    return Builder


def test_a_lock_that_is_left_behind_while_torch_waits_for_it_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, builder: type, tmp_path: Path
) -> None:
    """Another job took it and was killed; torch waits, and then finds nothing to import, and is asked once more."""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    asked = []

    def load(_self: object) -> None:
        asked.append(lock)
        if len(asked) == 1:
            lock.touch()
            os.utime(lock, (time.time() - 3600, time.time() - 3600))
            while lock.exists():
                time.sleep(0.01)
            raise ImportError("no such file")

    monkeypatch.setattr(builder, "load", load)
    compile_optimizer(tmp_path)
    assert len(asked) == 2


def test_a_fault_without_words_is_told_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, builder: type, tmp_path: Path
) -> None:
    def load(_self: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(builder, "load", load)
    with pytest.raises(EnvironmentFault, match=r"cannot be compiled \(RuntimeError\)"):
        compile_optimizer(tmp_path)
