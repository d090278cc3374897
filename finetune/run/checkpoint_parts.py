"""Checkpoints of a state that is spread over the processes: each writes the pieces it holds, under the weights' names.

    part-R.safetensors      what rank R holds: weight/NAME, and exp_avg/NAME and its like, each a run of numbers (N,)
    part-R.json             where each run begins in its weight; the steps of each; the random numbers of the rank
    state.json              what is trained, the groups of parameters, schedule and scaler
    adapter_model.safetensors, adapter_config.json, trainer_state.json: as in a checkpoint of one process

Since places are those of whole weights, any number of processes in any mode can go on from such a folder, and from one
of a single process: whoever needs a run of numbers reads it, from as many files as hold some of it. Weights stand in
the precision in which the optimizer steps them, so nothing is rounded on the way.

An optimizer whose state is no number beside each number of the weight (8-bit moments share scales among their
neighbours) is kept as this process has it, and only the same mode on as many processes can go on from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from finetune.errors import EnvironmentFault, ExportError
from finetune.run.checkpoint_state import (
    ADAPTER,
    ADAPTER_CONFIG,
    STATE,
    TRAINER_STATE,
    WEIGHT,
    Snapshot,
    adapter_config,
    trainer_state,
)
from finetune.run.checkpoint_tree import Copies, Unfit, flatten, json_bytes
from finetune.run.slots import Layout, Slot, local, plain
from finetune.run.spread import whole_weights

if TYPE_CHECKING:
    from finetune.run.trainer import Trainer

_COUNTED = frozenset({"step"})  # what an optimizer may keep beside tensors of the weight's size


def is_by_number(layout: Layout) -> bool:
    """Whether the optimizer's state is a number beside each number of the weights, and a count of steps."""
    return all(
        _is_beside(slot, value) if isinstance(value, Tensor) and value.ndim else name in _COUNTED
        for slot in layout.slots
        for name, value in layout.optimizer.state.get(slot.key, {}).items()
    )


def _is_beside(slot: Slot, value: Tensor) -> bool:
    return local(value).numel() == slot.flat.numel() and value.is_floating_point() and value.element_size() > 1


def snapshot_part(
    trainer: Trainer, layout: Layout, by_number: bool, own_state: dict[str, Any], copies: Copies
) -> Snapshot:
    """Copy what this process holds between two steps; all processes call it, for the adapter is brought together.

    Args:
        trainer: of the run.
        layout: of the trainer.
        by_number: whether `is_by_number` holds on all processes.
        own_state: what this process alone knows (run/checkpoint_own.py).
        copies: makes the copies; those of the last snapshot are given up.

    Raises:
        EnvironmentFault: the optimizer keeps something that could not be read again safely.
    """
    copies.begin()
    args = trainer.args
    held: dict[str, Tensor] = {}
    counts: dict[str, Any] = {}
    for slot in layout.slots:
        state = layout.optimizer.state.get(slot.key, {}) if by_number else {}
        beside = {WEIGHT: slot.flat} | {name: local(one) for name, one in state.items() if has_numbers(one)}
        held |= {
            f"{kind}/{piece.name}": copies(value.reshape(-1).narrow(0, piece.offset, piece.count))
            for kind, value in beside.items()
            for piece in slot.pieces
        }
        plain_values = {name: count_of(one) for name, one in state.items() if not has_numbers(one)}
        counts |= dict.fromkeys(slot.names, plain_values) if plain_values else {}
    own = None
    if not by_number:
        own, more = _as_it_is(layout, args.optim, copies)
        held |= {f"own/{name}": value for name, value in more.items()}
    facts = {
        "pieces": {piece.name: [piece.start, piece.count] for slot in layout.slots for piece in slot.pieces},
        "counts": counts,
        "own": own,
        "random": flatten(own_state, copies)[0],
    }
    rank = args.process_index
    tensors = {f"part-{rank}.safetensors": held}
    written = {f"part-{rank}.json": json_bytes(facts)}
    adapter = _adapter(trainer, layout)
    if args.should_save:
        if adapter is not None:
            tensors[ADAPTER] = adapter
            written[ADAPTER_CONFIG] = adapter_config(trainer.model) or b""
        written[STATE] = json_bytes(_same_for_all(trainer, layout))
        written[TRAINER_STATE] = trainer_state(trainer)
    return Snapshot(trainer.state.global_step, tensors, written)


def has_numbers(value: Any) -> bool:
    """Whether an optimizer keeps a tensor there, and no count."""
    return isinstance(value, Tensor) and value.ndim > 0


def count_of(value: Any) -> Any:
    """A count of steps, and whether the optimizer has it as a tensor."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
    return value


def _as_it_is(layout: Layout, name: Any, copies: Copies) -> tuple[Any, dict[str, Tensor]]:
    """The state of an optimizer that does not go by number, slot by slot."""
    states = [dict(layout.optimizer.state.get(slot.key, {})) for slot in layout.slots]
    try:
        return flatten(states, copies)
    except Unfit as error:
        raise EnvironmentFault(
            f"training.optim: {getattr(name, 'value', name)} keeps state of which no checkpoint can be made where the "
            f"state is shared by processes ({error}); take adamw_torch"
        ) from error


def _adapter(trainer: Trainer, layout: Layout) -> dict[str, Tensor] | None:
    """The trained weights of the adapter, whole, under PEFT's names, on rank 0; None without an adapter."""
    model = trainer.model
    if not isinstance(model, PeftModel):
        return None
    trainer.rest()
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    whole = whole_weights(named, keep=trainer.args.should_save)
    if not trainer.args.should_save:
        return None
    refuse_unfit(whole, layout.shapes)
    state = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def refuse_unfit(whole: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Weights that were brought together must have their shapes: upstream may give empty tensors, or fewer, unsaid.

    Raises:
        ExportError: they have not.
    """
    found = {plain(name): tuple(tensor.shape) for name, tensor in whole.items()}
    odd = sorted(name for name, shape in shapes.items() if found.get(name) != shape)
    if odd:
        raise ExportError(
            f"{len(odd)} of {len(shapes)} trained weights could not be brought together, as {odd[0]}: "
            f"{found.get(odd[0], 'missing')} instead of {shapes[odd[0]]}; report this"
        )


def _same_for_all(trainer: Trainer, layout: Layout) -> dict[str, Any]:
    """What is the same for all processes."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    whole = {
        "groups": [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in layout.optimizer.param_groups
        ],
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    names: list[list[str]] = [[] for _ in layout.optimizer.param_groups]
    for slot in layout.slots:
        names[slot.group] += slot.names
    return {
        "parts": trainer.args.world_size,
        "trained": {name: list(shape) for name, shape in layout.shapes.items()},
        "names": names,
        "state": flatten(whole, lambda tensor: tensor)[0],
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
