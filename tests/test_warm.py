"""The warm fork server itself: children are separate, timed, signalled and cleaned up after."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from network import NetworkRefused
from warm import Warm

STORY = """
import os, signal, sys, time

def main(argv):
    print("words", argv, "argv", sys.argv[1:], "cwd", os.getcwd(), "rank", os.environ.get("RANK"), flush=True)
    print("torch" in sys.modules, "trl" in sys.modules, "finetune" in sys.modules, file=sys.stderr, flush=True)
    if argv[0] == "exit":
        raise SystemExit(int(argv[1]))
    if argv[0] == "raise":
        raise KeyError("lost")
    if argv[0] == "at-exit":
        import atexit, threading
        atexit.register(print, "handlers ran")
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread ended"))).start()
    if argv[0] == "sleep":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            return 75
    if argv[0] == "sum":
        import torch, torch.distributed as ranks
        ranks.init_process_group("gloo")
        value = torch.tensor([float(ranks.get_rank() + 1)])
        ranks.all_reduce(value)
        print("sum", value.item())
        ranks.destroy_process_group()
    return 0
"""


@pytest.fixture
def story(tmp_path: Path) -> dict[str, object]:
    (tmp_path / "story.py").write_text(STORY)
    return {"cwd": tmp_path, "entry": "story:main", "env": {"FINETUNE_ROOT": str(tmp_path)}}


def test_a_child_has_its_own_words_folder_and_output(warm: Warm, story: dict, tmp_path: Path) -> None:
    outcome = warm.run("hello", "you", **story).ok()
    assert outcome.stdout == f"words ['hello', 'you'] argv ['hello', 'you'] cwd {tmp_path} rank None\n"
    assert outcome.stderr == "True True False\n"
    assert not (Path.cwd() / "story.py").exists()


@pytest.mark.parametrize(("words", "code"), [(("exit", "3"), 3), (("exit", "0"), 0), (("raise",), 1)])
def test_exit_codes_come_back(warm: Warm, story: dict, words: tuple[str, ...], code: int) -> None:
    outcome = warm.run(*words, **story)
    assert outcome.returncode == code
    assert ("KeyError: 'lost'" in outcome.stderr) == (words[0] == "raise")


def test_a_child_ends_as_an_interpreter_does(warm: Warm, story: dict) -> None:
    lines = warm.run("at-exit", **story).ok().stdout.splitlines()
    assert lines[-2:] == ["thread ended", "handlers ran"]


def test_a_signal_reaches_the_child(warm: Warm, story: dict) -> None:
    child = warm.start("sleep", **story)
    child.wait_for("words")
    child.wait_for("True True")
    child.send_signal(signal.SIGINT)
    assert child.wait(20).returncode == 75
    killed = warm.start("sleep", **story)
    killed.wait_for("words")
    killed.send_signal(signal.SIGTERM)
    assert killed.wait(20).returncode == -signal.SIGTERM


def test_a_child_over_its_time_is_killed_and_its_output_shown(warm: Warm, story: dict) -> None:
    child = warm.start("sleep", **story)
    child.wait_for("words")
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s(.|\n)*words"):
        child.wait(0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_ranks_meet_in_one_process_group(warm: Warm, story: dict) -> None:
    outcomes = warm.ranks(2, "sum", **story)
    assert len(outcomes) == 2
    for rank, outcome in enumerate(outcomes):
        assert f"rank {rank}\n" in outcome.ok().stdout
        assert "sum 3.0" in outcome.stdout


def test_the_server_and_its_children_end_with_the_test_process(tmp_path: Path) -> None:
    (tmp_path / "story.py").write_text(STORY)
    (tmp_path / "quick_warm.py").write_text(
        (Path(__file__).parent / "warm.py").read_text().replace("    _import_the_stack()\n", "")
    )
    program = (
        "import os, sys, time; from quick_warm import Warm; "
        "server = Warm({**os.environ, 'FINETUNE_ROOT': '.'}); "
        "child = server.start('sleep', cwd='.', entry='story:main'); "
        "print(server._server.pid, child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "something of the server outlived the test process"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_network_is_refused_here_and_in_processes_started_from_here(refused) -> None:
    with pytest.raises(NetworkRefused):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(NetworkRefused):
        socket.getaddrinfo("example.com", 443)
    program = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "NetworkRefused" in done.stderr
    assert len(refused()) == 3


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
    assert socket.getaddrinfo("localhost", 80)
