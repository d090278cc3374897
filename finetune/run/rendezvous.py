"""Where the processes of one start find each other, apart from those of earlier starts that a launcher has restarted.

torch's agents (torchrun and accelerate's launcher) keep one store for all their restarts, so that what dead processes
wrote there still stands: gloo then dials the port of a process that is gone, and the restart fails with "Connection
refused" (torch 2.13; `torch.distributed.rendezvous` says that each retry has a new store, which is not so). How often
an agent has restarted does not tell starts apart either: each machine's agent counts its own. So every process writes a
word that no other has, rank 0 gathers them, and what all of them have confirmed names a corner of the store for this
start alone.

Where no agent keeps a store (srun, or processes started by hand) rank 0 does. In either case all processes tell each
other there, before they form a group, whether they are going to train: one that finds a fault on its host must not
leave the others waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finetune.errors import EnvironmentFault, FinetuneError, HangError

LINGER = 60.0  # seconds in which a process that will not train waits for the others, to tell them
_LAST_WORDS = 10.0  # seconds in which all must have read that one will not train
_POLL = 0.05  # seconds between two looks into the store


def come_together(rank: int, size: int, timeout: float, refusal: FinetuneError | None = None) -> Any:
    """A store of this start, once all its processes are there and none has refused to train; collective.

    Args:
        rank: this process's number.
        size: how many there are.
        timeout: seconds to wait for the others.
        refusal: why this process will not train; the others are told.

    Raises:
        HangError: not all of them came.
        EnvironmentFault: rank 0 cannot listen at the address.
        FinetuneError: another one has refused, with its exit code.
    """
    try:
        corner = own_corner(rank, size, timeout)
        _share(corner, rank, size, timeout, refusal)
    except dist.DistError as error:
        raise HangError(f"{_address()}: the processes lost each other before they trained: {_first(error)}") from error
    return corner


def tell_refusal(refusal: FinetuneError) -> None:
    """Let the other processes of this start end with the same exit code, instead of waiting for this one."""
    with contextlib.suppress(FinetuneError):  # nobody is there to be told
        come_together(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), LINGER, refusal)


def _share(corner: Any, rank: int, size: int, timeout: float, refusal: FinetuneError | None) -> None:
    told = {} if refusal is None else {"exit_code": refusal.exit_code, "reason": str(refusal)}
    corner.set(f"outcome/{rank}", json.dumps(told))
    names = [f"outcome/{one}" for one in range(size)]
    if not _all_there(corner, names, timeout):
        raise HangError(f"{_address()}: not all processes said within {timeout:.0f} s whether they train")
    outcomes = [json.loads(value) for value in _read(corner, names)]
    if not any(outcomes):
        return
    with contextlib.suppress(dist.DistError):  # the store ends with a process, which must not be before all have read
        corner.set(f"read/{rank}", "")
        _all_there(corner, [f"read/{one}" for one in range(size)], _LAST_WORDS)
    if refusal is None:
        first = next(one for one, outcome in enumerate(outcomes) if outcome)
        error = FinetuneError(f"rank {first} (counted from 0): {outcomes[first]['reason']}")
        error.exit_code = outcomes[first]["exit_code"]
        raise error


def _all_there(corner: Any, names: list[str], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not corner.check(names):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def own_corner(rank: int, size: int, timeout: float) -> Any:
    """A store with nothing of earlier starts in it: a part of the agent's, or else one of rank 0; collective.

    Args:
        rank: this process's number.
        size: how many there are.
        timeout: seconds to wait for the others.

    Raises:
        HangError: not all of them came.
        EnvironmentFault: rank 0 cannot listen at the address.
    """
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    place, waits = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=timeout)
    try:
        store = dist.TCPStore(
            *place, None, is_master=listens, timeout=waits, wait_for_workers=False, multi_tenant=listens
        )
    except dist.DistError as error:
        if listens:
            raise EnvironmentFault(
                f"{_address()}: rank 0 cannot listen there: {_first(error)}; MASTER_ADDR must name this host, and "
                "MASTER_PORT a port that nobody else uses"
            ) from error
        raise HangError(
            f"{_address()}: rank 0 did not answer there within {timeout:.0f} s: {_first(error)}; see its messages, and "
            "whether this host can reach that address"
        ) from error
    return dist.PrefixStore(f"finetune/{_agreed(store, rank, size, timeout)}", store)


def _address() -> str:
    """Where the processes of a run meet, as the launcher says."""
    return f"MASTER_ADDR:MASTER_PORT is {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _first(error: BaseException) -> str:
    """What torch says in its first line, without the frames that follow."""
    return str(error).splitlines()[0].partition("Exception raised from")[0].strip().rstrip(".")


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
