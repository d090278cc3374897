"""The processes of a run: start their group, prove it is the one asked for, and that all hold the same.

A launcher, Accelerate and the trainer can disagree about how many processes there are without a word: two processes
that each believe to be alone train the same rows and write into one folder; with other settings gradients are never
synchronised. So the world asked for, the launcher's, the trainer's and the wrapper are compared before the first step,
and the trained weights after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.compat import without_shared_memory_op
from finetune.errors import EnvironmentFault, HangError, HardwareError, RecipeError, RefusedError
from finetune.recipe.sections import LaunchOptions
from finetune.run.modes import Mode
from finetune.run.rendezvous import come_together


@dataclass(frozen=True)
class World:
    """This process among those the launcher started."""

    rank: int
    local_rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def world() -> World:
    """As the launcher's environment says; one process where it says nothing.

    Raises:
        HardwareError: what it says is no place among processes that could find each other.
    """
    value = os.environ.get
    size = _whole("WORLD_SIZE", value("WORLD_SIZE", "1"), 1)
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if size > 1 and (missing := [name for name in needed if not value(name)]):
        raise HardwareError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} not set: whatever starts the processes sets all five; "
            "start them with `finetune train`, torchrun or accelerate launch, or see `finetune launch-script`"
        )
    if size > 1:
        _whole("MASTER_PORT", value("MASTER_PORT", ""), 1, 65535)
    rank = _whole("RANK", value("RANK", "0"), 0, size - 1)
    return World(rank, _whole("LOCAL_RANK", value("LOCAL_RANK", "0"), 0, size - 1), size)


def _whole(name: str, value: str, least: int, most: int | None = None) -> int:
    if not re.fullmatch("[0-9]+", value) or int(value) < least or (most is not None and int(value) > most):
        limit = f"from {least} up" if most is None else f"from {least} to {most}"
        raise HardwareError(f"{name}: expected a whole number {limit}, not {value!r}; the launcher sets it")
    return int(value)


def check_asked(options: LaunchOptions, launched: World) -> None:
    """Compare the launch section with what the launcher started.

    Raises:
        HardwareError: another number of processes.
        RecipeError: a config for a launcher, and one process, which needs none.
    """
    asked = options.num_processes
    if options.config is not None and launched.size == 1:
        raise RecipeError(
            f"launch.config: {options.config} does nothing for one process, which is started without a launcher; "
            "remove it, or set launch.num_processes"
        )
    if asked is not None and asked != launched.size:
        raise HardwareError(
            f"launch.num_processes: the recipe asks for {asked} processes and the launcher started {launched.size}; "
            "start it with `finetune train`, or give the launcher the same number"
        )


def device_of(launched: World, device: str) -> torch.device | None:
    """This process's own accelerator; None on a CPU, where weights stay where they are loaded."""
    return None if device == "cpu" else torch.device(device, launched.local_rank)


def start(launched: World, device: str, timeout: float, mode: Mode) -> None:
    """Form the process group, with the recipe's timeout, before anything else can form one without it.

    Args:
        launched: from `world`.
        device: torch device type.
        timeout: seconds a rank waits for another in a collective operation.
        mode: how the run is laid over its processes.

    Raises:
        HangError: not all processes came in time.
        EnvironmentFault: rank 0 cannot listen at the launcher's address.
        FinetuneError: another process will not train.
    """
    if launched.size == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(launched.local_rank)
    backend = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}.get(device, "gloo")
    if mode.offloads and backend != "gloo":  # what lies in the host's memory travels over gloo
        backend = f"{device}:{backend},cpu:gloo"
    allowed = timedelta(seconds=timeout)
    store = come_together(launched.rank, launched.size, timeout)
    try:
        dist.init_process_group(backend, timeout=allowed, store=store, rank=launched.rank, world_size=launched.size)
    except RuntimeError as error:
        raise HangError(
            f"the processes have met and cannot reach each other: {str(error).splitlines()[0]}; where hosts have "
            "several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one between them"
        ) from error
    if mode.kind == "deepspeed":
        import deepspeed

        if device == "cpu":
            without_shared_memory_op()
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=allowed)


@contextlib.contextmanager
def left_afterwards() -> Iterator[None]:
    """Leave the process group, if there is one, when the block has ended."""
    try:
        yield
    finally:
        stop()


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def meet(launched: World) -> None:
    """Wait for all ranks: a launcher kills the others as soon as one has ended with an error."""
    if launched.size > 1 and dist.is_initialized():
        dist.barrier()


def from_main(launched: World, make: Callable[[], Any]) -> Any:
    """`make()` of rank 0, on every rank."""
    box = [make() if launched.is_main else None]
    if launched.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(launched: World, mine: Any) -> list[Any]:
    """What each rank has, by rank, on every rank."""
    every = [mine] * launched.size
    if launched.size > 1:
        dist.all_gather_object(every, mine)
    return every


def agree(launched: World, facts: dict[str, str]) -> None:
    """All ranks must hold the same facts (recipe, data, versions) before they train together.

    Raises:
        RefusedError: with what differs, rank by rank.
    """
    if launched.size == 1:
        return
    every: list[dict[str, str]] = from_all(launched, facts)
    lines = []
    for name in dict.fromkeys(name for other in every for name in other):  # the same on all ranks, so that all refuse
        values = [other.get(name, "nothing") for other in every]
        if len(set(values)) > 1:
            lines.append(f"  {name}: " + ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values)))
    if lines:
        raise RefusedError("the ranks would not train the same run:\n" + "\n".join(lines))


# The class that each mode wraps the model in, and what it would mean if it did not.
_WRAPPERS = {
    "ddp": ("DistributedDataParallel", "gradients would not be shared"),
    "deepspeed": ("DeepSpeedEngine", "DeepSpeed was asked for and would be left out"),
    "fsdp": ("FSDPModule", "FSDP was asked for and would be left out (accelerate has it on accelerators only)"),
}


def prove_world(launched: World, arguments: TrainingArguments) -> None:
    """The trainer must see as many processes as were launched.

    Raises:
        EnvironmentFault: it does not, so that gradients would not be shared.
    """
    if arguments.world_size != launched.size:
        raise EnvironmentFault(
            f"{launched.size} processes were launched and the trainer sees {arguments.world_size}: each would train "
            "alone and write into the same folder; start with `finetune train`, and unset ACCELERATE_USE_CPU"
        )


def digest(tensors: Iterable[Tensor]) -> str:
    """Hex SHA-256 over the bytes of tensors, in order."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


class SameWeights(TrainerCallback):
    """The wrapper must be the one asked for, and after step 1 all ranks must hold the same trained weights."""

    def __init__(self, launched: World, wrapped: Callable[[], nn.Module], mode: Mode) -> None:
        """
        Args:
            launched: from `world`.
            wrapped: gives the model as the trainer wrapped it.
            mode: how the run is laid over its processes.
        """
        self.launched = launched
        self.wrapped = wrapped
        self.mode = mode

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Look at the wrapper."""
        if self.launched.size == 1:
            return
        wrapped = self.wrapped()
        expected, told = _WRAPPERS[self.mode.kind]
        if expected not in {kind.__name__ for kind in type(wrapped).__mro__}:
            raise EnvironmentFault(
                f"{self.launched.size} processes and the model is wrapped in {type(wrapped).__name__}, not in "
                f"{expected}: {told}; start with `finetune train`"
            )
        if self.mode.kind == "deepspeed":
            engine: Any = wrapped
            got = (engine.zero_optimization_stage(), engine.dp_world_size)
            if got != (self.mode.stage, self.launched.size):
                raise EnvironmentFault(
                    f"{self.mode} over {self.launched.size} processes was asked for, and DeepSpeed runs stage {got[0]} "
                    f"over {got[1]}; start with `finetune train`"
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Compare digests once, after the first step of this process; of spread weights no rank holds the same."""
        if self.launched.size == 1 or self.mode.spreads:
            return
        self.launched, launched = World(0, 0, 1), self.launched
        trained = (p for p in given["model"].parameters() if p.requires_grad)
        agree(launched, {f"trained weights after step {state.global_step}": digest(trained)})
