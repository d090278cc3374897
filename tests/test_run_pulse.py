"""Whether a run of another machine lives is seen from a number that grows, whatever clocks and files' times say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import Lab
from warm import Warm

from finetune.errors import RefusedError
from finetune.run import pulse
from finetune.run.folder import RunFolder, claim, read_json
from finetune.run.pulse import Pulse, lives, machine

ELSEWHERE = {"recipe_hash": "abc", "pid": 7, "host": "another-machine", "machine": "another boot"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """An unfinished run of another machine, which is looked at more often."""
    monkeypatch.setattr(pulse, "BEAT", 0.05)
    monkeypatch.setattr(pulse, "_LOOK", 0.1)
    monkeypatch.setenv("FINETUNE_SILENT_RUN", "")
    run = RunFolder(tmp_path / "run")
    run.begin("", ELSEWHERE, [], None)
    return run


@pytest.fixture
def beat() -> Iterator[Callable[[Path], Pulse]]:
    begun: list[Pulse] = []

    def begin(path: Path) -> Pulse:
        begun.append(Pulse(path))
        begun[-1].start()
        return begun[-1]

    yield begin
    for one in begun:
        one.stop()


@pytest.mark.parametrize("hours", [-5, 0, 5])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_of_another_machine_is_left_alone_while_its_pulse_beats(
    folder: RunFolder, beat: Callable[[Path], Pulse], hours: int, overwrite: bool
) -> None:
    beat(folder.root)
    for path in (folder.record, folder.root / "pulse"):
        os.utime(path, (time.time() + 3600 * hours,) * 2)  # a clock that differs
    with pytest.raises(RefusedError, match=r"a run is still going on in .*process 7 on another-machine"):
        claim(folder.root, "abc", overwrite)


def test_a_run_of_another_machine_whose_pulse_has_stopped_holds_nothing(
    folder: RunFolder,
    beat: Callable[[Path], Pulse],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulse, "SILENT", 1.0)
    beat(folder.root).stop()
    assert claim(folder.root, "abc", overwrite=False) == (folder, True)
    assert f"to see whether the run in {folder.root} still goes on on another-machine" in capsys.readouterr().err
    # Neither this process nor one that it starts looks for as long again, as long as nothing changes.
    assert claim(folder.root, "abc", overwrite=False) == (folder, True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(pulse, "SILENT", 75.0)
    beat(folder.root)
    with pytest.raises(RefusedError, match="still going on"):
        claim(folder.root, "abc", overwrite=False)


def test_a_pulse_that_begins_while_one_looks_is_seen(folder: RunFolder, beat: Callable[[Path], Pulse]) -> None:
    begins = threading.Timer(0.4, beat, [folder.root])
    begins.start()
    try:
        assert lives(folder.root, ELSEWHERE)
    finally:
        begins.join()


def test_a_run_that_says_how_it_ended_is_not_looked_at(
    folder: RunFolder, beat: Callable[[Path], Pulse], capsys: pytest.CaptureFixture[str]
) -> None:
    beat(folder.root)
    folder.write_exit(75, "stopped", 3)
    assert claim(folder.root, "abc", overwrite=False) == (folder, True)
    assert capsys.readouterr().err == ""


def test_process_numbers_mean_something_in_the_same_boot_and_container_alone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "SILENT", 1.0)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "finetune"])
    try:
        while b"finetune" not in Path(f"/proc/{other.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # the system takes a moment to put the words there
        here = {**ELSEWHERE, "pid": other.pid, "host": "a name it had before", "machine": machine()}
        assert lives(folder.root, here)
        assert not lives(folder.root, {**here, "host": socket.gethostname(), "machine": "another boot"})
    finally:
        other.kill()
        other.wait()
    assert not lives(folder.root, here)


def test_a_pulse_is_one_small_file_and_a_disk_that_fails_does_not_end_it(
    folder: RunFolder, beat: Callable[[Path], Pulse]
) -> None:
    def grown(than: int) -> int:
        while (number := int(path.read_text())) <= than:
            time.sleep(0.01)
        return number

    path = folder.root / "pulse"
    beat(folder.root)
    inode, number = path.stat().st_ino, grown(1)
    assert (path.stat().st_ino, path.stat().st_size) == (inode, 16)  # a name's file may be remembered elsewhere
    moved = folder.root.rename(folder.root.with_name("moved"))
    time.sleep(0.2)
    moved.rename(folder.root)
    assert grown(number + 1) > number


def test_a_run_has_a_pulse_and_says_on_which_machine_it_is(lab: Lab) -> None:
    child = lab.warm.start(
        "train", lab.recipe({"training.max_steps": 10**5, "training.num_train_epochs": 10**6}), cwd=lab.folder
    )
    child.wait_for("step 1/")
    assert int((lab / "run/pulse").read_text()) >= 1
    assert read_json(lab / "run/run.json")["machine"] == machine()
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    assert (lab / "run/pulse").exists()
    lab.train({"training.learning_rate": 0.02}, "--overwrite").ok()  # a pulse is a run's own, and no foreign file
    assert not (lab / "run/pulse").exists(), "it has ended"
    assert json.loads((lab / "run/exit.json").read_text())["exit_code"] == 0


@pytest.mark.slow
def test_a_run_in_another_container_is_refused_while_it_lives_and_continued_after_it_was_killed(
    lab: Lab, warm: Warm
) -> None:
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("a container of its own needs the command unshare and the right to use it")
    recipe = lab.recipe({"training.max_steps": 100_000, "training.save_steps": 20, "launch.num_processes": 1})
    words = [*apart, sys.executable, "-m", "finetune", "train", recipe]
    with subprocess.Popen(words, cwd=lab.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            while not list((lab / "run").glob("checkpoints/checkpoint-*")):
                assert run.poll() is None
                time.sleep(0.1)
            refused = warm.run("train", recipe, cwd=lab.folder)
            assert refused.returncode == 5
            assert "waiting  up to 75 s, to see whether the run in run still goes on" in refused.stderr
            assert "a run is still going on in run" in refused.stderr
        finally:
            run.kill()
    again = warm.start("train", recipe, cwd=lab.folder)
    try:
        again.wait_for("resume   from run/checkpoints/checkpoint-", timeout=180)
    finally:
        again.kill()
