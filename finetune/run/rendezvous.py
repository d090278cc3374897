"""Where the processes of one start find each other, apart from those of earlier starts that a launcher has restarted.

torch's agents (torchrun and accelerate's launcher) keep one store for all their restarts, so that what dead processes
wrote there still stands: gloo then dials the port of a process that is gone, and the restart fails with "Connection
refused" (torch 2.13; `torch.distributed.rendezvous` says that each retry has a new store, which is not so). How often
an agent has restarted does not tell starts apart either: each machine's agent counts its own. So every process writes a
word that no other has, rank 0 gathers them, and what all of them have confirmed names a corner of the store for this
start alone.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finetune.errors import HangError

_POLL = 0.05  # seconds between two looks into the store


def own_corner(rank: int, size: int, timeout: float) -> Any:
    """A store with nothing of earlier starts in it; collective.

    Args:
        rank: this process's number.
        size: how many there are.
        timeout: seconds to wait for the others.

    Returns:
        None where no agent's store is used: then the first process makes a new one.

    Raises:
        HangError: not all of them came.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.TCPStore(*place, None, is_master=False, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore(f"finetune/{_agreed(store, rank, size, timeout)}", store)


def _agreed(store: Any, rank: int, size: int, timeout: float) -> str:
    """A name for this start, on which exactly its processes have agreed.

    Rank 0 publishes the words it finds, which may be those of dead processes, again whenever one of them changes. A
    process confirms only a list that holds its own word at its place, which the dead cannot. Once all have confirmed
    the same list, rank 0 declares it final.
    """
    mine, group = secrets.token_hex(8), ""
    store.set(f"finetune/word/{rank}", mine)
    words = [f"finetune/word/{one}" for one in range(size)]
    confirmed = [f"finetune/confirmed/{one}" for one in range(size)]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if rank == 0 and (found := " ".join(_read(store, words))) and found != group:
            group = found
            store.set("finetune/group", group)
        published = " ".join(_read(store, ["finetune/group"]))
        if published.split()[rank : rank + 1] == [mine]:
            store.set(confirmed[rank], published)
        if rank == 0 and group and _read(store, confirmed) == [group] * size:
            store.set("finetune/final", group)
        final = " ".join(_read(store, ["finetune/final"])).split()
        if len(final) == size and final[rank] == mine:
            return final[0]
        time.sleep(_POLL)
    raise HangError(_missing(store, words, confirmed, group, timeout))


def _read(store: Any, names: list[str]) -> list[str]:
    """The values of all names; none as long as one of them is missing."""
    return [value.decode() for value in store.multi_get(names)] if store.check(names) else []


def _missing(store: Any, words: list[str], confirmed: list[str], group: str, timeout: float) -> str:
    """Who did not come, as far as rank 0 can tell."""
    late = [str(one) for one, name in enumerate(confirmed) if _read(store, [name]) != [group]] if group else []
    late = late or [str(one) for one, name in enumerate(words) if not store.check([name])]
    who = f"rank {', '.join(late)} did not come" if late else "not all processes of this run came"
    return f"{who} within launch.timeout ({timeout:.0f} s with its allowance); see the messages of the others"
