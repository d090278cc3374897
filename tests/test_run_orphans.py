"""Workers do not outlive their launcher, and are told of a stop whenever it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import ExitCode
from finetune.run.launch import Launch, follow

# A worker that notes what it is told; the last words make it one for whoever reads its command.
WORKER = """
import os, signal, sys, time
from finetune.run.orphans import end_with_launcher

def note(number, frame):
    open(sys.argv[1], "a").write(f"told {number}\\n")
    sys.exit(0)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
end_with_launcher(os.environ)
open(sys.argv[1], "a").write(f"began {os.getpid()}\\n")
time.sleep(60)
"""
# A launcher as torch's: its worker has a session of its own. Then it waits, or is killed.
LAUNCHER = """
import os, signal, subprocess, sys, time
time.sleep(float(sys.argv[2]))
words = [sys.executable, "-c", sys.argv[4], sys.argv[1], "finetune.train"]
worker = subprocess.Popen(words, start_new_session=True)
if sys.argv[3] == "dies":
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(worker.wait())
"""


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """Where the worker writes; a worker that is left is killed."""
    path = tmp_path / "notes"
    yield path
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(began(path), signal.SIGKILL)


def began(notes: Path) -> int:
    return int(notes.read_text().split()[1])


def launch(notes: Path, delay: float = 0.0, how: str = "waits") -> Launch:
    root = str(Path(__file__).resolve().parent.parent)
    words = (sys.executable, "-c", LAUNCHER, str(notes), str(delay), how, WORKER)
    return Launch(words, {"PYTHONPATH": root}, patience=20.0)


def told(notes: Path) -> list[str]:
    return [line for line in notes.read_text().splitlines() if line.startswith("told")]


def test_a_worker_whose_launcher_is_killed_is_told_once_and_waited_for(
    notes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = follow(launch(notes, how="dies"))
    assert (code, said) == (-signal.SIGKILL, {})
    assert told(notes) == [f"told {signal.SIGTERM:d}"]
    with pytest.raises(ProcessLookupError):
        os.kill(began(notes), 0)
    assert "the launcher was killed; its 1 processes are told to stop" in capfd.readouterr().err


def test_a_worker_of_another_launcher_stops_when_that_is_killed(notes: Path) -> None:
    plan = launch(notes, how="dies")
    started = {**os.environ, **plan.environment, "TORCHELASTIC_RUN_ID": "x"}
    assert subprocess.run(plan.command, env=started, check=False).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not told(notes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert told(notes) == [f"told {signal.SIGTERM:d}"]


def after(seconds: float, notes: Path | None = None) -> None:
    """Send this process SIGINT: after some time, or as soon as the worker has begun."""

    def send() -> None:
        time.sleep(seconds)
        while notes is not None and not notes.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


def test_a_signal_before_there_are_workers_ends_the_launcher(notes: Path) -> None:
    after(0.3)
    code, said = follow(launch(notes, delay=30.0))
    assert code == -signal.SIGTERM
    assert said["exit_code"] == ExitCode.STOPPED
    assert "the same command begins the run" in said["reason"]
    assert not notes.exists()


def test_a_signal_reaches_the_worker_and_not_the_launcher(notes: Path) -> None:
    after(0.0, notes)
    assert follow(launch(notes)) == (0, {})
    assert told(notes) == [f"told {signal.SIGINT:d}"]
