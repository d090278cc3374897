"""The command line in a process that runs out of memory in the middle of a step.

    warm.run("train", "recipe.yaml", entry="short_of_memory:main", env={"SHORTAGE": "device:3:0"})

SHORTAGE is kind:step:rank. `device` raises what an accelerator's allocator raises; `host` limits the address space of
the process to what it has, and asks torch's allocator for more.
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


def _with_shortage(story: Any, argv: list[str]) -> int:
    from finetune.run.trainer import Trainer

    kind, step, rank = os.environ["SHORTAGE"].split(":")
    original = Trainer.compute_loss

    def compute_loss(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == int(step) and os.environ.get("RANK", "0") == rank:
            _short(kind)
        return original(self, *given, **named)

    Trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    code: int = story(argv)
    return code


def main(argv: list[str]) -> int:
    """By the command line."""
    from finetune.cli.main import main as story

    return _with_shortage(story, argv)


def train(argv: list[str]) -> int:
    """By the door of launchers."""
    from finetune.train import main as story

    return _with_shortage(story, argv)


def _with_little_left(story: Any, argv: list[str]) -> int:
    """On a host with LEFT bytes of memory left."""
    from finetune.plan import hardware

    hardware.memory_left = lambda: int(os.environ["LEFT"])
    code: int = story(argv)
    return code


def little(argv: list[str]) -> int:
    """By the command line."""
    from finetune.cli.main import main as story

    return _with_little_left(story, argv)


def train_with_little(argv: list[str]) -> int:
    """By the door of launchers."""
    from finetune.train import main as story

    return _with_little_left(story, argv)
