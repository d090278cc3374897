"""What a run must know to go on to the same bits: trained weights, optimizer, schedule, scaler, random numbers.

A checkpoint folder:

    adapter_model.safetensors   what is trained of an adapter, under PEFT's names, so that plain PEFT loads it
    adapter_config.json         PEFT's configuration
    trained.safetensors         trained weights that PEFT's file has no name for; all of them in full fine-tuning
    state.json                  optimizer, schedule, scaler, random numbers of every rank, and which weight stands where
    state.safetensors           the tensors of that
    trainer_state.json          the trainer's own: step, epoch, log
    optimizer.pt                in place of the optimizer's part, where it keeps what the two cannot hold
    manifest.json               size and hash of every file, what the run was made of, and a seal

Where the state is spread over the processes the files are those of run/checkpoint_parts.py. The frozen base is in none
of them. The manifest's hashes are checked before anything is read.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from finetune.errors import EnvironmentFault, RefusedError
from finetune.run.checkpoint_tree import Copies, Unfit, flatten, json_bytes, rebuild

if TYPE_CHECKING:
    from finetune.run.trainer import Trainer

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINED = "trained.safetensors"
STATE, STATE_TENSORS = "state.json", "state.safetensors"
TRAINER_STATE = "trainer_state.json"
FOREIGN = "optimizer.pt"
WEIGHT = "weight"  # before the names of weights in the file of a part


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the host's memory, apart from the model: training may go on while it is written.

    Attributes:
        step: optimizer steps made.
        tensors: by file; contiguous, on the CPU.
        plain: the content of other files, by file.
        facts: what the manifest says.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    plain: dict[str, bytes]
    facts: dict[str, Any] = field(default_factory=dict)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def places(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The file and the name in it of every trained weight, by its name in the model."""
    named: dict[int, str] = {}
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)  # auto might ask the hub
        named = {tensor.data_ptr(): key for key, tensor in state.items() if tensor.numel()}
    found = {}
    for name, parameter in trained_weights(model).items():
        key = named.get(parameter.data_ptr())
        found[name] = (TRAINED, name) if key is None else (ADAPTER, key)
    return found


def adapter_config(model: nn.Module) -> bytes | None:
    """adapter_config.json as PEFT writes it for a finished adapter; None without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapter]
    with tempfile.TemporaryDirectory() as folder:
        dataclasses.replace(config, inference_mode=True).save_pretrained(folder)
        return (Path(folder) / ADAPTER_CONFIG).read_bytes()


def snapshot(
    trainer: Trainer, where: Mapping[str, tuple[str, str]], config: bytes | None, ranks: list[Any], copies: Copies
) -> Snapshot:
    """Copy the state of a run between two steps.

    Args:
        trainer: of the run.
        where: from `places`.
        config: from `adapter_config`.
        ranks: what every rank alone knows (run/checkpoint_own.py), rank 0 first.
        copies: makes the copies; those of the last snapshot are given up.

    Raises:
        EnvironmentFault: the optimizer keeps something that could not be read again safely.
    """
    copies.begin()
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, parameter in trained_weights(trainer.model).items():
        file, key = where[name]
        tensors.setdefault(file, {})[key] = copies(parameter.detach())
    scaler = getattr(trainer.accelerator, "scaler", None)
    whole = {
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    plain: dict[str, bytes] = {}
    optimizer = trainer.optimizer.state_dict()
    try:
        tree, held = flatten({**whole, "optimizer": optimizer}, copies)
    except Unfit:
        tree, held = flatten({**whole, "optimizer": None}, copies)
        plain[FOREIGN] = _foreign(optimizer, trainer.args.optim)
    if held:
        tensors[STATE_TENSORS] = held
    if config is not None:
        plain[ADAPTER_CONFIG] = config
    weights = {name: list(place) for name, place in where.items()}
    called = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    names = [[called.get(id(one), "") for one in group["params"]] for group in trainer.optimizer.param_groups]
    stated = {"weights": weights, "names": names, "state": tree, "ranks": flatten(ranks, copies)[0]}
    plain[STATE] = json_bytes(stated)
    plain[TRAINER_STATE] = trainer_state(trainer)
    return Snapshot(trainer.state.global_step, tensors, plain)


def trainer_state(trainer: Trainer) -> bytes:
    """The file from which the training loop takes its step, its epoch and its log."""
    return (json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n").encode("utf-8")


def _foreign(optimizer: dict[str, Any], name: Any) -> bytes:
    """An optimizer's state of kinds of its own, as torch saves it, if torch can read it again without running code."""
    stream = io.BytesIO()
    try:
        torch.save(optimizer, stream)
        stream.seek(0)
        torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle, torch and the optimizer's own classes raise
        raise EnvironmentFault(
            f"training.optim: {getattr(name, 'value', name)} keeps state that cannot be read again without running its "
            f"code ({str(error).splitlines()[0]}), so that its checkpoints would be of no use; take adamw_torch"
        ) from error
    return stream.getvalue()


def restore_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the model, in the precision they have; nothing is cast.

    Args:
        model: as it was built, not wrapped.
        checkpoint: verified.

    Raises:
        RefusedError: they are not the weights that this model trains.
    """
    trained = trained_weights(model)
    where = {name: tuple(place) for name, place in read_state(checkpoint)["weights"].items()}
    faults = _odd(where.keys(), trained.keys())
    found: dict[str, Tensor] = {}
    for file in sorted({file for file, _ in where.values()}):
        with safe_open(checkpoint / file, framework="pt") as opened:
            for name in (name for name in where.keys() & trained.keys() if where[name][0] == file):
                tensor, now = opened.get_tensor(where[name][1]), trained[name]
                if (tensor.shape, tensor.dtype) == (now.shape, now.dtype):
                    found[name] = tensor
                else:
                    kinds = [f"{one.dtype} {tuple(one.shape)}".removeprefix("torch.") for one in (tensor, now)]
                    faults.append(f"  {name}: {kinds[0]} in the checkpoint, {kinds[1]} now")
    _refuse(checkpoint, faults)
    with torch.no_grad():
        for name, tensor in found.items():
            trained[name].copy_(tensor)


def _odd(kept: Collection[str], trained: Collection[str]) -> list[str]:
    """The weights that are trained on one side only."""
    faults = [f"  {name}: trained now, not in the checkpoint" for name in sorted(set(trained) - set(kept))]
    return faults + [f"  {name}: in the checkpoint, not trained now" for name in sorted(set(kept) - set(trained))]


def _refuse(checkpoint: Path, faults: list[str]) -> None:
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise RefusedError(
            f"{checkpoint}: its weights are not those that this recipe trains, so it cannot be continued:\n"
            + "\n".join(faults[:10]) + more
            + "\nUndo the change of the adapter or the base, choose another output_dir, or pass --overwrite"
        )  # fmt: skip


def refuse_other_weights(
    checkpoint: Path, kept: Mapping[str, tuple[int, ...]], trained: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the shapes of the weights in a checkpoint with those that are trained, by name.

    Raises:
        RefusedError: they differ.
    """
    faults = _odd(kept.keys(), trained.keys())
    for name in sorted(kept.keys() & trained.keys()):
        if kept[name] != trained[name]:
            faults.append(f"  {name}: {kept[name]} in the checkpoint, {trained[name]} now")
    _refuse(checkpoint, faults)


def restore_state(trainer: Trainer, checkpoint: Path) -> None:
    """Put back what optimizer, schedule and scaler knew.

    Args:
        trainer: with its optimizer and schedule made.
        checkpoint: verified.
    """
    state = _state(checkpoint)
    kept = state["optimizer"]
    if kept is None:
        kept = torch.load(checkpoint / FOREIGN, map_location="cpu", weights_only=True)
    trainer.optimizer.load_state_dict(kept)
    trainer.lr_scheduler.load_state_dict(state["schedule"])
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])


@dataclass(frozen=True)
class Numbers:
    """What the recipe says of each group of parameters, as it stands before a checkpoint is loaded over it.

    Attributes:
        groups: of the optimizer, in its order, without the parameters.
        rates: the learning rate of each that the schedule multiplies.
    """

    groups: list[dict[str, Any]]
    rates: list[float]

    @classmethod
    def of(cls, optimizer: Any, schedule: Any) -> Numbers:
        """Taken of an optimizer, or DeepSpeed's or Accelerate's wrapper of one, and its schedule, both just made."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return cls(groups, list(getattr(schedule, "base_lrs", [])))

    def count_again(self, optimizer: Any, schedule: Any) -> None:
        """Put them back after the load: the recipe has changed and that was accepted, so its numbers count."""
        assert isinstance(schedule, LambdaLR), "every schedule that a recipe can name is one"
        for group, now in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(now)
        schedule.base_lrs = list(self.rates)
        for group, rate, factor in zip(optimizer.param_groups, self.rates, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    value: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return value


def _state(checkpoint: Path) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    if (checkpoint / STATE_TENSORS).is_file():
        with safe_open(checkpoint / STATE_TENSORS, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    state: dict[str, Any] = rebuild(read_state(checkpoint)["state"], tensors)
    return state
