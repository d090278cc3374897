"""The command line in a process that runs out of memory in the middle of a step, or on a host with little of it.

    warm.run("train", "recipe.yaml", entry="short_of_memory:main", env={"SHORTAGE": "device:3:0"})

SHORTAGE is kind:step:rank; LEFT is what the host has left, in bytes. `device` raises what an accelerator's allocator
raises; `host` limits the address space of the process to what it has, and asks torch's allocator for more.
"""

from __future__ import annotations

import os
import resource
from typing import Any

MORE = 2**30  # bytes


def _short(kind: str) -> None:
    import torch

    if kind == "device":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of …")
    with open("/proc/self/statm", encoding="ascii") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE // 2, resource.RLIM_INFINITY))
    torch.empty(MORE, dtype=torch.uint8)


def _fall_short() -> None:
    """In a step, as SHORTAGE says, or before anything is loaded, with LEFT bytes of the host's memory left."""
    if left := os.environ.get("LEFT"):
        from finetune.plan import hardware

        hardware.memory_left = lambda: int(left)
    if not (shortage := os.environ.get("SHORTAGE")):
        return
    from finetune.run.trainer import Trainer

    kind, step, rank = shortage.split(":")
    original = Trainer.compute_loss

    def compute_loss(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == int(step) and os.environ.get("RANK", "0") == rank:
            _short(kind)
        return original(self, *given, **named)

    Trainer.compute_loss = compute_loss  # type: ignore[method-assign]


def main(argv: list[str]) -> int:
    """By the command line."""
    from finetune.cli.main import main as story

    _fall_short()
    return story(argv)


def train(argv: list[str]) -> int:
    """By the door of launchers."""
    from finetune.train import main as story

    _fall_short()
    return story(argv)
