"""Out of memory: how it is recognised, and what to change in this very recipe.

Accelerators raise torch.OutOfMemoryError; torch's allocator for the CPU, numpy and the operating system say it in words
of their own. Remedies are told in the order of what they cost: first what leaves the result alone, then what changes
what is trained. Only those are told that this recipe has not taken yet; which of them its other keys allow is asked of
the checks themselves, in finetune/advice.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune.errors import RecipeError
from finetune.recipe.sections import DataOptions, LaunchOptions, ModelOptions, TrainingOptions
from finetune.run.batch import BatchShape, batch_shape
from finetune.run.modes import Mode

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _SIGNS)


@dataclass(frozen=True)
class Situation:
    """What a recipe became on this machine.

    Attributes:
        shape: the global batch as the processes split it.
        mode: how the run is laid over its processes.
        device: torch device type.
        devices: how many of them this machine has.
        machines: for how many machines launch.config is.
        given: whether a launcher was given a configuration of its own, which launch.config must not contradict.
        longest: tokens of the longest row.
        recomputes: whether activations are recomputed in the backward pass.
        validates: whether there are validation rows.
        trains_all: whether there is no adapter, and weights of the base are trained.
    """

    shape: BatchShape
    mode: Mode
    device: str
    devices: int
    machines: int
    given: bool
    longest: int
    recomputes: bool
    validates: bool
    trains_all: bool


@dataclass(frozen=True)
class Remedy:
    """What would take less memory.

    Attributes:
        changes: dotted key to value.
        text: the same for a reader: a key, its new value, and its present one.
    """

    changes: Mapping[str, Any]
    text: str


def remedies(
    model: ModelOptions, data: DataOptions, training: TrainingOptions, launch: LaunchOptions, now: Situation
) -> Iterator[Remedy]:
    """What would take less memory, the gentlest first."""
    rows, share = now.shape.per_device, now.shape.per_device * now.shape.accumulation
    if rows > 1:
        fewer, key = max(n for n in range(1, rows // 2 + 1) if share % n == 0), "training.per_device_train_batch_size"
        stays = f"global_batch_size stays {training.global_batch_size}"
        yield Remedy({key: fewer}, f"{key}: {fewer} (it is {rows}; {stays})")
    measured, key = training.per_device_eval_batch_size or rows, "training.per_device_eval_batch_size"
    if now.validates and measured > 1:
        yield Remedy({key: measured // 2}, f"{key}: {measured // 2} (it is {measured}), if it was in a validation")
    if not now.recomputes:
        key = "training.activation_checkpointing"
        yield Remedy({key: True}, f"{key}: true (it is off; slower, with the same result)")
    yield from _spread(training, launch, now)
    yield from _smaller(model, data, now)


def _spread(training: TrainingOptions, launch: LaunchOptions, now: Situation) -> Iterator[Remedy]:
    """Fewer weights, gradients and states on each device."""
    mode, several = now.mode, "multi-node-" if now.machines > 1 else ""
    too = ", with the same for the launcher's --config_file" if now.given else ""
    if mode.spreads:
        # In the host's memory of one machine; on a CPU everything lies there already.
        if not mode.offloads and not several and now.device != "cpu":
            name = "zero3-offload"
            yield Remedy({"launch.config": name}, f"launch.config: {name} (it is {mode}; several times slower){too}")
        return
    more, count = {}, ""
    if now.shape.processes == 1:
        if (processes := _sharing(training, now.devices)) == 1:
            return
        more, count = {"launch.num_processes": processes}, f" with launch.num_processes: {processes}"
    if now.trains_all and mode.stage < 2 and not several:
        what = "for gradients and optimizer state in parts"
        yield Remedy({"launch.config": "zero2", **more}, f"launch.config: zero2{count} (it is {mode}), {what}{too}")
    name, what = f"{several}zero3", "for the weights in parts, too"
    yield Remedy({"launch.config": name, **more}, f"launch.config: {name}{count} (it is {mode}), {what}{too}")


def _sharing(training: TrainingOptions, most: int) -> int:
    """The most processes, up to `most`, that can share the global batch."""
    for processes in range(most, 1, -1):
        try:
            batch_shape(training, processes)
        except RecipeError:
            continue
        return processes
    return 1


def _smaller(model: ModelOptions, data: DataOptions, now: Situation) -> Iterator[Remedy]:
    """What changes what is trained."""
    key, limit = "data.max_length", data.max_length if data.packing else min(now.longest, data.max_length)
    long = {} if data.on_long_row != "error" else {"data.on_long_row": "drop"}
    said = " with data.on_long_row: drop (it is error), or truncate or split" if long else ""
    what = "packing fills sequences up to it" if data.packing else "the tokens of the longest row"
    yield Remedy({key: limit - 1, **long}, f"{key}: less than {limit}{said}, {what}")
    if data.packing and data.packing_strategy == "bfd":
        yield Remedy({"data.packing": False}, "data.packing: false (it is true)")
    if now.trains_all:
        what = "every weight is trained, with a gradient and two moments of its own"
        yield Remedy({"adapter.method": "lora"}, f"adapter.method: lora (it is none: {what})")
    elif model.quantization != "nf4":
        yield Remedy({"model.quantization": "nf4"}, f"model.quantization: nf4 (it is {model.quantization})")
