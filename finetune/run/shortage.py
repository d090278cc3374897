"""Out of memory: how it is recognised, and what to change in this very recipe.

Accelerators raise torch.OutOfMemoryError; torch's allocator for the CPU, numpy and the operating system say it in words
of their own. Remedies are told in the order of what they cost: first what leaves the result alone, then what changes
what is trained. Only those are told that this recipe has not taken yet and that the other keys allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from finetune.recipe.combinations import Facts, refusals
from finetune.recipe.sections import DataOptions, LaunchOptions, ModelOptions, TrainingOptions
from finetune.run.batch import BatchShape
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
        longest: tokens of the longest row.
        recomputes: whether activations are recomputed in the backward pass.
        validates: whether there are validation rows.
        facts: what finetune/recipe/combinations.py knows of the run.
    """

    shape: BatchShape
    mode: Mode
    device: str
    devices: int
    longest: int
    recomputes: bool
    validates: bool
    facts: Facts


def remedies(
    model: ModelOptions, data: DataOptions, training: TrainingOptions, launch: LaunchOptions, now: Situation
) -> Iterator[str]:
    """What would take less memory: a key, its new value, and its present one."""
    rows, share = now.shape.per_device, now.shape.per_device * now.shape.accumulation
    if rows > 1:
        fewer = max(n for n in range(1, rows // 2 + 1) if share % n == 0)
        yield (
            f"training.per_device_train_batch_size: {fewer} (it is {rows}; global_batch_size stays "
            f"{training.global_batch_size})"
        )
    measured = training.per_device_eval_batch_size or rows
    if now.validates and measured > 1:
        yield f"training.per_device_eval_batch_size: {measured // 2} (it is {measured}), if it was in a validation"
    if not now.recomputes:
        yield "training.activation_checkpointing: true (it is off; slower, with the same result)"
    yield from _spread(launch, now)
    yield from _smaller(model, data, now)


def _spread(launch: LaunchOptions, now: Situation) -> Iterator[str]:
    """Fewer weights, gradients and states on each device."""
    mode, several = now.mode, "multi-node-" if (launch.config or "").startswith("multi-node") else ""
    trains_all = "none" in now.facts["method"]
    if mode.spreads:
        # In the host's memory of one machine; on a CPU everything lies there already.
        if not mode.offloads and not several and now.device != "cpu":
            yield f"launch.config: zero3-offload (it is {mode}; several times slower)"
        return
    if now.shape.processes == 1 and now.devices == 1:
        return
    count = "" if now.shape.processes > 1 else f" with launch.num_processes: {now.devices}"
    if trains_all and mode.stage < 2 and not several and _goes(now, parallelism="ZeRO-2"):
        yield f"launch.config: zero2{count} (it is {mode}), for gradients and optimizer state in parts"
    if _goes(now, parallelism="ZeRO-3"):
        yield f"launch.config: {several}zero3{count} (it is {mode}), for the weights in parts, too"


def _smaller(model: ModelOptions, data: DataOptions, now: Situation) -> Iterator[str]:
    """What changes what is trained."""
    if data.packing:
        yield f"data.max_length: less than {data.max_length}, or data.packing: false (packing fills sequences up to it)"
    else:
        yield f"data.max_length: less than {min(now.longest, data.max_length)}, the tokens of the longest row"
    if "none" in now.facts["method"]:
        yield "adapter.method: lora (it is none: every weight is trained, with a gradient and two moments of its own)"
    elif model.quantization != "nf4" and _goes(now, quantization="nf4"):
        yield f"model.quantization: nf4 (it is {model.quantization})"


def _goes(now: Situation, **other: str) -> bool:
    """Whether the run would be allowed with other facts."""
    changed = {name: frozenset({value}) for name, value in other.items()}
    return not any(refusals({**now.facts, **changed}))
