"""The watchdog: a process that no longer trains is named, everyone's stacks are written, and all end with exit code 77.

Neither gloo nor NCCL say which process they wait for. So every process notes what it does (step, phase), and a thread
of its own, which runs while the main thread is blocked in a collective operation, passes that on through a store that
is not the process group's. When a process has got no further for `launch.timeout` seconds, its thread looks at what the
others said last, and, for those on the same host, at what the operating system says of them: dead, stopped, alive.

It looks from the moment the group of processes is formed until the product is saved. Loading, building and saving take
as long as they take: there only the time counts for which a process waits in one and the same operation of all, or for
one that is gone. Of a process that is dead no time is waited for.

Reports stand in the run folder, hang/rank-N.txt: the verdict, the last step, and the stacks of all Python threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import ExitCode, FinetuneError
from finetune.run import stacks
from finetune.run.beat import Beat, waits
from finetune.run.bulletin import bulletin, failure, in_time
from finetune.run.folder import now
from finetune.run.ranks import World
from finetune.run.suspects import gone, named, suspects

GRACE = 15.0  # seconds that operations of all processes wait longer, so that the watchdog speaks first
BEAT = 0.5  # seconds between two looks
SILENT = 4.0  # seconds without a word from a process, after which it is taken for stopped or dead
LAST_WORDS = 3.0  # seconds in which all write their reports before they end
FIRST_STEP = 120.0  # seconds at least for the first step, in which kernels are compiled


class Watch(TrainerCallback):
    """Notes what this process does, and looks after all of them from a thread."""

    def __init__(
        self, launched: World, folder: Callable[[], Path | None], timeout: float, end: Callable[[int, str, int], None]
    ) -> None:
        """
        Args:
            launched: from `finetune.run.ranks.world`.
            folder: where reports go; None where no file may be written yet.
            timeout: seconds without progress.
            end: told the exit code, the verdict and the last step by one process, before all end.
        """
        self.launched, self.folder, self.timeout, self.end = launched, folder, timeout, end
        self._step, self._phase, self._since = 0, "start", time.monotonic()
        self._first = True
        self._stopping, self._ending = threading.Event(), threading.Event()
        self._failing = False  # whether the main thread has met an error, and finds out itself whose it is
        self._timed = self._begun = False  # whether own work counts, too: in training; whether that has begun
        self._waits: tuple[FrameType, float] | None = (
            None  # the operation of all that it waits in elsewhere, since when
        )
        self._patient: float | None = None  # while it waits for what others do: since when one of them is gone
        self._mourned: dict[int, float] = {}  # when the system was first seen to say that a process is dead
        self._told: dict[str, Any] = {}  # who has said that the run fails, why, and with which code
        self._heard: dict[int, tuple[Beat, float]] = {}  # the newest word of each, and when it came, by our own clock
        self._spoke, self._said = time.monotonic(), ""  # when the store answered last; the verdict, once there is one
        self._store: Any = None
        self._stacks = -1
        self._threads: list[threading.Thread] = []

    @property
    def has_begun(self) -> bool:
        """Whether training has begun, so that the run's folder is its own."""
        return self._begun

    @property
    def is_over(self) -> bool:
        """Whether nobody looks any longer."""
        return self._stopping.is_set()

    # -- what the main thread notes ------------------------------------------------------------------------------------

    def note(self, phase: str, step: int | None = None) -> None:
        """This process has got somewhere."""
        self._stay()
        self._phase, self._since = phase, time.monotonic()
        self._step = self._step if step is None else step

    def begin(self) -> None:
        """Start to look, with a store of its own on the first process's host; collective, and without effect again."""
        if self.launched.size == 1 or self._threads:
            return
        self.note("load")
        self._store = bulletin(self.launched, 2 * SILENT)
        self._stacks = stacks.listen()
        first: list[Any] = [None] * self.launched.size
        dist.all_gather_object(first, asdict(self._beat()))
        self._heard = {rank: (Beat(**beat), time.monotonic()) for rank, beat in enumerate(first)}
        self._spoke = time.monotonic()
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._look, self._speak)]
        for thread in self._threads:
            thread.start()

    def wait_for_all(self, place: str) -> None:
        """Wait until all processes have come to `place`, however long that takes those that are well.

        Raises:
            FinetuneError: what another process has failed with meanwhile.
        """
        if self._store is None:
            return
        marks = [f"{place}/{rank}" for rank in range(self.launched.size)]
        in_time(lambda: self._store.set(marks[self.launched.rank], "here"), 4 * BEAT)
        while not in_time(lambda: self._store.check(marks), 4 * BEAT):
            if isinstance(told := self._confessed(), FinetuneError):
                raise told
            if self._patient is None or not gone(self.suspects()):
                self._patient = time.monotonic()
            time.sleep(BEAT / 2)
        self._patient = None
        self._stay()

    def hurry(self) -> None:
        """Somebody wants the run to stop: from now on a process that is alone is timed, too."""
        if self.launched.size == 1 and not self._threads:
            self._since = time.monotonic()
            self._threads = [threading.Thread(target=self._look_alone, daemon=True)]
            self._threads[0].start()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """From now on own work is timed."""
        self.note("train", state.global_step)
        self._timed = self._begun = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """A step begins."""
        self.note("step", state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """A micro-batch is done."""
        self.note("step", state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """A step is done; what comes next is a log, a measurement, a checkpoint."""
        self._first = False
        self.note("after the step", state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """A batch of a measurement is done."""
        self.note("validation", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """A checkpoint is written."""
        self.note("checkpoint", state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The last step is done: the product is saved, however long that takes."""
        self._timed = False
        self.note("finish")

    def stop(self) -> None:
        """Look no longer. A verdict that the others have heard holds here, too, whatever has been done since."""
        if self._store is not None and not self._failing and not self.is_over:
            if not self._said and in_time(lambda: self._store.check(["verdict"]), 2 * BEAT):
                self._said = in_time(lambda: self._store.get("verdict").decode(), 2 * BEAT) or ""
            self._stay()
        self._stopping.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2 * BEAT)

    def _stay(self) -> None:
        """Go no further in the main thread once the run has been judged: one that was stopped, and is woken for its
        report, would train on alone, or call the run finished."""
        if (self._said or self._ending.is_set()) and threading.current_thread() is threading.main_thread():
            time.sleep(10 * LAST_WORDS)

    # -- what the thread does ------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Watch the time; what the store does cannot hold this thread up."""
        looked = time.monotonic()
        while not self._stopping.wait(BEAT):
            now = time.monotonic()
            if (pause := now - looked) > SILENT:  # this process was stopped, not the others
                self._since, self._spoke = self._since + pause, now
                self._waits = None
                self._heard = {rank: (beat, heard + pause) for rank, (beat, heard) in self._heard.items()}
            looked = now
            allowed = max(self.timeout, FIRST_STEP) if self._first else self.timeout
            if self._said or self._lost(now):
                told = self._confessed()
                if isinstance(told, FinetuneError):
                    self._leave(told)
                else:
                    self._end(self._said or self._agreed(told or self.verdict()))
            elif self._held_up(now) > allowed - 2 * BEAT:
                self._end(self._agreed(self.verdict()))

    def _look_alone(self) -> None:
        """Of one process that is to stop: end it where its step does not end."""
        while not self._stopping.wait(BEAT):
            if self._timed and time.monotonic() - self._since > self.timeout:
                self._end(
                    f"stopped on request, and what followed step {self._step} (phase {self._phase!r}) did not end "
                    f"within launch.timeout ({self.timeout:g} s)",
                    ExitCode.STOPPED,
                )

    def _held_up(self, now: float) -> float:
        """Seconds for which nothing has gone on here; where own work is not timed, of waiting for the others."""
        if self._timed:
            self._waits = None
            return now - self._since
        if (patient := self._patient) is not None:
            return now - patient
        frame = _main_frame()
        if frame is None or not waits(frame, False):
            self._waits = None
            return 0.0
        if self._waits is None or self._waits[0] is not frame:  # the frame is kept, so that none can take its place
            self._waits = (frame, now)
        return now - max(self._waits[1], self._since)

    def _lost(self, now: float) -> bool:
        """Whether a process of this host is dead, and the main thread, at its own work, has not met that."""
        for rank, (beat, heard) in self._heard.items():
            if rank != self.launched.rank and now - heard > SILENT and beat.state() == "dead":
                self._mourned.setdefault(rank, now)
        return not self._failing and any(now - since > SILENT for since in self._mourned.values())

    def _speak(self) -> None:
        """Tell the others how it goes here, and hear how it goes there."""
        while not self._stopping.wait(BEAT):
            try:
                self._store.set(f"beat/{self.launched.rank}", json.dumps(asdict(self._beat())))
                if self._store.check(["verdict"]):
                    self._said = self._store.get("verdict").decode()
                if self._store.check(["failed"]):
                    self._told = json.loads(self._store.get("failed"))
                self._listen()
                self._spoke = time.monotonic()
            except (RuntimeError, ValueError):  # the store lives with rank 0, and is gone with it
                if not self._stopping.wait(SILENT) and not self._failing:
                    self._said = self.verdict()
                return

    def _agreed(self, verdict: str) -> str:
        """The verdict of the process that came to one first; its own where the store does not answer."""

        def agree() -> str:
            self._store.compare_set("verdict", "", verdict)
            return str(self._store.get("verdict").decode())

        self._said = self._said or in_time(agree, 4 * BEAT) or verdict
        return self._said

    def _beat(self) -> Beat:
        age = time.monotonic() - self._since
        waiting = waits(_main_frame(), dist.is_initialized() and dist.get_backend() != "gloo")
        return Beat(
            self.launched.rank, socket.gethostname(), os.getpid(), self._step, self._phase, round(age, 1), waiting,
            time.time(), self._stacks,
        )  # fmt: skip

    def _listen(self) -> None:
        now = time.monotonic()
        for rank in range(self.launched.size):
            if self._store.check([f"beat/{rank}"]):
                beat = Beat(**json.loads(self._store.get(f"beat/{rank}")))
                before = self._heard.get(rank)
                if before is None or before[0].at != beat.at:
                    self._heard[rank] = (beat, now)

    def suspects(self) -> dict[int, str]:
        """Ranks that the others wait for, each with why it is one."""
        now = time.monotonic()
        return suspects(self._heard, now, now - self._spoke > SILENT, SILENT)  # mute: then nothing is heard of anyone

    def speaks(self) -> bool:
        """Whether this process writes down how the run ended: the first that is left, or the first left on its host
        where nothing is heard of the others."""
        suspects, mute = self.suspects() if self._heard else {}, time.monotonic() - self._spoke > SILENT
        near = [rank for rank, (beat, _) in self._heard.items() if not mute or beat.host == socket.gethostname()]
        return self.launched.rank == min((rank for rank in near if rank not in suspects), default=0)

    def give_way(self) -> None:
        """Called when the main thread fails: while the watchdog ends this process, its verdict is the only word."""
        self._failing = True
        if self._ending.is_set():
            time.sleep(10 * LAST_WORDS)

    def confess(self, code: int, reason: str) -> bool:
        """Tell the others why this process ends, before they find it dead; whether it is the first that does."""
        store, told = self._store, json.dumps({"rank": self.launched.rank, "exit_code": code, "reason": reason})
        if store is None:
            return True
        first = in_time(lambda: store.compare_set("failed", "", told).decode() == told, 4 * BEAT)
        if self.launched.is_main and first:
            time.sleep(3 * BEAT)  # the store goes with this process: let the others read it
        return bool(first)

    def _confessed(self) -> FinetuneError | str:
        """What another process has said it fails with, or whom it found gone before it ended."""
        told = self._told
        return failure(told, whole=self.launched.is_main) if told and told["rank"] != self.launched.rank else ""

    def blame(self) -> FinetuneError | str:
        """Who is gone, once an operation of all processes has failed, or what it said why; empty where neither can be
        told."""
        deadline = time.monotonic() + SILENT + 2 * BEAT
        while self._heard and time.monotonic() < deadline:
            if said := self._confessed():
                return said
            if found := gone(self.suspects()):
                self._wake()
                time.sleep(3 * BEAT)  # others of a lost host spoke last a little later
                verdict = named({**gone(self.suspects()), **found}, self._heard)
                self._kill(verdict)
                return verdict if self.confess(ExitCode.HANG, verdict) else self._confessed() or verdict
            time.sleep(BEAT / 2)
        return ""

    def verdict(self) -> str:
        """Who holds up the run, in a sentence."""
        return (
            named(self.suspects(), self._heard)
            or "no rank gets any further, and none stands out: the network between them may be cut"
        )

    def _end(self, verdict: str, code: int = ExitCode.HANG) -> None:
        """Write the report and leave; never returns, unless the run has ended meanwhile."""
        if self._stopping.is_set():
            return
        self._ending.set()
        stacks.write(self.folder(), self.launched.rank, self._head(verdict, self._beat()))
        with contextlib.suppress(Exception):
            if self.speaks():
                self.end(code, verdict, self._step)
        if self.launched.size > 1:
            self._wake()
        with contextlib.suppress(Exception):
            word = "hang: " if code == ExitCode.HANG else ""
            print(f"error: rank {self.launched.rank}: {word}{verdict}", file=sys.stderr, flush=True)
        if self.launched.size > 1:
            time.sleep(LAST_WORDS if self.launched.is_main else LAST_WORDS / 2)  # rank 0 holds the store: it goes last
            self._kill(verdict)
        os._exit(code)

    def _leave(self, told: FinetuneError) -> None:
        """End this process for a reason that another has told; never returns, unless the run has ended meanwhile."""
        if self._stopping.is_set():
            return
        self._ending.set()
        with contextlib.suppress(Exception):
            print(f"error: {told}", file=sys.stderr, flush=True)
        os._exit(told.exit_code)

    def _head(self, verdict: str, beat: Beat) -> str:
        return f"{now()}\n{verdict}\nthis is rank {beat.rank}: {beat.told()}"

    def _neighbours(self) -> list[tuple[Beat, str]]:
        """Other processes of the run on this host that live, with their state."""
        others = [beat for rank, (beat, _) in self._heard.items() if rank != self.launched.rank]
        return [(beat, state) for beat in others if (state := beat.state()) in ("alive", "stopped")]

    def _wake(self) -> None:
        """Let stopped processes run again, so that they write their reports, too; have the mute show their stacks."""
        suspects = self.suspects()
        for beat, state in self._neighbours():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if state == "stopped":
                    os.kill(beat.pid, signal.SIGCONT)
                elif "silent" in suspects.get(beat.rank, ""):
                    os.kill(beat.pid, signal.SIGUSR2)

    def _kill(self, verdict: str) -> None:
        """End what does not end by itself: a launcher would wait 30 seconds for it."""
        suspects = self.suspects()
        for beat, state in self._neighbours():
            if state == "stopped" or "silent" in suspects.get(beat.rank, ""):
                if beat.stacks >= 0:
                    stacks.write_for(self.folder(), beat.rank, self._head(verdict, beat), beat.pid, beat.stacks)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)


def _main_frame() -> FrameType | None:
    """Where the main thread is."""
    return sys._current_frames().get(threading.main_thread().ident or 0)
