"""Trackers as sidecars: each mirrors metrics.jsonl from a process of its own, so none can stop or delay training.

    trackers = Trackers.start(options, run_folder)     one process per tracker; returns at once
    ... the run appends lines to metrics.jsonl ...
    for outcome in trackers.finish(): print(outcome)    end mark, one deadline for all, then the rest is killed

What a tracker is, and what its process does, stands in run/sidecar.py; what it printed, in tracking/NAME.log.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import DiskError
from finetune.files import disk_errors, write_bytes, write_json
from finetune.privacy import mask_text, no_telemetry
from finetune.recipe.sections import TrackingOptions
from finetune.registry import nearest
from finetune.run.sidecar import (
    END,
    FOLDER,
    METRICS,
    TRACKERS,
    count_lines,
    file_name,
    kill_group,
    read_state,
    state_path,
)


@dataclass(frozen=True)
class TrackerOutcome:
    """How one tracker ended.

    Attributes:
        name: as the recipe names it.
        ok: it mirrored every line and finished.
        lines_sent: lines of metrics.jsonl it has taken.
        lines_total: lines there are.
        reason: what went wrong, empty when nothing did.
    """

    name: str
    ok: bool
    lines_sent: int
    lines_total: int
    reason: str

    def __str__(self) -> str:
        if self.ok:
            return f"tracker {self.name}: all {self.lines_total} lines mirrored"
        return (
            f"tracker {self.name}: {self.lines_sent} of {self.lines_total} lines mirrored; {self.reason} "
            f"({METRICS} is complete)"
        )


def check_trackers(options: TrackingOptions) -> list[str]:
    """What would keep the recipe's trackers from starting, one message each; nothing of them is imported.

    Say them all in one RecipeError before the run starts.
    """
    faults = []
    for name in options.trackers:
        where = f"tracking.trackers: {name!r}"
        if options.trackers.count(name) > 1:
            faults.append(f"{where} is named more than once; name it once")
        elif name in TRACKERS:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # a folder of that name, as wandb makes one, is no package
                faults.append(
                    f"{where} needs the package {name}, which is not installed; run: python -m pip install {name}"
                )
        elif not re.fullmatch(r"[\w.]+:\w+", name):
            near = nearest(name, sorted(TRACKERS))
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(sorted(TRACKERS))
            faults.append(f"{where} is unknown{hint} (known: {known}; or package.module:attribute)")
        elif not _can_be_found(name.split(":")[0]):
            faults.append(f"{where}: there is no module {name.split(':')[0]!r} to import; install its package")
    return list(dict.fromkeys(faults))


def _can_be_found(module: str) -> bool:
    """Whether the module exists; only packages above it are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@dataclass
class _Sidecar:
    """One running tracker process, as the run sees it."""

    name: str
    process: subprocess.Popen[bytes] | None
    problem: str = ""  # why there is no process


class Trackers:
    """The trackers of one run. None of its methods raises for a tracker's sake."""

    def __init__(self, folder: Path, sidecars: list[_Sidecar]) -> None:
        self._folder = folder
        self._sidecars = sidecars
        self._outcomes: list[TrackerOutcome] | None = None

    @classmethod
    def start(cls, options: TrackingOptions, folder: Path) -> Trackers:
        """Start one process per tracker of `options` and return without waiting for any of them.

        Args:
            options: which trackers, project, run name and mode.
            folder: the run folder, which exists; metrics.jsonl may not exist yet. When the run goes on from an
                earlier one, its metrics are cut already, and mirroring goes on after the last line that was sent.

        Raises:
            DiskError: the run folder cannot be written.
        """
        place = folder / FOLDER
        if options.trackers:
            with disk_errors(place):
                place.mkdir(parents=True, exist_ok=True)
                (place / END).unlink(missing_ok=True)
        run_name = options.run_name or folder.absolute().name
        return cls(folder, [_launch(name, options, folder, run_name) for name in options.trackers])

    def finish(self, deadline: float = 30.0) -> list[TrackerOutcome]:
        """Tell the trackers that metrics.jsonl is complete, wait, and kill what is not done.

        Args:
            deadline: seconds for all trackers together.

        Returns:
            One outcome per tracker, in the recipe's order; the same ones when called again.
        """
        if self._outcomes is None:
            if self._sidecars:
                with contextlib.suppress(DiskError):  # a full disk: they are killed at the deadline instead
                    write_bytes(self._folder / FOLDER / END, b"")
            until = time.monotonic() + deadline
            self._outcomes = [self._end(sidecar, until, deadline) for sidecar in self._sidecars]
        return self._outcomes

    def _end(self, sidecar: _Sidecar, until: float, deadline: float) -> TrackerOutcome:
        code, late = None, False
        if sidecar.process is not None:
            try:
                code = sidecar.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
            if code != 0:
                kill_group(sidecar.process.pid)  # also what the tracker itself started
                sidecar.process.wait()
        _mask_log(self._folder / FOLDER / f"{file_name(sidecar.name)}.log")
        state = read_state(self._folder, sidecar.name)
        total, sent = count_lines(self._folder / METRICS), state["lines_sent"]
        reason = sidecar.problem or state["error"]
        if late:
            reason = f"killed after {deadline:g} s, hanging in {state['stage']}"
        elif not reason and code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            reason = f"its process ended with {how}, in {state['stage']}"
        elif not reason and sent < total:
            reason = "it ended early"
        return TrackerOutcome(sidecar.name, not reason, sent, total, reason)


def _launch(name: str, options: TrackingOptions, folder: Path, run_name: str) -> _Sidecar:
    """Start the sidecar of one tracker, in a session of its own so that Ctrl-C goes to the run alone."""
    place = folder / FOLDER
    # Counted here, before the run appends a line: steps that are walked again are to be sent again.
    before = min(read_state(folder, name)["lines_sent"], count_lines(folder / METRICS))
    write_json(state_path(folder, name), {"stage": "start", "lines_sent": before, "error": ""})
    words = [sys.executable, "-P", "-m", "finetune.run.sidecar", "--tracker", name, "--run", str(folder.absolute())]
    words += ["--project", options.project, "--run-name", run_name, "--mode", options.mode]
    words += ["--parent", str(os.getpid()), "--sent", str(before)]
    # The sidecar finds what this process finds, a tracker of the user's included, however this process was started.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    no_telemetry(environment)
    try:
        with open(place / f"{file_name(name)}.log", "ab") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
    except OSError as error:
        return _Sidecar(name, None, f"its process could not be started: {error}")
    return _Sidecar(name, process)


def _mask_log(path: Path) -> None:
    """Take the environment's secrets out of what a tracker printed."""
    with contextlib.suppress(OSError, DiskError):  # why the run ended is not to be lost over it
        text = path.read_text(encoding="utf-8", errors="replace")
        masked = mask_text(text)
        if masked != text:
            write_bytes(path, masked.encode("utf-8"))
