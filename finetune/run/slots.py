"""Which piece of each trained weight, and of what the optimizer knows of it, this process holds.

    one process, DDP   a slot is a weight, whole
    FSDP2              a slot is a weight's rows on this process
    ZeRO-1, ZeRO-2     a slot is this process's part of one flat tensor of many weights, cut anywhere
    ZeRO-3             a slot is a flat tensor of this process's part of each of many weights

In all of them every number of a trained weight lies in one slot of one process (or in the same one of several), at a
place that can be named as (weight, position in it, flat). Named so, a state can be put down by one way of sharing it
and taken up by another: see run/checkpoint_parts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from finetune.errors import RefusedError

if TYPE_CHECKING:
    from finetune.run.trainer import Trainer


@dataclass(frozen=True)
class Piece:
    """A run of numbers of one trained weight.

    Attributes:
        name: of the weight in the model.
        start: of the first number, in the whole weight laid flat.
        count: of numbers; 0 where this process holds none.
        offset: of the first number in the slot.
    """

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Slot:
    """One tensor that the optimizer steps.

    Attributes:
        key: under which the optimizer keeps its state.
        group: the number of its group of parameters.
        names: of the weights that it may hold pieces of.
        pieces: those that it holds.
    """

    key: Tensor
    group: int
    names: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @property
    def flat(self) -> Tensor:
        """The numbers of `key` on this process, a view (N,)."""
        return local(self.key.detach()).view(-1)

    def laid(self, flat: Tensor) -> Tensor:
        """State (N,) in the form that the optimizer keeps beside `key`."""
        if not isinstance(self.key, DTensor):
            return flat.view(self.key.shape)
        rows = flat.view(self.key.to_local().shape)
        return DTensor.from_local(
            rows, self.key.device_mesh, self.key.placements, run_check=False, shape=self.key.shape,
            stride=self.key.stride(),
        )  # fmt: skip


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


@dataclass(frozen=True)
class Layout:
    """How the trained state lies on this process.

    Attributes:
        slots: in an order that is the same at each call.
        optimizer: torch's own, without wrappers.
        shapes: of the whole trained weights, by name.
        zero: DeepSpeed's optimizer around it; None without.
    """

    slots: tuple[Slot, ...]
    optimizer: torch.optim.Optimizer
    shapes: dict[str, tuple[int, ...]]
    zero: Any = None


def layout_of(trainer: Trainer) -> Layout:
    """Look at a trainer whose model and optimizer are wrapped.

    Raises:
        RefusedError: DeepSpeed keeps the state where it cannot be read, as on an NVMe drive.
    """
    named = {id(parameter): plain(name) for name, parameter in trainer.model.named_parameters()}
    zero = getattr(trainer.model_wrapped, "optimizer", None) if trainer.is_deepspeed_enabled else None
    optimizer: Any = (zero if zero is not None else trainer.optimizer).optimizer
    if zero is None:
        slots = tuple(_of_parameters(optimizer, named))
    elif trainer.spreads:
        slots = tuple(_of_zero3(zero, named))
    else:
        slots = tuple(_of_zero(zero, named))
    trained = {plain(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
    held = {name for slot in slots for name in slot.names}
    if held != shapes.keys():
        odd = sorted(held ^ shapes.keys())
        raise RefusedError(f"the optimizer does not step what is trained: {', '.join(odd[:5])}; report this")
    return Layout(slots, optimizer, shapes, zero)


def plain(name: str) -> str:
    """The name of a weight without what recomputed activations wrap around its layer."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _of_parameters(optimizer: torch.optim.Optimizer, named: dict[int, str]) -> Iterator[Slot]:
    for group, entry in enumerate(optimizer.param_groups):
        for key in entry["params"]:
            name = named.get(id(key), "")
            if not local(key).is_contiguous():
                raise RefusedError(f"{name}: its numbers do not lie one after the other; report this")
            piece = Piece(name, _first(key), local(key).numel(), 0)
            yield Slot(key, group, (name,), (piece,) if piece.count else ())


def _first(key: Tensor) -> int:
    """The position in a whole weight of the first number of its rows on this process."""
    if not isinstance(key, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(key.shape, key.device_mesh, key.placements)
    return sum(place * step for place, step in zip(offsets, key.stride(), strict=True))


def _of_zero(zero: Any, named: dict[int, str]) -> Iterator[Slot]:
    """ZeRO-1 and -2; addresses are DeepSpeed's own."""
    flats = zero.single_partition_of_fp32_groups
    for group, (key, parameters) in enumerate(zip(flats, zero.bit16_groups, strict=True)):
        mapped = [(named[id(p)], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
        pieces = [
            Piece(name, at.lp_fragment_address.start, at.lp_fragment_address.numel, at.hp_fragment_address.start)
            for name, at in mapped
        ]
        yield Slot(key, group, tuple(named[id(p)] for p in parameters), tuple(pieces))


def _of_zero3(zero: Any, named: dict[int, str]) -> Iterator[Slot]:
    for number, (key, parameters) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
        if key.numel() < sum(p.partition_numel() for p in parameters):
            raise RefusedError(
                "launch.config: DeepSpeed keeps the optimizer's state on a drive, of which no checkpoint can be made; "
                "set offload_optimizer.device to cpu"
            )
        pieces = []
        for parameter in parameters:
            _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * size
            count = max(0, min(size, parameter.ds_numel - start))
            if count:
                pieces.append(Piece(named[id(parameter)], start, count, offset))
        names = tuple(named[id(p)] for p in parameters)
        yield Slot(key, zero.sub_group_to_group_id[number], names, tuple(pieces))


def take_up(layout: Layout, whole: Callable[[str], Tensor]) -> None:
    """Have the model compute with what now stands in the slots, which are copies of its weights under DeepSpeed.

    Args:
        layout: of the trainer.
        whole: gives a trained weight, flat, by name.
    """
    zero = layout.zero
    if zero is None:
        return  # the slots are the weights
    if not hasattr(zero, "fp16_partitioned_groups_flat"):
        names = [name for slot in layout.slots for name in slot.names]
        parameters = [parameter for group in zero.bit16_groups for parameter in group]
        for name, parameter in zip(names, parameters, strict=True):
            parameter.data.copy_(whole(name).view(parameter.shape))
        return
    # As DeepSpeed's own load does it: weights that stay gathered are laid down before and gathered again after.
    zero.checkpoint_event_prologue()
    for slot, flat, group in zip(
        layout.slots, zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
    ):
        flat.data.copy_(slot.flat)
        for part, value in zip(group, zero.unflatten(flat, group), strict=True):
            part.data = value.data
    zero.checkpoint_event_epilogue()
