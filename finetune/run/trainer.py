"""TRL's SFTTrainer with a loss over the trained tokens, exact validation, whole checkpoints and a guard on numbers.

The loop, the optimizer, the scheduler and the devices are the trainer's and Accelerate's. What is ours: which rows a
step takes and how processes share them (a step is the same on any number of them, also the short last one of an epoch),
the loss (TRL's goes over every token on a CPU and measures entropy and accuracy each step), the validation loss (a mean
over tokens, not over batches), checkpoints that appear whole or not at all, and the refusal to go on with NaN.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerControl, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from trl import SFTTrainer

from finetune.compat import lay_out_buckets_once
from finetune.errors import DiskError, NonFiniteError, RecipeError
from finetune.files import MANIFEST, existing_parent
from finetune.run.checkpoint_kept import has_parts, restore_parts
from finetune.run.checkpoint_own import Window, own_states, restore_rng, window_of
from finetune.run.checkpoint_saver import Saver
from finetune.run.checkpoint_state import Numbers, restore_state, restore_weights
from finetune.run.folder import RunFolder, read_json
from finetune.run.loss import IGNORED, TrainedTokenLoss
from finetune.run.micro_batches import Documents, MicroBatches, RowCollator, Schedule, StepLoader
from finetune.run.resume import WHOLE
from finetune.run.slots import Layout, layout_of
from finetune.run.spread import partition, widened_as_sharded


class Trainer(SFTTrainer):
    """The training loop of a run.

    Attributes:
        folder: the run's folder.
        saver: writes its checkpoints.
    """

    control: TrainerControl  # untyped upstream

    def __init__(
        self,
        *,
        folder: RunFolder,
        collate: RowCollator,
        train: Schedule,
        validation: Schedule | None,
        **arguments: Any,
    ) -> None:
        """
        Args:
            folder: the run's folder.
            collate: makes batches of documents.
            train: what is trained, in its order.
            validation: what the loss is measured on; None without any.
            arguments: SFTTrainer's own, but for its data sets.
        """
        before = existing_parent(folder.checkpoints)
        given = arguments["model"].named_parameters() if hasattr(arguments["model"], "peft_config") else ()
        adapter = {name: p.detach().clone() for name, p in given if p.requires_grad}
        shown = Dataset.from_dict({"input_ids": [[0]], "labels": [[IGNORED]]})  # it insists on one, and looks at it
        arguments |= {"train_dataset": shown, "eval_dataset": shown if validation else None}
        super().__init__(data_collator=collate, **arguments)
        self.folder = folder
        self._train, self._validation = train, validation
        self.saver = Saver(self, folder)
        self.add_callback(self.saver)
        self._leave_no_folder(before)
        self._refuse_unusable_settings()
        self.model_accepts_loss_kwargs = True  # count trained tokens for every model: the loss is ours, not the model's
        self._restore(adapter)
        self._loraplus_lr_ratio: float | None = None
        with self._attending_anywhere():
            self._loss = TrainedTokenLoss(self.model, sharded=self.spreads)
        self._spread()
        self._seen = torch.zeros(2, dtype=torch.float64)  # tokens, trained tokens since the last log, this rank
        self._logged_at = time.monotonic()
        self._micro_losses: list[Tensor] = []
        self._origins: list[str] = []

    def _leave_no_folder(self, before: Path) -> None:
        """The stock trainer has made its folder below `before`; a start that fails later must leave nothing."""
        made = self.folder.checkpoints.absolute()
        while self.args.should_save and made != before:
            with contextlib.suppress(OSError):  # another run's start has put something there meanwhile
                made.rmdir()
            made = made.parent

    def _refuse_unusable_settings(self) -> None:
        """An optimizer whose package is missing, or arguments it does not take, would show after the run has begun."""
        try:
            self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except (ImportError, ValueError, TypeError, AssertionError) as error:
            raise RecipeError(f"training.optim: {self.args.optim.value} cannot be used here: {error}") from error
        try:
            schedule = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            get_scheduler(self.args.lr_scheduler_type, schedule, 0, 1, self.args.lr_scheduler_kwargs)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"training.extra.lr_scheduler_kwargs: {error}") from error

    @property
    def is_sharded(self) -> bool:
        """Whether optimizer state, gradients or weights are spread over ranks, in a wrapper that is not DDP."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def parallelism(self) -> str:
        """How the state lies on the processes, in words that stay the same from run to run."""
        if self.is_fsdp_enabled:
            return "FSDP"
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return f"DeepSpeed ZeRO-{plugin.zero_stage}" if plugin else WHOLE

    @property
    def spreads(self) -> bool:
        """Whether each process holds, or will hold, only a part of each weight: ZeRO-3, FSDP2."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return bool(self.is_fsdp_enabled or (plugin and plugin.zero_stage == 3))

    @property
    def _trains_all(self) -> bool:
        """Whether the base itself is trained, whose weights are float32, in whatever dtype they were mapped."""
        return not hasattr(self.model, "peft_config")

    @contextlib.contextmanager
    def _attending_anywhere(self) -> Iterator[None]:
        """Weights that are yet to be spread lie in the host's memory, where kernels for accelerators do not run."""
        own = str(self.model.config._attn_implementation)
        if not self.spreads:
            yield
            return
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(own)

    def _spread(self) -> None:
        """Lay the weights over the processes now where DeepSpeed would otherwise move all of them to each device."""
        if self.spreads:
            # Autocast would keep a 16-bit copy of each trained weight until the whole forward pass has ended.
            torch.set_autocast_cache_enabled(False)
        if self.is_deepspeed_enabled and self.spreads:
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.hf_ds_config.trainer_config_finalize(self.args, self.model, 0)  # sizes of buckets
            partition(self.model, plugin.hf_ds_config.config, self._trains_all)
        if self.is_fsdp_enabled:
            # Accelerate would have FSDP add up gradients in bfloat16. Autocast alone is what every other mode does.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def rest(self) -> None:
        """Let the weights that ZeRO-3 gathers in advance arrive, and lay them down: in flight they cannot be read."""
        if self.is_deepspeed_enabled and self.spreads:
            self.model_wrapped.empty_partition_cache()

    def _restore(self, adapter: dict[str, Tensor]) -> None:
        """Undo TRL's cast of a quantised base's adapter to bfloat16, which rounds it and freezes small updates.

        Args:
            adapter: its trained weights by name, as they were.
        """
        for name, parameter in self.model.named_parameters():
            if name in adapter:
                parameter.data = adapter[name].to(parameter.device)

    # -- optimizer -----------------------------------------------------------------------------------------------

    def use_loraplus(self, ratio: float) -> None:
        """Let the B matrices learn `ratio` times faster than the learning rate, which is that of A (LoRA+).

        Raises:
            RecipeError: the optimizer makes its own groups of parameters.
        """
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & arguments.keys():
            raise RecipeError(
                f"adapter.loraplus_lr_ratio: {self.args.optim.value} makes groups of parameters of its own; take "
                "another training.optim, as adamw_torch, or remove one of the two"
            )
        self._loraplus_lr_ratio = ratio

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The stock trainer's, whose groups of parameters are split in two for LoRA+: A, and B with magnitudes.

        By name, since PEFT's own grouping asks for dimensions, of which a weight in parts (ZeRO-3) has only one.
        """
        is_first = getattr(self, "optimizer", None) is None  # under DeepSpeed it is asked for twice
        made: torch.optim.Optimizer = super().create_optimizer(model)
        if self._loraplus_lr_ratio is None or not is_first:
            return made
        named = (self.model if model is None else model).named_parameters()
        faster = {id(p) for name, p in named if "lora_B" in name or "lora_magnitude_vector" in name}
        split = [
            {**group, "params": params, "lr": group["lr"] * (self._loraplus_lr_ratio if fast else 1.0)}
            for group in made.param_groups
            for fast in (False, True)
            if (params := [p for p in group["params"] if (id(p) in faster) is fast])
        ]
        made.param_groups[:] = split  # there is no state yet
        return made

    def steps_in_all(self) -> int:
        """The optimizer steps of the whole run, which are known before it begins."""
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return int(steps or 0)

    # -- batches -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Micro-batches of this process. Accelerate, which would deal rows out its own way, is not asked to."""
        args = self.args
        most = args.per_device_train_batch_size
        shape = (args.process_index, args.world_size, args.gradient_accumulation_steps, most)
        return StepLoader(
            Documents(self._train),
            batch_sampler=MicroBatches(self._train, *shape),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            generator=torch.Generator(),  # of its own: it draws a number that nothing uses
        )

    # -- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The summed loss of a micro-batch over the trained tokens of the whole global batch.

        Args:
            model: the wrapped model.
            inputs: a batch of `RowCollator`.
            return_outputs: refused; nothing here needs logits.
            num_items_in_batch: trained tokens of all micro-batches and ranks of this step.
        """
        assert not return_outputs, "logits are never built"
        assert num_items_in_batch is not None, "the trainer counts the trained tokens of every step"
        inputs = dict(inputs)
        inputs.pop("labels")  # counted by the trainer already
        self._origins += inputs.pop("origins")
        positions, targets, tokens = inputs.pop("positions"), inputs.pop("targets"), inputs.pop("tokens")
        with self._autocast():
            total = self._loss(model, inputs, positions, targets)
        # DDP averages gradients over ranks, and the divisor counts the tokens of all ranks.
        loss = total / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        self._micro_losses.append(loss.detach())
        self._seen += torch.tensor([tokens, targets.numel()], dtype=torch.float64)
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Products in 16 bits under FSDP2; accelerate (1.15) gives autocast to every model but those that it shards."""
        kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision)
        if not self.is_fsdp_enabled or kind is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, kind)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Runs once per optimizer step, before the optimizer: the last moment to refuse a non-finite update."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        loss = torch.stack([value.float() for value in self._micro_losses]).sum()
        # In float16 the gradient scaler probes for its limit: it skips steps whose gradient overflowed.
        finite = bool(torch.isfinite(loss)) and (self.args.fp16 or _finite(norm))
        bad = torch.tensor([0.0 if finite else 1.0], device=self.args.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        origins, self._origins, self._micro_losses = self._origins, [], []
        if bad.item():
            kept = "no step was made before it"
            if step := self.state.global_step:
                self.saver.save(undone=True)
                self.saver.finish()
                kept = self.saver.stands(step)
            raise NonFiniteError(
                f"step {step + 1}: loss {float(loss):g}, gradient norm {float(norm):g}; the update was not made, and "
                f"{kept}. Rows of this step on rank {self.args.process_index} (counted from 0): {_short(origins)}. "
                "Lower training.learning_rate, look at those rows, or use a wider model.dtype"
            )
        return norm

    # -- validation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss per trained token over all validation rows, whatever the batches and ranks."""
        began = time.monotonic()
        assert self._validation is not None, "asked for only where there are validation rows"
        units = np.argsort(-self._validation.tokens, kind="stable")  # batches of like length, ranks of like load
        world, rank, size = self.args.world_size, self.args.process_index, self.args.per_device_eval_batch_size
        mine = units[rank::world].tolist()
        batches = math.ceil(math.ceil(len(units) / world) / size)  # equal on all ranks: a sharded forward is collective
        model = self.model_wrapped if self.is_sharded else self.model  # DeepSpeed autocasts in its own forward
        training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for number in range(batches):
            documents = self._validation.documents(mine[number * size : (number + 1) * size])
            batch = self._prepare_inputs(self.data_collator(documents))
            positions, targets = batch.pop("positions"), batch.pop("targets")
            for name in ("labels", "origins", "tokens"):
                batch.pop(name)
            with self.compute_loss_context_manager(), self._autocast():
                total = self._loss(model, batch, positions, targets)
            sums += torch.tensor([total.item(), targets.numel()], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(training)
        if world > 1:
            sums = sums.to(self.args.device)
            dist.all_reduce(sums)
        metrics = {f"{metric_key_prefix}_loss": (sums[0] / sums[1].clamp(min=1)).item()}
        self.log(dict(metrics))
        self._logged_at += time.monotonic() - began  # an evaluation is not training time
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def last_validation_loss(self) -> float:
        """The validation loss after the last step, measured unless it has just been."""
        here = [entry for entry in self.state.log_history if entry.get("step") == self.state.global_step]
        measured = [entry["eval_loss"] for entry in here if "eval_loss" in entry]
        return float(measured[-1]) if measured else self.evaluate()["eval_loss"]

    # -- metrics -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second, over all ranks, since the last log of training figures."""
        if "loss" in logs:
            seen = self.accelerator.gather(self._seen.to(self.args.device, torch.float32)[None]).sum(0)
            elapsed = time.monotonic() - self._logged_at
            logs["tokens_per_second"] = round(float(seen[0]) / max(elapsed, 1e-9), 1)
            logs["trained_tokens"] = int(seen[1])
            self._seen.zero_()
            self._logged_at = time.monotonic()
        # Past SFTTrainer's own log, which would add averages of metrics that are not measured here.
        super(SFTTrainer, self).log(logs, start_time)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def train(self, *arguments: Any, **named: Any) -> Any:
        """The training loop; when it ends, however it ends, its last checkpoint is on the disk."""
        try:
            outcome = super().train(*arguments, **named)
            self.saver.finish()
        except BaseException as error:
            with contextlib.suppress(DiskError):  # what ended the run is told instead
                self.saver.give_up(at_once=isinstance(error, KeyboardInterrupt))
            raise
        return outcome

    def not_training(self, seconds: float) -> None:
        """Leave time out of the figure for tokens per second."""
        self._logged_at += seconds

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """None: the product gets its card when it is saved; TRL would leave one of placeholders among checkpoints."""

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self.saver.save()

    @functools.cached_property
    def layout(self) -> Layout:
        """Which piece of the trained state this process holds; once model and optimizer are wrapped."""
        return layout_of(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called before the model is wrapped, which is when a whole state is put back into it."""
        if not has_parts(Path(resume_from_checkpoint)):
            restore_weights(self.model, Path(resume_from_checkpoint))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The stock trainer's; called after the wrapping of the optimizer."""
        made = super().create_scheduler(num_training_steps, optimizer)
        self._numbers = Numbers.of(self.optimizer, made)
        return made

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wraps model and optimizer; then the state is put back, which the stock trainer would read from pickles."""
        widened = (
            widened_as_sharded(self.model) if self.is_fsdp_enabled and self._trains_all else contextlib.nullcontext()
        )
        with widened:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        lay_out_buckets_once(self.model_wrapped)
        if self.is_sharded:
            _ = self.layout  # now: FSDP2 puts other parameters in place while it measures
        if resume_from_checkpoint is not None:
            self._go_on(Path(resume_from_checkpoint))
        return prepared

    def _go_on(self, checkpoint: Path) -> None:
        self.saver.continues(self.state.global_step)
        self.state.compute_steps(self.args, self.state.max_steps)  # when to save, log, measure: the recipe says, not it
        if self.is_sharded or has_parts(checkpoint):
            made = read_json(checkpoint / MANIFEST)["made_of"]["found"]
            same = (made["parallelism"], made["world_size"]) == (self.parallelism, self.args.world_size)
            restore_parts(self, self.layout, checkpoint, same)
        else:
            restore_state(self, checkpoint)
        if self.saver.changed:
            self._numbers.count_again(self.optimizer, self.lr_scheduler)

    def window(self) -> Window:
        """What this rank has counted since the last line of the log."""
        seen = (float(self._seen[0]), float(self._seen[1]))
        elapsed = time.monotonic() - self._logged_at
        return Window(self._globalstep_last_logged, self._tr_loss.clone(), seen, elapsed)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called before the first step of a run that goes on; the log goes on here, too."""
        if checkpoint is None:
            return
        rank, states = self.args.process_index, own_states(Path(checkpoint))
        restore_rng(Path(checkpoint), states, rank, self.args.seed, self.args.device)
        if (found := window_of(states, rank, self.args.world_size)) is not None:
            window, mean = found
            self._globalstep_last_logged = window.since
            self._tr_loss += window.loss
            self._total_loss_scalar -= mean  # it is of the steps of this start alone
            self._seen += torch.tensor(window.seen, dtype=torch.float64)
            self._logged_at = time.monotonic() - window.seconds


def _finite(value: Any) -> bool:
    return bool(torch.isfinite(torch.as_tensor(float(value))))


def _short(names: list[str], most: int = 16) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
