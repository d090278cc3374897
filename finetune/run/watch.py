"""The watchdog: a process that no longer trains is named, everyone's stacks are written, and all end with exit code 77.

Neither gloo nor NCCL say which process they wait for. So every process notes what it does (step, phase), and a thread
of its own, which runs while the main thread is blocked in a collective operation, passes that on through a store that
is not the process group's. When a process has got no further for `launch.timeout` seconds, its thread looks at what the
others said last, and, for those on the same host, at what the operating system says of them: dead, stopped, alive.

Reports stand in the run folder, hang/rank-N.txt: the verdict, the last step, and the stacks of all Python threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import ExitCode, FinetuneError
from finetune.run.folder import now
from finetune.run.ranks import World, from_main

GRACE = 15.0  # seconds that operations of all processes wait longer, so that the watchdog speaks first
BEAT = 0.5  # seconds between two looks
SILENT = 4.0  # seconds without a word from a process, after which it is taken for stopped or dead
LAST_WORDS = 3.0  # seconds in which all write their reports before they end
FIRST_STEP = 120.0  # seconds at least for the first step, in which kernels are compiled
_GONE = re.compile("process is|silent|no longer answers")  # of a suspect: it does not just dawdle
# Files of the stack in whose functions, where they are the innermost, a process waits for others.
_WAITS_IN = ("torch/distributed/", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py", "deepspeed/comm/")


@dataclass(frozen=True)
class Beat:
    """What a process said last.

    Attributes:
        rank: its number.
        host: the machine it runs on.
        pid: its process there.
        step: the last optimizer step it finished.
        phase: what it was doing.
        age: seconds since it got anywhere.
        waits: whether its main thread was in an operation of all processes.
        at: seconds since the epoch, by its host's clock.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    age: float
    waits: bool
    at: float

    def state(self) -> str:
        """What the operating system says of it, on the same host: "dead", "stopped" or "alive"; empty elsewhere."""
        if self.host != socket.gethostname() or not Path("/proc/self").exists():
            return ""
        try:
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "dead"
        return {"T": "stopped", "t": "stopped", "Z": "dead", "X": "dead"}.get(letter, "alive")


class Watch(TrainerCallback):
    """Notes what this process does, and looks after all of them from a thread."""

    def __init__(self, launched: World, folder: Path, timeout: float, end: Callable[[str, int], None]) -> None:
        """
        Args:
            launched: from `finetune.run.ranks.world`.
            folder: where reports go.
            timeout: seconds without progress.
            end: told the verdict and the last step by one process, before all end.
        """
        self.launched, self.folder, self.timeout, self.end = launched, folder, timeout, end
        self._step, self._phase, self._since = 0, "start", time.monotonic()
        self._first = True
        self._stopping, self._ending = threading.Event(), threading.Event()
        self._trained = False  # from then on nothing is timed, but the others still hear from here
        self._heard: dict[int, tuple[Beat, float]] = {}  # the newest word of each, and when it came, by our own clock
        self._spoke, self._said = time.monotonic(), ""  # when the store answered last; the verdict, once there is one
        self._store: Any = None
        self._threads: list[threading.Thread] = []

    # -- what the main thread notes ------------------------------------------------------------------------------------

    def note(self, phase: str, step: int | None = None) -> None:
        """This process has got somewhere."""
        self._phase, self._since = phase, time.monotonic()
        self._step = self._step if step is None else step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start to look, with a store of its own on the first process's host."""
        self.note("start", state.global_step)
        if self.launched.size > 1:
            self._store = _store(self.launched)
            first: list[Any] = [None] * self.launched.size
            dist.all_gather_object(first, asdict(self._beat()))
            self._heard = {rank: (Beat(**beat), time.monotonic()) for rank, beat in enumerate(first)}
            with contextlib.suppress(ValueError, OSError, AttributeError):  # another system
                faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
            self._spoke = time.monotonic()
            self._threads = [threading.Thread(target=one, daemon=True) for one in (self._look, self._speak)]
            for thread in self._threads:
                thread.start()

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
        """The last step is done."""
        self._trained = True

    def stop(self) -> None:
        """Look no longer."""
        self._stopping.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2 * BEAT)

    # -- what the thread does ------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Watch the time; what the store does cannot hold this thread up."""
        looked = time.monotonic()
        while not self._stopping.wait(BEAT):
            now = time.monotonic()
            if (pause := now - looked) > SILENT:  # this process was stopped, not the others
                self._since, self._spoke = self._since + pause, now
                self._heard = {rank: (beat, heard + pause) for rank, (beat, heard) in self._heard.items()}
            looked = now
            allowed = max(self.timeout, FIRST_STEP) if self._first else self.timeout
            if self._said:
                self._end(self._said)
            elif now - self._since > allowed - 2 * BEAT and not self._trained:
                self._end(self._agreed(self.verdict()))

    def _speak(self) -> None:
        """Tell the others how it goes here, and hear how it goes there."""
        while not self._stopping.wait(BEAT):
            try:
                self._store.set(f"beat/{self.launched.rank}", json.dumps(asdict(self._beat())))
                if self._store.check(["verdict"]):
                    self._said = self._store.get("verdict").decode()
                self._listen()
                self._spoke = time.monotonic()
            except (RuntimeError, ValueError):  # the store lives with rank 0, and is gone with it
                if not self._stopping.wait(SILENT) and not self._trained:
                    self._said = self.verdict()
                return

    def _agreed(self, verdict: str) -> str:
        """The verdict of the process that came to one first; its own where the store does not answer."""

        def post() -> None:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set("verdict", "", verdict)
                self._said = self._store.get("verdict").decode()

        threading.Thread(target=post, daemon=True).start()
        deadline = time.monotonic() + 4 * BEAT
        while not self._said and time.monotonic() < deadline:
            time.sleep(BEAT / 5)
        return self._said or verdict

    def _beat(self) -> Beat:
        age = time.monotonic() - self._since
        waits = _waits(sys._current_frames().get(threading.main_thread().ident or 0))
        host = socket.gethostname()
        return Beat(self.launched.rank, host, os.getpid(), self._step, self._phase, round(age, 1), waits, time.time())

    def _listen(self) -> None:
        now = time.monotonic()
        for rank in range(self.launched.size):
            if self._store.check([f"beat/{rank}"]):
                beat = Beat(**json.loads(self._store.get(f"beat/{rank}")))
                before = self._heard.get(rank)
                if before is None or before[0].at != beat.at:
                    self._heard[rank] = (beat, now)

    def suspects(self) -> list[tuple[int, str]]:
        """Ranks that the others wait for, each with why it is one."""
        now = time.monotonic()
        found = {}
        mute = now - self._spoke > SILENT  # then nothing is heard of anyone
        for rank, (beat, heard) in self._heard.items():
            state = beat.state()
            if state in ("dead", "stopped"):
                found[rank] = f"its process is {state}"
            elif mute and rank == 0 and state == "":
                found[rank] = "it no longer answers"
            elif not mute and now - heard > SILENT:
                found[rank] = f"it has been silent for {now - heard:.0f} s"
        if not found:
            stuck = {rank: beat for rank, (beat, _) in self._heard.items() if not beat.waits}
            if len(stuck) < len(self._heard):
                words = "it has done nothing for {:.0f} s but its own work"
                found = {rank: words.format(beat.age) for rank, beat in stuck.items()}
        if not found:
            least = min(beat.step for beat, _ in self._heard.values())
            late = {rank for rank, (beat, _) in self._heard.items() if beat.step == least}
            if len(late) < len(self._heard):
                found = dict.fromkeys(late, "it is a step behind the others")
        return sorted(found.items())

    def speaks(self) -> bool:
        """Whether this process writes down how the run ended: the first that is left, or the first left on its host
        where nothing is heard of the others."""
        suspects, mute = dict(self.suspects()) if self._heard else {}, time.monotonic() - self._spoke > SILENT
        near = [rank for rank, (beat, _) in self._heard.items() if not mute or beat.host == socket.gethostname()]
        return self.launched.rank == min((rank for rank in near if rank not in suspects), default=0)

    def give_way(self) -> None:
        """Called when the main thread fails: while the watchdog ends this process, its verdict is the only word."""
        if self._ending.is_set():
            time.sleep(10 * LAST_WORDS)

    def confess(self, code: int, reason: str) -> bool:
        """Tell the others why this process ends, before they find it dead; whether it is the first that does."""
        told = json.dumps({"rank": self.launched.rank, "exit_code": code, "reason": reason})
        with contextlib.suppress(RuntimeError):
            return self._store is None or self._store.compare_set("failed", "", told).decode() == told
        return False

    def _confessed(self) -> FinetuneError | str:
        """What another process has said it fails with, or whom it found gone before it ended."""
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0, which says itself why it ends
            if self._store is not None and self._store.check(["failed"]):
                told = json.loads(self._store.get("failed"))
                if told["exit_code"] == ExitCode.HANG:
                    return str(told["reason"])
                reason = told["reason"] if self.launched.is_main else told["reason"].splitlines()[0]
                error = FinetuneError(f"rank {told['rank']} (counted from 0): {reason}")
                error.exit_code = told["exit_code"]
                return error
        return ""

    def blame(self) -> FinetuneError | str:
        """Who is gone, once an operation of all processes has failed, or what it said why; empty where neither can be
        told."""
        deadline = time.monotonic() + SILENT + 2 * BEAT
        while self._heard and time.monotonic() < deadline:
            if said := self._confessed():
                return said
            if gone := self._gone():
                self._wake()
                time.sleep(3 * BEAT)  # others of a lost host spoke last a little later
                gone = {**self._gone(), **gone}
                self._kill()
                verdict = self._named(sorted(gone.items()))
                return verdict if self.confess(ExitCode.HANG, verdict) else self._confessed() or verdict
            time.sleep(BEAT / 2)
        return ""

    def _gone(self) -> dict[int, str]:
        """Suspects that do not just dawdle, with why."""
        return {rank: why for rank, why in self.suspects() if _GONE.search(why)}

    def verdict(self) -> str:
        """Who holds up the run, in a sentence."""
        named = self._named(self.suspects())
        return named or "no rank gets any further, and none stands out: the network between them may be cut"

    def _named(self, suspects: list[tuple[int, str]]) -> str:
        return " | ".join(f"rank {rank}: {why}; {self._told(self._heard.get(rank))}" for rank, why in suspects)

    def _told(self, heard: tuple[Beat, float] | None) -> str:
        if heard is None:
            return "nothing is known of it"
        beat = heard[0]
        return f"last step {beat.step}, phase {beat.phase!r}, process {beat.pid} on {beat.host}"

    def _end(self, verdict: str) -> None:
        """Write the report and leave; never returns, unless the run has ended meanwhile."""
        if self._stopping.is_set():
            return
        self._ending.set()
        self._report(verdict)
        with contextlib.suppress(Exception):
            if self.speaks():
                self.end(verdict, self._step)
        self._wake()
        with contextlib.suppress(Exception):
            print(f"error: rank {self.launched.rank}: hang: {verdict}", file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS if self.launched.is_main else LAST_WORDS / 2)  # rank 0 holds the store: it goes last
        self._kill()
        os._exit(ExitCode.HANG)

    def _report(self, verdict: str) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"rank-{self.launched.rank}.txt", "w", encoding="utf-8") as stream:
                stream.write(
                    f"{now()}\n{verdict}\nthis is rank {self.launched.rank}: {self._told((self._beat(), 0.0))}\n\n"
                )
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)

    def _neighbours(self) -> list[tuple[Beat, str]]:
        """Other processes of the run on this host that live, with their state."""
        others = [beat for rank, (beat, _) in self._heard.items() if rank != self.launched.rank]
        return [(beat, state) for beat in others if (state := beat.state()) in ("alive", "stopped")]

    def _wake(self) -> None:
        """Let stopped processes run again, so that they write their reports, too; have the mute show their stacks."""
        suspects = dict(self.suspects())
        for beat, state in self._neighbours():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if state == "stopped":
                    os.kill(beat.pid, signal.SIGCONT)
                elif "silent" in suspects.get(beat.rank, ""):
                    os.kill(beat.pid, signal.SIGUSR2)

    def _kill(self) -> None:
        """End what does not end by itself: a launcher would wait 30 seconds for it."""
        suspects = dict(self.suspects())
        for beat, state in self._neighbours():
            if state == "stopped" or "silent" in suspects.get(beat.rank, ""):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)


def _store(launched: World) -> Any:
    """A store of its own on rank 0's host; collective."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    made = None
    if launched.is_main:
        made = dist.TCPStore(
            host, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=2 * SILENT)
        )
    port = from_main(launched, lambda: made.port if made is not None else 0)
    return made or dist.TCPStore(
        host, port, None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2 * SILENT)
    )


def _waits(frame: FrameType | None) -> bool:
    """Whether the innermost function of a stack is one that waits for all processes."""
    return frame is not None and any(place in frame.f_code.co_filename for place in _WAITS_IN)
