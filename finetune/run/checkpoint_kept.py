"""What a checkpoint knows of each trained weight, whoever wrote it, put where this process holds it.

See run/checkpoint_parts.py for the files of a state that is spread over processes; run/checkpoint_state.py for those of
one that each process holds whole, from which a spread one can go on, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.errors import RefusedError
from finetune.run.checkpoint_parts import count_of, has_numbers
from finetune.run.checkpoint_state import STATE_TENSORS, WEIGHT, read_state, refuse_other_weights
from finetune.run.checkpoint_tree import rebuild
from finetune.run.slots import Layout, Slot, plain, take_up
from finetune.run.spread import all_or_none

if TYPE_CHECKING:
    from finetune.run.trainer import Trainer


def has_parts(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by processes that each held a part."""
    return "parts" in read_state(checkpoint)


class Kept:
    """What a checkpoint knows of each trained weight, whoever wrote it; its files are open while the block runs.

    Attributes:
        shapes: of the weights, by name.
        common: groups, schedule, scalers.
    """

    def __init__(self, checkpoint: Path) -> None:
        """
        Args:
            checkpoint: verified.

        Raises:
            RefusedError: its optimizer's state goes by another key than the weights' names.
        """
        stated = read_state(checkpoint)
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        self._counts: dict[str, dict[str, Any]] = {}
        self._files = ExitStack()
        self._opened: dict[Path, Any] = {}
        if "parts" in stated:
            self.common: dict[str, Any] = rebuild(stated["state"], {})
            self.shapes = {name: tuple(shape) for name, shape in stated["trained"].items()}
            names = stated["names"]
            for rank in range(stated["parts"]):
                self._read_part(checkpoint, rank)
        else:
            self._read_whole(checkpoint, stated)
            names = stated["names"]
        self._numbers = {
            plain(name): numbers for group, numbers in zip(names, self.common["groups"], strict=True) for name in group
        }
        self._kinds: dict[str, list[str]] = {}
        for name, kind in self._pieces:
            if kind != WEIGHT:
                self._kinds.setdefault(name, []).append(kind)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.clear()
        self._files.close()

    def _file(self, path: Path) -> Any:
        """An open safetensors file; a header of thousands of names is read once."""
        if path not in self._opened:
            self._opened[path] = self._files.enter_context(safe_open(path, framework="pt"))
        return self._opened[path]

    def _read_part(self, checkpoint: Path, rank: int) -> None:
        facts = json.loads((checkpoint / f"part-{rank}.json").read_text(encoding="utf-8"))
        self._counts |= facts["counts"]
        file = checkpoint / f"part-{rank}.safetensors"
        for key in self._file(file).keys():  # noqa: SIM118 - it is no mapping
            kind, _, name = key.partition("/")
            if kind != "own":
                self._pieces.setdefault((name, kind), []).append((*facts["pieces"][name], file, key))

    def _read_whole(self, checkpoint: Path, stated: dict[str, Any]) -> None:
        """A checkpoint of processes that each hold the whole state."""
        tree = stated["state"]
        if tree["optimizer"] is None:
            raise RefusedError(f"{checkpoint}: its optimizer's state is read only by runs of the way that wrote it")
        state = {int(key): value for key, value in _pairs(tree["optimizer"]["state"])}
        self.common = {
            "groups": [
                {key: value for key, value in rebuild(group, {}).items() if key != "params"}
                for group in tree["optimizer"]["param_groups"]
            ],
            "schedule": rebuild(tree["schedule"], {}),
            "scaler": None,
        }
        self.shapes = {}
        order = [plain(name) for group in stated["names"] for name in group]
        tensors = checkpoint / STATE_TENSORS
        for name, (file, key) in stated["weights"].items():
            shape = tuple(self._file(checkpoint / file).get_slice(key).get_shape())
            self.shapes[plain(name)] = shape
            self._pieces[(plain(name), WEIGHT)] = [(0, math.prod(shape), checkpoint / file, key)]
        for number, entries in state.items():
            name = order[number]
            for kind, value in entries.items():
                if not isinstance(value, dict):
                    self._counts.setdefault(name, {})[kind] = value
                    continue
                key = value["$tensor"]
                if shape := self._file(tensors).get_slice(key).get_shape():
                    self._pieces[(name, kind)] = [(0, math.prod(shape), tensors, key)]
                else:
                    self._counts.setdefault(name, {})[kind] = count_of(self._file(tensors).get_tensor(key))

    def kinds(self, names: tuple[str, ...]) -> list[str]:
        """What the optimizer knows beside the numbers of any of these weights."""
        return list(dict.fromkeys(kind for name in names for kind in self._kinds.get(name, ())))

    def counts(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The steps of these weights, of which `refuse_unequal` has seen that all have made equally many."""
        return next((self._counts[name] for name in names if name in self._counts), {})

    def refuse_unequal(self, names: tuple[str, ...]) -> None:
        """Weights that one tensor of the optimizer holds together share its count of steps.

        Raises:
            RefusedError: some have made more steps than others, as experts that got no token in some of them.
        """
        made = {json.dumps(self._counts[name], sort_keys=True): name for name in names if self._counts.get(name)}
        if len(made) > 1:
            one, other, *_ = made.values()
            raise RefusedError(
                f"parallelism: {one} and {other} have made different numbers of steps, which ZeRO cannot tell apart; "
                "go on in the mode that wrote the checkpoint, or in DDP or FSDP2"
            )

    def numbers(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What the group of these weights stood at: rate, decay and the like."""
        return self._numbers[names[0]]

    def fill(self, into: Tensor, name: str, kind: str, start: int) -> None:
        """Put a run of numbers into a tensor (N,).

        Args:
            into: of any device; what is read is cast to its precision.
            name: of the weight.
            kind: WEIGHT, or one of `kinds`.
            start: of the run in the whole weight.

        Raises:
            RefusedError: the checkpoint does not hold all of it.
        """
        end, missing = start + into.numel(), into.numel()
        for first, count, file, key in self._pieces.get((name, kind), ()):
            low, high = max(start, first), min(end, first + count)
            if low < high:
                piece = self._file(file).get_slice(key)
                found = piece if len(piece.get_shape()) == 1 else self._file(file).get_tensor(key).view(-1)
                into[low - start : high - start].copy_(found[low - first : high - first])
                missing -= high - low
        if missing > 0:
            raise RefusedError(f"{name}: {missing} numbers of its {kind} are in no part of the checkpoint")


def _pairs(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The items of a dict as `flatten` writes it."""
    yield from (tree["$pairs"] if "$pairs" in tree else tree.items())


def restore_parts(trainer: Trainer, layout: Layout, checkpoint: Path, same: bool) -> None:
    """Put a checkpoint's state where this process holds it; all processes call it.

    Args:
        trainer: with its model and optimizer wrapped, and its schedule made.
        layout: of the trainer.
        checkpoint: verified.
        same: whether it was written in the same mode by as many processes.

    Raises:
        RefusedError: it is of other weights, or its optimizer's state cannot be laid out so.
    """
    own = _own(checkpoint, trainer.args.process_index) if same else None
    own = own and _beside(own, layout.slots)
    with Kept(checkpoint) as kept, torch.no_grad():
        refuse_other_weights(checkpoint, kept.shapes, layout.shapes)
        for slot in layout.slots if own is None else ():
            kept.refuse_unequal(slot.names)
        with all_or_none(trainer.args.device):
            for number, slot in enumerate(layout.slots):
                for piece in slot.pieces:
                    kept.fill(slot.flat.narrow(0, piece.offset, piece.count), piece.name, WEIGHT, piece.start)
                state = own[number] if own is not None else _state_of(slot, kept, layout.optimizer)
                if state:
                    layout.optimizer.state[slot.key] = state
        take_up(layout, lambda name: _whole(kept, name))
        for slot in layout.slots:
            group = layout.optimizer.param_groups[slot.group]
            group.update({key: value for key, value in kept.numbers(slot.names).items() if same or key in group})
        trainer.lr_scheduler.load_state_dict(_schedule(kept, layout, same))
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and kept.common["scaler"] is not None:
            scaler.load_state_dict(kept.common["scaler"])


def _schedule(kept: Kept, layout: Layout, same: bool) -> dict[str, Any]:
    """The schedule's state; some ways of sharing leave groups without parameters out, others do not."""
    state = dict(kept.common["schedule"])
    if not same:
        groups = layout.optimizer.param_groups
        state["base_lrs"] = [group["initial_lr"] for group in groups]
        state["_last_lr"] = [group["lr"] for group in groups]
        state["lr_lambdas"] = [None] * len(groups)
    return state


def _whole(kept: Kept, name: str) -> Tensor:
    weight = torch.empty(math.prod(kept.shapes[name]), dtype=torch.float32)
    kept.fill(weight, name, WEIGHT, 0)
    return weight


def _state_of(slot: Slot, kept: Kept, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for kind in kept.kinds(slot.names):
        # Padding between the pieces of a flat tensor stays zero, and what the optimizer had not begun to step.
        flat = torch.zeros_like(slot.flat)
        for piece in slot.pieces:
            if kind in kept.kinds((piece.name,)):
                kept.fill(flat.narrow(0, piece.offset, piece.count), piece.name, kind, piece.start)
        state[kind] = slot.laid(flat)
    group = optimizer.param_groups[slot.group]
    for name, value in kept.counts(slot.names).items():
        if isinstance(value, Mapping):
            # Where torch's optimizers expect their count of steps: torch.optim.Optimizer.load_state_dict.
            device = slot.flat.device if group.get("capturable") or group.get("fused") else torch.device("cpu")
            value = torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]), device=device)
        state[name] = value
    return state


def _own(checkpoint: Path, rank: int) -> list[dict[str, Any]] | None:
    """The state of an optimizer that was kept as the process had it."""
    path = checkpoint / f"part-{rank}.json"
    tree = json.loads(path.read_text(encoding="utf-8")).get("own") if path.is_file() else None
    if tree is None:
        return None
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as opened:
        names = [key for key in opened.keys() if key.startswith("own/")]  # noqa: SIM118 - it is no mapping
        tensors = {key.removeprefix("own/"): opened.get_tensor(key) for key in names}
    states: list[dict[str, Any]] = rebuild(tree, tensors)
    return states


def _beside(states: list[dict[str, Any]], slots: tuple[Slot, ...]) -> list[dict[str, Any]]:
    """The same with its tensors where the weights are; counts of steps stay in the host's memory."""
    return [
        {name: one.to(slot.flat.device) if has_numbers(one) else one for name, one in state.items()}
        for state, slot in zip(states, slots, strict=True)
    ]
