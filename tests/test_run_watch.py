"""Whom the watchdog blames, without a run: two of them in one process, over a store of torch's."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from finetune.run import watch as module
from finetune.run.beat import Beat, waits
from finetune.run.launch import free_port
from finetune.run.ranks import World
from finetune.run.watch import Watch


def beat(rank: int) -> Beat:
    """A word of a rank that is well, on a host of its own."""
    return Beat(rank, f"host-{rank}", 1, 10, "after the step", 0.1, False, time.time())


def test_after_the_last_step_a_rank_that_is_well_is_still_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "SILENT", 0.5)
    port, said = free_port(), []
    server = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    stores: list[Any] = [server, dist.TCPStore("127.0.0.1", port, None, False)]
    watches = [
        Watch(World(rank, 0, 2), lambda: tmp_path, 60, lambda code, verdict, step: said.append(verdict))
        for rank in (0, 1)
    ]
    given: Any = {"args": None, "state": None, "control": None}
    for rank, (watch, store) in enumerate(zip(watches, stores, strict=True)):
        monkeypatch.setattr(watch, "_beat", lambda rank=rank: beat(rank))
        watch._store, watch._heard = store, {other: (beat(other), time.monotonic()) for other in (0, 1)}
        watch._threads = [threading.Thread(target=one, daemon=True) for one in (watch._look, watch._speak)]
        for thread in watch._threads:
            thread.start()
    for watch in watches:
        watch.on_train_end(**given)
    time.sleep(1.5)  # the last checkpoint, or the gathering of the product, takes a while
    assert socket.gethostname() not in ("host-0", "host-1")
    assert watches[1].blame() == ""
    watches[0].stop()
    watches[1].stop()
    assert said == []


def test_on_an_accelerator_a_rank_that_fetches_a_number_may_wait_for_all() -> None:
    number = SimpleNamespace(item=threading.Lock().acquire)  # a call into C that does not return, as a tensor's
    number.item()

    def fetch() -> None:
        number.item(timeout=2)

    def sleep() -> None:
        time.sleep(2)

    threads = [threading.Thread(target=one) for one in (fetch, sleep)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    fetching, asleep = (sys._current_frames()[thread.ident or 0] for thread in threads)
    assert waits(fetching, on_accelerator=True)
    assert not waits(fetching, on_accelerator=False)
    assert not waits(asleep, on_accelerator=True)
    for thread in threads:
        thread.join()
