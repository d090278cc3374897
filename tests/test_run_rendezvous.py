"""The processes of one start find each other, whatever dead ones have left in the launcher's store."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from finetune.errors import EnvironmentFault, FinetuneError, HangError, RefusedError
from finetune.run.rendezvous import come_together, own_corner

RESTARTS = 10
# Two processes form a group and use it; then one is killed, as often as the launcher restarts them.
MEET = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from finetune.run.rendezvous import own_corner

rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store = own_corner(rank, 2, 100)
dist.init_process_group("gloo", timeout=timedelta(seconds=60), store=store, rank=rank, world_size=2)
group = dist.new_group(backend="gloo")
for one in (None, group):
    dist.all_reduce(torch.ones(1), group=one)
print(f"rank {rank} met after {restarts} restarts", flush=True)
if restarts < int(sys.argv[1]):
    if rank == restarts % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
dist.destroy_process_group()  # else torch's threads may abort the interpreter as it ends
"""


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """A store as an agent of torch keeps it, and the variables that name it."""
    server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def start(size: int = 2, timeout: float = 30.0) -> list[Any]:
    """The corners that the processes of one start get; here they are threads."""
    found: list[Any] = [None] * size

    def one(rank: int) -> None:
        found[rank] = own_corner(rank, size, timeout)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> int:
    """The port that the variables name where no agent keeps a store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_without_an_agent_s_store_rank_0_keeps_one(alone: int) -> None:
    corners = start(3)
    corners[1].set("address", "x")
    assert [corner.get("address").decode() for corner in corners] == ["x"] * 3


def test_without_an_agent_s_store_too_who_does_not_come_is_named(alone: int) -> None:
    with pytest.raises(HangError, match=r"^rank 1 did not come within launch\.timeout"):
        own_corner(0, 2, 1.0)


def test_a_rank_0_that_is_not_there_is_named_by_its_address(alone: int) -> None:
    with pytest.raises(HangError, match=rf"is 127\.0\.0\.1:{alone}: rank 0 did not answer there within 1 s: [^\n]*$"):
        own_corner(1, 2, 1.0)


def test_a_port_that_is_taken_is_named(alone: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", alone))
        other.listen()
        with pytest.raises(EnvironmentFault, match=rf":{alone}: rank 0 cannot listen there: .*MASTER_PORT a port that"):
            own_corner(0, 2, 1.0)


def outcomes(refusals: list[FinetuneError | None]) -> list[Any]:
    """What the processes of one start, here threads, are told when some of them will not train."""
    found: list[Any] = [None] * len(refusals)

    def one(rank: int) -> None:
        try:
            found[rank] = come_together(rank, len(refusals), 30.0, refusals[rank])
        except FinetuneError as error:
            found[rank] = (error.exit_code, str(error))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(refusals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("refuses", [0, 1])
def test_all_are_told_why_one_will_not_train(alone: int, refuses: int) -> None:
    refusals: list[FinetuneError | None] = [None, None, None]
    refusals[refuses] = RefusedError("output_dir: taken")
    found = outcomes(refusals)
    others = [outcome for rank, outcome in enumerate(found) if rank != refuses]
    assert others == [(5, f"rank {refuses} (counted from 0): output_dir: taken")] * 2


def test_a_restart_is_not_told_what_an_earlier_start_refused(agent: dist.TCPStore) -> None:
    outcomes([None, RefusedError("no")])
    assert all(isinstance(outcome, dist.PrefixStore) for outcome in outcomes([None, None]))


def test_each_start_has_a_corner_that_its_processes_share_and_no_other_start(agent: dist.TCPStore) -> None:
    starts = [start(3) for _ in range(4)]
    for number, corners in enumerate(starts):
        corners[0].set("address", f"of start {number}")
        assert [corner.get("address").decode() for corner in corners] == [f"of start {number}"] * 3
    fresh = start(3)
    assert not any(corner.check(["address"]) for corner in fresh)


def test_a_smaller_world_agrees_after_a_larger_one(agent: dist.TCPStore) -> None:
    start(3)
    small = start(2)
    small[0].set("address", "x")
    assert small[1].check(["address"])


@pytest.mark.parametrize("late", [0, 1])
def test_the_word_of_a_dead_process_is_not_taken_for_that_of_the_new_one(agent: dist.TCPStore, late: int) -> None:
    start(2)  # its words stay
    found: list[Any] = [None, None]

    def one(rank: int) -> None:
        found[rank] = own_corner(rank, 2, 30.0)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (1 - late, late)]
    threads[0].start()
    threads[0].join(timeout=1.0)
    assert threads[0].is_alive()
    threads[1].start()
    for thread in threads:
        thread.join(timeout=30.0)
    found[0].set("address", "x")
    assert found[1].check(["address"])


def test_who_does_not_come_is_named(agent: dist.TCPStore) -> None:
    with pytest.raises(HangError, match=r"^rank 1, 2 did not come within launch\.timeout"):
        own_corner(0, 3, 1.0)
    start(3)
    with pytest.raises(HangError, match=r"^rank 1, 2 did not come"):
        own_corner(0, 3, 1.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_none_of_ten_restarts_by_torchrun_is_lost_to_a_dead_process_s_address(tmp_path: Path, root: Path) -> None:
    (tmp_path / "meet.py").write_text(MEET)
    words = ["--standalone", "--nproc_per_node", "2", "--max_restarts", str(RESTARTS)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, str(tmp_path / "meet.py"), str(RESTARTS)],
        cwd=root, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=850,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    met = re.findall(r"rank (\d) met after (\d+) restarts", done.stdout)
    assert sorted(met) == sorted((str(rank), str(count)) for rank in (0, 1) for count in range(RESTARTS + 1))
