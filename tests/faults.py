"""File operations that fail, or kill the process, at a place of choice: what a disk and a power cut do to a save.

    with faulty("ENOSPC", at=7, below="/checkpoints/"): …         the seventh operation below raises, in this process
    warm.run("train", …, entry="faults:main", env={"FAULT": "kill:7:.checkpoint-40.tmp"})

An operation is an open, write, fsync, close, mkdir, chmod, rename, unlink or rmdir. A write that is hit writes half of
what it should first; with `slow14` instead of an errno an operation takes 14 seconds more. `at` counts from the first
operation on a path that holds `below`.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any


class Fault:
    """Counts operations and strikes once."""

    def __init__(self, kind: str, at: int, below: str) -> None:
        self.kind = kind
        self.at = at
        self.below = below
        self.begun = False
        self.count = 0
        self.struck = ""

    @property
    def slow(self) -> bool:
        """Whether nothing fails."""
        return self.kind.startswith("slow")

    def met(self, name: str, path: object) -> bool:
        """Count an operation; whether it is the one that fails."""
        text = os.fsdecode(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path))  # type: ignore[call-overload]
        self.begun = self.begun or self.below in text
        if not self.begun or "/checkpoints" not in text:
            return False
        self.count += 1
        if self.count != self.at:
            return False
        self.struck = f"{name} {text}"
        return True

    def strike(self) -> None:
        """Die, raise, or take long."""
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.slow:
            time.sleep(float(self.kind.removeprefix("slow")))
            return
        raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))


class _Stream:
    """A stream whose writes may fail half-way."""

    def __init__(self, stream: Any, path: object, fault: Fault) -> None:
        self._stream, self._path, self._fault = stream, path, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def write(self, content: Any) -> Any:
        if self._fault.met("write", self._path):
            if not self._fault.slow:
                self._stream.write(memoryview(content)[: len(content) // 2])
                self._stream.flush()
            self._fault.strike()
        return self._stream.write(content)


@contextlib.contextmanager
def faulty(kind: str, at: int, below: str) -> Iterator[Fault]:
    """Have one file operation fail.

    Args:
        kind: `kill`, `slow` and seconds, or the name of an errno.
        at: which one, counted from 1.
        below: counting begins with the first operation on a path that holds this.
    """
    from finetune import files

    fault = Fault(kind, at, below)
    names = ("open", "fsync", "mkdir", "chmod", "rename", "replace", "unlink", "rmdir")
    true = {name: getattr(os, name) for name in names}

    def guarded(name: str) -> Callable[..., Any]:
        def operation(path: Any, *more: Any, **named: Any) -> Any:
            # shutil.rmtree names entries relative to an open folder.
            place = named.get("dir_fd") if named.get("dir_fd") is not None else path
            if fault.met(name, place):
                fault.strike()
            return true[name](path, *more, **named)

        return operation

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if fault.met("open", path):
            fault.strike()
        stream = builtins.open(path, mode, *more, **named)  # noqa: SIM115 - whoever opened it closes it
        return _Stream(stream, path, fault) if "x" in mode or "w" in mode else stream

    for name in names:
        setattr(os, name, guarded(name))
    files.open = opened  # type: ignore[attr-defined]
    try:
        yield fault
    finally:
        for name in names:
            setattr(os, name, true[name])
        del files.open  # type: ignore[attr-defined]


@contextlib.contextmanager
def full(begins: str, ends: str) -> Iterator[None]:
    """A disk that takes nothing into the run folder for a while.

    Args:
        begins: the end of a path; once that has got its name, the disk is full.
        ends: part of a path; once that is to be made, there is room again. Without it there never is.
    """
    lacking = False
    rename, opened_here, made, true = os.rename, os.open, os.mkdir, builtins.open

    def refuse(path: object) -> None:
        nonlocal lacking
        text = os.fsdecode(os.fspath(path)) if not isinstance(path, int) else ""  # type: ignore[call-overload]
        lacking = lacking and not (ends and ends in text)
        if lacking and "run/" in os.path.abspath(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def renamed(old: Any, new: Any, **named: Any) -> None:
        nonlocal lacking
        rename(old, new, **named)
        lacking = lacking or os.fspath(new).endswith(begins)

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if set(mode) & set("wxa"):
            refuse(path)
        return true(path, mode, *more, **named)

    def created(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            refuse(path)
        return opened_here(path, flags, *more, **named)

    def folder(path: Any, *more: Any, **named: Any) -> None:
        refuse(path)
        made(path, *more, **named)

    os.rename, os.open, os.mkdir, builtins.open = renamed, created, folder, opened
    try:
        yield
    finally:
        os.rename, os.open, os.mkdir, builtins.open = rename, opened_here, made, true


def on_full_disk(argv: list[str]) -> int:
    """The command line on a disk that is full between two names: FULL holds begins:ends."""
    from finetune.cli.main import main as command_line

    begins, ends = os.environ["FULL"].split(":")
    with full(begins, ends):
        return command_line(argv)


def main(argv: list[str]) -> int:
    """The command line with the fault that FAULT names: kind:at:below."""
    from finetune.cli.main import main as command_line

    kind, at, below = os.environ["FAULT"].split(":")
    with faulty(kind, int(at), below):
        return command_line(argv)


def train(argv: list[str]) -> int:
    """The same by the door of launchers; the fault strikes on one rank, 0 unless FAULT_RANK names another."""
    from finetune.train import main as story

    kind, at, below = os.environ["FAULT"].split(":")
    if os.environ["RANK"] != os.environ.get("FAULT_RANK", "0"):
        return story(argv)
    with faulty(kind, int(at), below):
        return story(argv)


def nan_once(argv: list[str]) -> int:
    """The command line in a process whose loss is no number at the step that FAULT names, once it is computed."""
    from finetune.cli.main import main as command_line
    from finetune.run.trainer import Trainer

    true = Trainer.compute_loss

    def compute_loss(self: Any, *given: Any, **named: Any) -> Any:
        loss = true(self, *given, **named)
        return loss * float("nan") if self.state.global_step + 1 == int(os.environ["FAULT"]) else loss

    Trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    return command_line(argv)


def no_pickle(argv: list[str]) -> int:
    """The command line in a process that may unpickle no class or function from a file of the run."""
    from finetune.cli.main import main as command_line

    _forbid_pickles()
    return command_line(argv)


def no_pickle_here(argv: list[str]) -> int:
    """The same by the door of launchers; torch's own collectives of objects aside, which are no files."""
    from finetune.train import main as story

    _forbid_pickles(besides=("torch/distributed/distributed_c10d.py",))
    return story(argv)


def _forbid_pickles(besides: tuple[str, ...] = ()) -> None:
    import pickle
    import sys

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event != "pickle.find_class":
            return
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.endswith(besides):
                return
            frame = frame.f_back  # type: ignore[assignment]
        raise pickle.UnpicklingError(f"unpickles {arguments}")

    sys.addaudithook(watch)
