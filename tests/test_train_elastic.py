"""torchrun restarts a run in place: it resumes by itself to the same bits; a smaller world keeps the global batch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from test_train_watch import _workers as workers
from tiny import Lab, chats, write_rows

from finetune.run.launch import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 10
LONG = {
    "data.train": "many.jsonl",
    "training.max_steps": 160,
    "training.num_train_epochs": 1000,
    "training.save_steps": 5,
    "training.save_total_limit": 2,
    "launch.timeout": 60,
}


class Launcher:
    """torchrun, with what it and its processes say."""

    def __init__(self, lab: Lab, *words: str) -> None:
        self.lab, self.said = lab, lab / f"said-{time.monotonic_ns()}"
        with open(self.said, "wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                cwd=lab.folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.said.read_text(errors="replace")

    def workers(self) -> list[int]:
        """The processes of the run that live, in the order of their ranks."""
        return workers(self.process.pid)


@contextmanager
def ended_at_last(launcher: Launcher) -> Iterator[Launcher]:
    """Whatever happens, nothing of it is left."""
    try:
        yield launcher
    finally:
        for pid in [launcher.process.pid, *launcher.workers()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.process.wait()


def wait_for_checkpoint(lab: Lab, launcher: Launcher, after: int = 0) -> int:
    """Until there is a checkpoint later than of step `after`; its step."""
    deadline = time.monotonic() + 240
    while True:
        steps = [int(path.name.split("-")[1]) for path in (lab / "run/checkpoints").glob("checkpoint-*")]
        if steps and max(steps) > after:
            return max(steps)
        assert launcher.process.poll() is None, launcher.output
        assert time.monotonic() < deadline, launcher.output
        time.sleep(0.02)


def undisturbed(lab: Lab, dropout: float = 0.1) -> str:
    """Make the run, called whole, that two processes make when nothing disturbs them; the recipe of one like it."""
    changes = {**LONG, "adapter.lora_dropout": dropout}
    write_rows(lab / "many.jsonl", chats(20))
    for outcome in lab.warm.ranks(2, lab.recipe({**changes, "output_dir": "whole"}), cwd=lab.folder):
        outcome.ok()
    return lab.recipe(changes)


def resumed(output: str) -> list[int]:
    """The steps at which a run went on."""
    return [int(step) for step in re.findall(r"^resume +from run/checkpoints/checkpoint-(\d+)$", output, re.MULTILINE)]


def test_a_run_whose_processes_are_killed_ten_times_resumes_ten_times_by_itself_to_the_same_bits(lab: Lab) -> None:
    recipe = undisturbed(lab)
    restarts = ["--max_restarts", str(KILLS)]
    words = ["--standalone", "--nproc_per_node", "2", *restarts, "-m", "finetune.train", recipe]
    with ended_at_last(Launcher(lab, *words)) as launcher:
        reached = 0
        for kill in range(KILLS):
            reached = wait_for_checkpoint(lab, launcher, reached)
            os.kill(launcher.workers()[kill % 2], signal.SIGKILL)
        assert launcher.process.wait(240) == 0, launcher.output
        assert launcher.workers() == []
    found = resumed(launcher.output)
    assert len(found) == KILLS, launcher.output  # so that none of the restarts was lost to another fault
    assert found == sorted(found)
    assert lab.adapter() == lab.adapter("whole")
    assert lab.losses() == lab.losses("whole")


# A process of the first start is killed between the saved product and its end.
KILLED_AT_THE_END = """
import os, signal, sys
from finetune.run.folder import RunFolder
from finetune.train import main

original = RunFolder.write_exit

def write_exit(self, code, *given):
    if code == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, code, *given)

RunFolder.write_exit = write_exit
sys.exit(main())
"""


def test_a_run_whose_process_is_killed_once_its_product_is_saved_ends_well(lab: Lab) -> None:
    (lab / "killed.py").write_text(KILLED_AT_THE_END)
    words = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "1", "killed.py", lab.recipe(), "--overwrite"]
    with ended_at_last(Launcher(lab, *words)) as launcher:
        assert launcher.process.wait(240) == 0, launcher.output
    assert "Signal 9 (SIGKILL)" in launcher.output or "exitcode: -9" in launcher.output
    assert launcher.output.count("finished the run in run; its product is run/adapter") == 1
    assert len(re.findall(r"^saved ", launcher.output, re.MULTILINE)) == 1  # and nothing was trained again
    assert lab.ended()["exit_code"] == 0


@pytest.mark.parametrize("allowed", [True, False], ids=["named as allowed", "not allowed"])
def test_when_the_world_shrinks_the_global_batch_is_kept_or_the_run_stops_and_says_so(lab: Lab, allowed: bool) -> None:
    # Without dropout: one process does not draw the random numbers of two.
    recipe = [undisturbed(lab, dropout=0.0), *(["--allow-drift", "world_size"] if allowed else [])]
    port = free_port()
    rendezvous = "join_timeout=120,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3"

    def machine(number: int) -> Launcher:
        words = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "1", "--rdzv_id", "shrinks"]
        words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
        words += ["--rdzv_conf", f"{rendezvous},is_host={1 - number}", "-m", "finetune.train", *recipe]
        return Launcher(lab, *words)

    with ended_at_last(machine(0)) as first, ended_at_last(machine(1)) as second:
        wait_for_checkpoint(lab, first)
        for pid in [second.process.pid, *second.workers()]:
            os.kill(pid, signal.SIGKILL)
        code = first.process.wait(240)
    said = first.output + second.output  # rank 0 is on either
    assert "1 accumulated x 2 processes = 4 rows a step" in said
    if allowed:
        assert code == 0, said
        assert "1 accumulated x 1 process = 4 rows a step" in first.output
        assert "accepted: world_size: 2 → 1" in first.output
        assert len(resumed(first.output)) == 1
        assert lab.losses() == pytest.approx(lab.losses("whole"), rel=1e-5)
    else:
        assert code == 1, said
        assert "world_size: 2 → 1\n" in first.output
        assert "--allow-drift world_size" in first.output
        assert not (lab / "run/adapter").exists()
