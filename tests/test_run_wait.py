"""Work of rank 0 that lasts longer than an operation of all processes waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from torch.distributed import distributed_c10d

from finetune.errors import ModelError
from finetune.run import ranks, wait
from finetune.run.launch import free_port
from finetune.run.modes import Mode
from finetune.run.ranks import World, from_main
from finetune.run.wait import from_main_in_time, on_each_host_in_time

TIMEOUT = 2.0  # seconds
LONG = 3.5
ALONE = World(0, 0, 1)


def two(folder: Path, work: Callable[[World], Any]) -> list[str]:
    """What `work` gives or raises on each of two processes over gloo, as text."""
    started = processes.start_processes(
        _rank, args=(free_port(), str(folder), work), nprocs=2, join=False, start_method="fork"
    )
    assert started is not None
    while not started.join(timeout=60):
        pass
    return [(folder / str(rank)).read_text() for rank in range(2)]


def _rank(rank: int, port: int, folder: str, work: Callable[[World], Any]) -> None:
    """One process on each of two hosts, as far as it can tell."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    torch.set_num_threads(1)
    launched = ranks.world()
    ranks.start(launched, "cpu", timeout=60.0, mode=Mode())
    ranks.meet(launched)  # both are up, however busy the machine is
    distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))
    try:
        said = repr(work(launched))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (Path(folder) / str(rank)).write_text(said)
    os._exit(0)


def _long() -> str:
    time.sleep(LONG)
    return f"made by {os.getpid()}"


def _plainly(launched: World) -> Any:
    return from_main(launched, _long)


def _in_time(launched: World) -> Any:
    return from_main_in_time(launched, _long)


def _in_vain(launched: World) -> Any:
    def fail() -> None:
        time.sleep(LONG)
        raise ModelError("a file cannot be read")

    return from_main_in_time(launched, fail)


def test_ranks_wait_for_work_of_rank_0_that_outlasts_their_timeout(tmp_path: Path) -> None:
    assert "imed out" in two(tmp_path, _plainly)[1]  # what it is for
    first, second = two(tmp_path, _in_time)
    assert first == second
    assert "made by" in first


def test_what_that_work_raises_is_raised_on_all_ranks(tmp_path: Path) -> None:
    assert two(tmp_path, _in_vain) == ["ModelError: a file cannot be read"] * 2


def _on_each(launched: World) -> Any:
    """The second host takes long and fails, the first is done at once."""

    def work() -> None:
        if launched.rank == 1:
            time.sleep(LONG)
            raise ModelError("no compiler there")

    on_each_host_in_time(launched, work)


def test_work_on_each_host_is_waited_for_by_all_and_its_fault_is_everyones(tmp_path: Path) -> None:
    assert two(tmp_path, _on_each) == ["ModelError: no compiler there"] * 2


def test_only_the_first_process_of_a_host_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "BEAT", 0.01)
    worked: list[str] = []
    on_each_host_in_time(ALONE, lambda: worked.append("first"))
    on_each_host_in_time(World(0, 1, 1), lambda: worked.append("second"))
    assert worked == ["first"]


def test_one_process_is_told_once_that_its_work_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "BEAT", 0.01)
    monkeypatch.setattr(wait, "SILENT", 0.02)
    told: list[str] = []
    assert from_main_in_time(ALONE, _seven, lambda: told.append("long")) == 7
    assert told == ["long"]
    assert from_main_in_time(ALONE, lambda: None, lambda: told.append("again")) is None
    assert told == ["long"]
    with pytest.raises(ModelError, match="gone"):
        from_main_in_time(ALONE, _raise)


def _seven() -> int:
    time.sleep(0.2)
    return 7


def _raise() -> None:
    raise ModelError("gone")
