"""The process that mirrors one run's metrics.jsonl to one tracker; run/track.py starts it and judges how it ended.

It follows the file, hands each line to the tracker, and keeps its state in tracking/NAME.json. It ends at the end mark,
or when the training process has died. A tracker that raises ends this process and nothing else.

A tracker is an object with three methods; name its class or a factory in the recipe as package.module:attribute:

    start(run_folder: Path, project: str, run_name: str, mode: str) -> None     mode is "offline" or "online"
    log(metrics: dict, step: int) -> None     one line of metrics.jsonl without its step
    finish() -> None
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from finetune.errors import FinetuneError
from finetune.files import write_json
from finetune.privacy import environment_secrets, mask_text, no_telemetry
from finetune.registry import resolve

TRACKERS = {
    "wandb": "finetune.run.mirrors:Wandb",
    "tensorboard": "finetune.run.mirrors:TensorBoard",
    "trackio": "finetune.run.mirrors:Trackio",
}

METRICS = "metrics.jsonl"
FOLDER = "tracking"  # in the run folder: a state and a log per tracker, and the end mark
END = "end"  # the run writes it when metrics.jsonl is complete

_POLL = 0.2  # seconds between looks at the file
_SAVE_EVERY = 1.0  # seconds between writes of the state while it changes
_ORPHAN_GRACE = 30.0  # seconds to finish after the training process died


class Tracker(Protocol):
    """What a tracker is; see above."""

    def start(self, run_folder: Path, project: str, run_name: str, mode: str) -> None: ...

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


def file_name(name: str) -> str:
    """How a tracker is called in file names."""
    return name.replace(":", "-")


def state_path(folder: Path, name: str) -> Path:
    """Where the sidecar of a tracker keeps its state."""
    return folder / FOLDER / f"{file_name(name)}.json"


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """The sidecar's last written state; a fresh one when there is none."""
    state: dict[str, Any] = {"stage": "start", "lines_sent": 0, "error": ""}
    with contextlib.suppress(OSError, ValueError, TypeError):
        state.update(json.loads(state_path(folder, name).read_text(encoding="utf-8")))
    return state


def count_lines(path: Path) -> int:
    """Whole lines of a file; 0 when there is none."""
    try:
        with open(path, "rb") as stream:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
    except FileNotFoundError:
        return 0


def kill_group(pid: int) -> None:
    """Kill a process group, when it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class _Mirror:
    """The sidecar's work: follow metrics.jsonl and hand it to one tracker."""

    def __init__(self, name: str, folder: Path, parent: int, sent: int) -> None:
        self._folder = folder
        self._name = name
        self._parent = parent
        self._secrets = environment_secrets()
        self._state = {"stage": "start", "lines_sent": sent, "error": ""}
        self._saved: dict[str, Any] = {}
        self._saving = threading.Lock()
        self._sent = sent
        self._step = 0

    def run(self, project: str, run_name: str, mode: str) -> int:
        """Mirror until the end; return the process's exit code."""
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            self._enter("start")
            factory = resolve("tracker", self._name, TRACKERS)
            tracker: Tracker = factory() if callable(factory) else factory
            tracker.start(self._folder, project, run_name, mode)
            self._enter("log")
            for line in self._lines():
                self._send(tracker, line)
            self._enter("finish")
            tracker.finish()
            self._enter("exit")
        except BaseException as error:
            traceback.print_exc()
            what = mask_text(f"{type(error).__name__}: {error}".strip(), self._secrets)
            self._state["error"] = f"it failed in {self._state['stage']}: {what[:500]}"
            self._save()
            return 1
        return 0

    def _send(self, tracker: Tracker, line: bytes) -> None:
        """Hand one line over; one that is not a JSON object is counted and passed by."""
        try:
            metrics = json.loads(line)
        except ValueError:
            metrics = None
        if isinstance(metrics, dict):
            step = metrics.pop("step", None)
            self._step = step if isinstance(step, int) else self._step
            tracker.log(metrics, self._step)
        else:
            print(f"line {self._sent + 1} of {METRICS} is not a JSON object: {line[:200]!r}", file=sys.stderr)
        self._sent += 1
        self._state["lines_sent"] = self._sent

    def _lines(self) -> Iterator[bytes]:
        """Whole lines after those already sent, as they come, until the end mark or the run's death."""
        path = self._folder / METRICS
        while not path.exists():
            if self._over():
                return
            time.sleep(_POLL)
        with open(path, "rb") as stream:
            rest, skip = b"", self._sent
            while True:
                over = self._over()  # asked before reading: what is written before the mark is read after it
                while chunk := stream.read(1 << 16):
                    *whole, rest = (rest + chunk).split(b"\n")
                    yield from whole[skip:]
                    skip = max(0, skip - len(whole))
                if over:
                    return
                time.sleep(_POLL)

    def _over(self) -> bool:
        return (self._folder / FOLDER / END).exists() or os.getppid() != self._parent

    def _enter(self, stage: str) -> None:
        self._state["stage"] = stage
        self._save()

    def _save(self) -> None:
        with self._saving:
            state = dict(self._state)
            if state != self._saved:
                write_json(state_path(self._folder, self._name), state)
                self._saved = state

    def _watch(self) -> None:
        """Beside the tracker, which may hang: keep the state fresh, and end this process when it is orphaned."""
        saved = orphaned = time.monotonic()
        while True:
            time.sleep(_POLL)
            now = time.monotonic()
            if os.getppid() == self._parent:
                orphaned = now
            elif now - orphaned > _ORPHAN_GRACE:
                self._state["error"] = f"the run died, and it hung in {self._state['stage']}"
                with contextlib.suppress(FinetuneError, OSError):
                    self._save()
                kill_group(os.getpgrp())
            if now - saved >= _SAVE_EVERY or self._over():
                saved = now
                with contextlib.suppress(FinetuneError, OSError):  # a full disk must not end the watch
                    self._save()


def _main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="finetune.run.sidecar", description="Mirror a run's metrics to one tracker.")
    for option in ("--tracker", "--run", "--project", "--run-name"):
        parser.add_argument(option, required=True)
    parser.add_argument("--mode", choices=("offline", "online"), default="offline")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="process id of the run; its death ends this")
    parser.add_argument("--sent", type=int, default=0, help="lines of metrics.jsonl that the tracker has already")
    words = parser.parse_args(argv)
    no_telemetry()
    os.nice(10)  # training goes first
    mirror = _Mirror(words.tracker, Path(words.run), words.parent, words.sent)
    return mirror.run(words.project, words.run_name, words.mode)


if __name__ == "__main__":
    sys.exit(_main())
