"""When a run is saved, and what happens when that fails.

    every save_steps, at the end, and when a signal says so:  save()
    after the first step of this process:                     a probe, written, opened again and removed

The loop pays for a copy of the state; a thread of rank 0 writes it (run/checkpoint_writer.py). What fails there shows
after the next step. Where DeepSpeed or FSDP spread the state over the ranks, a thread of each rank writes its part of
the staged folder, and one of rank 0 commits the set. How far they are is agreed on after each step while a save is
under way, so that what fails on one rank is told by all after the same step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import DiskError, ExportError, RefusedError
from finetune.files import disk_errors
from finetune.run.checkpoint import begin, commit_parts, lay, staging_of, write
from finetune.run.checkpoint_own import Window, own_state, rng_state
from finetune.run.checkpoint_parts import is_by_number, snapshot_part
from finetune.run.checkpoint_state import adapter_config, places, snapshot, trained_weights
from finetune.run.checkpoint_tree import Copies
from finetune.run.checkpoint_wait import is_busy_anywhere, newest_known, together, until_written
from finetune.run.checkpoint_writer import Writer
from finetune.run.folder import RunFolder
from finetune.run.space import most_checkpoints, need_room

if TYPE_CHECKING:
    from finetune.run.checkpoint_state import Snapshot
    from finetune.run.trainer import Trainer

_SECONDS_AT_ONCE = 5.0  # how long a second signal waits for a write that goes on


@dataclass
class _Parts:
    """A save that all ranks take part in and that is under way.

    Attributes:
        target: the checkpoint's folder.
        step: optimizer steps made.
        keep: whether it stays.
        facts: what its manifest says, on rank 0.
        known: size and hash of what this rank has written; on rank 0, once all have, of all files.
        is_laid: whether every rank has written its part.
    """

    target: Path
    step: int
    keep: bool
    facts: dict[str, Any]
    known: dict[str, dict[str, Any]]
    is_laid: bool = False


class Saver(TrainerCallback):
    """The checkpoints of one run.

    Attributes:
        made_of: what the run is made of, for each manifest (run/resume.py compares it).
        on_error: whether a save that fails for want of disk ends the run.
        tell: told what the user should know and nothing else says.
        note: told while this rank waits for a disk: it has not hung.
        changed: whether the run goes on under a recipe that has changed.
        newest: the step of the newest checkpoint that is whole; None without any.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        self.made_of: dict[str, Any] = {}
        self.on_error: Literal["stop", "continue"] = "stop"
        self.tell: Callable[[str], None] = lambda line: None
        self.note: Callable[[], None] = lambda: None
        self.changed = False
        self.newest: int | None = None
        self._trainer = trainer
        self._folder = folder
        self._writer = Writer()
        self._copies = Copies()
        self._asked: int | None = None  # the step of the last save that was begun
        self._whole: set[Path] = set()
        self._probed = False  # whether the first write of this process was begun
        self._first = True  # whether the last write that was begun is that
        self._parts: _Parts | None = None
        self._begun: tuple[dict[str, Any], Window] | None = None  # what it alone knew before the step under way

    # -- when --------------------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Keep what the step changes before it can turn out not to be made."""
        self._begun = self._taken()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Raise what the last write failed with, and probe once, unless this very step is saved anyway."""
        if self._parts is not None:
            self._proceed(wait=False)
        elif not self._writer.busy:
            self._surface()
        if not self._probed and not control.should_save:
            self._save(keep=False)

    def continues(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`, which is not to be written again."""
        self.newest = self._asked = step

    def save(self, undone: bool = False) -> None:
        """Begin a checkpoint of this step; all ranks call it.

        Args:
            undone: the next step has begun, and will not be made: random numbers are those from before it.
        """
        if self._asked == self._trainer.state.global_step:
            return
        self._asked = self._trainer.state.global_step
        self._save(keep=True, undone=undone)

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk; all ranks call it, and know afterwards which one stands.

        Raises:
            DiskError: it could not be written, and training.on_save_error says stop; on all ranks.
        """
        if self._trainer.is_sharded:
            self._proceed(wait=True)
            return
        args = self._trainer.args
        self._wait()
        together(args, self._folder.checkpoints, self._surface)
        self.newest = newest_known(args, self.newest)

    def _wait(self) -> None:
        """Wait until no rank writes, which is neither a hang nor silent."""
        until_written(self._trainer.args, self._writer, self.note, self._tell_slow)

    def _tell_slow(self, seconds: float) -> None:
        self.tell(f"the disk is slow: {seconds:.0f} s were waited for a checkpoint to be written, and it goes on")

    def give_up(self, at_once: bool = False) -> None:
        """End this rank's write, after an error that the others may not have met: a set of parts stays incomplete.

        Args:
            at_once: give a write up that takes longer than a few seconds.
        """
        args = self._trainer.args
        # Others wait for this rank meanwhile, and would take it for hung before it has told them why it ends.
        allowed = args.ddp_timeout / 2 if args.world_size > 1 else None
        self._writer.wait(_SECONDS_AT_ONCE if at_once else allowed)
        if self._parts is None:
            self._surface()
        elif args.should_save:
            shutil.rmtree(staging_of(self._parts.target), ignore_errors=True)

    def insist(self, step: int) -> None:
        """Raise unless the checkpoint of `step` is whole: it is about to be named as where the run goes on.

        Raises:
            DiskError: it could not be written, whatever training.on_save_error says.
        """
        if self.newest != step:
            kept = f"checkpoint-{self.newest} is whole" if self.newest is not None else "there is no checkpoint"
            raise DiskError(f"stopped on request after step {step}, whose checkpoint could not be written; {kept}")

    def stands(self, step: int) -> str:
        """What there is of the state after `step`, whose save has ended, for a message."""
        if self.newest == step:
            return f"checkpoint-{step} holds the state before it"
        kept = f"checkpoint-{self.newest} is the newest" if self.newest is not None else "there is no checkpoint"
        return f"the state before it could not be saved; {kept}"

    def _surface(self) -> None:
        try:
            self._writer.raise_failure()
        except DiskError as error:
            self._failed(error)

    def _failed(self, error: DiskError) -> None:
        kept = f"checkpoint-{self.newest} is whole" if self.newest is not None else "there is no checkpoint yet"
        if self.on_error == "stop" or self._first:
            raise DiskError(f"{error} ({kept})") from error
        self.tell(f"a checkpoint could not be written: {error}. Training goes on; {kept}")

    # -- how ---------------------------------------------------------------------------------------------------------

    def _taken(self) -> tuple[dict[str, Any], Window]:
        """What this rank alone knows, now; no accelerator is waited for."""
        return rng_state(self._trainer.args.device), self._trainer.window()

    def _save(self, keep: bool, undone: bool = False) -> None:
        trainer = self._trainer
        mine = own_state(*(self._begun if undone and self._begun else self._taken()))
        began = time.monotonic()
        step = trainer.state.global_step
        target = self._folder.checkpoints / f"checkpoint-{step}"
        first, self._probed = not self._probed, True
        trainer.store_flos()
        if trainer.is_sharded:
            if self._parts is not None:
                self._proceed(wait=True)
            self._first = first
            self._begin_parts(target, keep, mine)
        else:
            self.finish()
            self._first = first
            ranks = self._gathered(step, mine)
            if trainer.args.should_save:
                where, config = self._places
                taken = snapshot(trainer, where, config, ranks, self._copies)
                taken.facts.update(self._facts(self._by_number))
                self._writer.start(functools.partial(self._write, taken, target, keep))
        trainer.not_training(time.monotonic() - began)

    @functools.cached_property
    def _places(self) -> tuple[dict[str, tuple[str, str]], bytes | None]:
        """Where each weight of a whole state goes, and adapter_config.json."""
        return places(self._trainer.model), adapter_config(self._trainer.model)

    def _write(self, taken: Snapshot, target: Path, keep: bool, go_on: Callable[[], None]) -> None:
        """Runs beside the training."""
        size = write(taken, target, go_on, keep)
        if keep:
            self.newest = taken.step
        self._settle(target, keep, size)

    def _settle(self, target: Path, keep: bool, size: int) -> None:
        """A checkpoint is on the disk: older ones go."""
        if keep:
            with disk_errors(target):
                self._whole.add(target)
                self._folder.rotate(self._trainer.args.save_total_limit, self._whole)
        if self._first:
            self._need_room(size)

    def _need_room(self, size: int) -> None:
        args, state = self._trainer.args, self._trainer.state
        ahead = math.ceil((state.max_steps - state.global_step) / max(1, int(args.save_steps)))
        need_room(self._folder, size, most_checkpoints(args.save_total_limit, args.eval_strategy != "no"), ahead)

    def _facts(self, by_number: bool) -> dict[str, Any]:
        """What the manifest says of the run."""
        trainer = self._trainer
        step = trainer.state.global_step
        here = [entry["eval_loss"] for entry in trainer.state.log_history if entry.get("step") == step
                and "eval_loss" in entry]  # fmt: skip
        finite = here and math.isfinite(here[-1])
        return {
            "bound": self._bound(by_number),
            "validation_loss": here[-1] if finite else None,
            "made_of": self.made_of,
        }

    def _bound(self, by_number: bool) -> list[str]:
        """What cannot differ when a run goes on from here, because the optimizer's state is tied to it."""
        if by_number and not self._trainer.args.fp16:  # a scaler of losses is each way's own
            return []
        return ["parallelism", "world_size"] if self._trainer.is_sharded and not by_number else ["parallelism"]

    @property
    def _by_number(self) -> bool:
        """Whether every rank's optimizer keeps a number beside each number; in parts all ranks ask at once."""
        if not self._trainer.is_sharded:
            with contextlib.suppress(RefusedError):
                return is_by_number(self._trainer.layout)
            return False
        mine = is_by_number(self._trainer.layout)
        odd = torch.tensor([0.0 if mine else 1.0], device=self._trainer.args.device)
        dist.all_reduce(odd, op=dist.ReduceOp.MAX)
        return not odd.item()

    def _gathered(self, step: int, mine: dict[str, Any]) -> list[Any]:
        """What every rank alone knows, after a look at whether all hold the same weights."""
        trainer = self._trainer
        if trainer.args.world_size == 1:
            return [mine]
        every: list[Any] = [None] * trainer.args.world_size
        dist.all_gather_object(every, (mine, _sums(trainer)))
        others = [rank for rank, (_, sums) in enumerate(every) if sums != every[0][1]]
        if others:
            raise RefusedError(
                f"step {step}: rank {', '.join(map(str, others))} holds other weights than rank 0, so that no "
                "checkpoint would be the run's; the last one stays. Report this, with the launcher's config"
            )
        return [state for state, _ in every]

    # -- states that are spread over ranks ---------------------------------------------------------------------------

    def _begin_parts(self, target: Path, keep: bool, mine: dict[str, Any]) -> None:
        """Copy what this rank holds, and begin to write it."""
        trainer = self._trainer
        parts = _Parts(target, trainer.state.global_step, keep, {}, {})
        try:
            by_number = self._by_number
            taken = snapshot_part(trainer, trainer.layout, by_number, mine, self._copies)
            parts.facts = self._facts(by_number)
            together(trainer.args, target, functools.partial(begin, target) if trainer.args.should_save else None)
            together(trainer.args, target, functools.partial(_see, target))
        except DiskError as error:
            self._failed(error)
            return

        def write_part(go_on: Callable[[], None]) -> None:
            with disk_errors(target):
                parts.known = lay(taken, staging_of(target), go_on)

        self._parts = parts
        self._writer.start(write_part)

    def _proceed(self, wait: bool) -> None:
        """Find out together how far the save is, and take the next step of it; with `wait`, all of them.

        Raises:
            DiskError: a rank could not write, and training.on_save_error says stop.
        """
        args = self._trainer.args
        while (parts := self._parts) is not None:
            if not wait and is_busy_anywhere(args, self._writer):
                return
            self._wait()
            try:
                together(args, parts.target, self._writer.raise_failure)
                if not parts.is_laid:
                    self._commit(parts)
                    continue
            except DiskError as error:
                self._parts = None
                if args.should_save:
                    shutil.rmtree(staging_of(parts.target), ignore_errors=True)
                self._failed(error)
                return
            self._parts = None
            self.newest = parts.step if parts.keep else self.newest

    def _commit(self, parts: _Parts) -> None:
        """All parts are on the disk: rank 0 completes the folder, beside the training."""
        every: list[Any] = [None] * self._trainer.args.world_size
        dist.all_gather_object(every, parts.known)
        parts.is_laid = True
        if self._trainer.args.should_save:
            parts.known = {name: told for known in every for name, told in known.items()}
            self._writer.start(lambda go_on: self._complete(parts))

    def _complete(self, parts: _Parts) -> None:
        size = commit_parts(parts.target, parts.step, parts.facts, parts.known, parts.keep)
        self._settle(parts.target, parts.keep, size)


def _see(target: Path) -> None:
    """Raise unless this process sees the folder that rank 0 has made."""
    if not staging_of(target).is_dir():
        raise ExportError(
            f"{target}: what rank 0 makes there is not to be seen by other processes; output_dir must lie on a disk "
            "that all machines share"
        )


def _sums(trainer: Trainer) -> list[int]:
    """A sum over the bits of each trained weight, which differs where one bit does; cheap on an accelerator."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [parameter.detach().contiguous() for parameter in trained_weights(trainer.model).values()]
    sums = [weight.view(words[weight.element_size()]).sum(dtype=torch.int64) for weight in weights]
    return torch.stack(sums).tolist()
