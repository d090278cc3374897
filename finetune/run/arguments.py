"""Where recipe keys become trainer arguments: one line per argument, nothing implied.

TRL and transformers have defaults of their own (gradient checkpointing on, bfloat16 on, NaN filtered from the log);
whatever matters is stated here, so that what a run did can be read off its recipe.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from finetune.errors import RecipeError
from finetune.recipe.sections import LaunchOptions, TrainingOptions
from finetune.registry import nearest
from finetune.run.batch import BatchShape
from finetune.run.fsdp import fsdp_config
from finetune.run.modes import Mode
from finetune.run.zero import deepspeed_config

# Arguments that the trainer, its batches and its loss do not read here, or under which they would be wrong: rows that a
# resume does not skip, or that workers hand over out of order, make a run that is continued another one.
_WITHOUT_EFFECT = frozenset({
    "average_tokens_across_devices", "batch_eval_metrics", "dataloader_drop_last", "dataloader_in_order",
    "disable_tqdm", "do_predict", "enable_jit_checkpoint", "eval_accumulation_steps", "eval_do_concat_batches",
    "eval_use_gather_object", "greater_is_better", "hub_always_push", "hub_revision", "ignore_data_skip",
    "include_for_metrics", "label_names", "length_column_name", "liger_kernel_config",
    "log_on_each_node", "logging_nan_inf_filter", "loss_type", "metric_for_best_model", "pad_to_multiple_of",
    "prediction_loss_only", "restore_callback_states_from_checkpoint", "router_aux_loss_coef", "save_on_each_node",
    "save_only_model", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "train_sampling_strategy",
    "use_cache",
})  # fmt: skip
NEVER = 10**9  # a step that no run reaches: the final checkpoint is written whatever save_steps says


def check_extra(extra: dict[str, Any]) -> None:
    """Compare `training.extra` with the installed SFTConfig.

    Keys that a field of the recipe decides are refused when the recipe is read.

    Raises:
        RecipeError: keys it does not have, each with the nearest it has, and keys that would change nothing.
    """
    known = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}
    faults = []
    for key, value in extra.items():
        if key not in known:
            near = nearest(key, list(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            faults.append(f"training.extra.{key}: SFTConfig has no such argument{hint}")
        elif key in _WITHOUT_EFFECT:
            faults.append(
                f"training.extra.{key}: has no effect, or a wrong one, on this trainer's batches, loss and files"
            )
        elif (choices := known[key].metadata.get("choices")) and value not in [None, *choices]:
            # Upstream checks these only on its own command line, and takes any other value for the default.
            faults.append(f"training.extra.{key}: {value!r} is none of {', '.join(map(str, choices))}")
    if faults:
        raise RecipeError("\n".join(faults))


def check_optim(name: str) -> None:
    """Compare `training.optim` with the optimizers of the installed transformers.

    Raises:
        RecipeError: it has none of this name.
    """
    known = [kind.value for kind in OptimizerNames]
    if name not in known:
        near = nearest(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise RecipeError(f"training.optim: transformers has no optimizer {name!r}; {hint}")


def trainer_arguments(
    options: TrainingOptions,
    launch: LaunchOptions,
    shape: BatchShape,
    checkpoints: Path,
    compute: str,
    device: str,
    validates: bool,
    mode: Mode | None = None,
) -> SFTConfig:
    """The arguments of TRL's trainer.

    Args:
        options: the training section.
        launch: the launch section.
        shape: from `batch_shape`.
        checkpoints: folder for checkpoints.
        compute: precision of matrix products: "bfloat16", "float16" or "float32".
        device: torch device type.
        validates: whether there are validation rows.
        mode: how the run is laid over its processes; DDP, or one process, where None.

    Raises:
        RecipeError: `training.extra` is refused by SFTConfig, or a key would do nothing.
    """
    check_extra(options.extra)
    check_optim(options.optim)
    for key in ("eval_steps", "per_device_eval_batch_size"):
        if getattr(options, key) is not None and not validates:
            raise RecipeError(f"training.{key}: does nothing without data.validation; name such rows, or remove it")
    checkpointing = options.activation_checkpointing
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": shape.per_device,
        "per_device_eval_batch_size": options.per_device_eval_batch_size or shape.per_device,
        "gradient_accumulation_steps": shape.accumulation,
        "learning_rate": options.learning_rate,
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_steps or -1,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_steps,
        "optim": options.optim,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "seed": options.seed,
        "bf16": compute == "bfloat16",
        "fp16": compute == "float16",
        "activation_checkpointing": device != "cpu" if checkpointing == "auto" else checkpointing,
        "gradient_checkpointing": False,
        "logging_strategy": "steps",
        "logging_steps": options.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if options.eval_steps else "no",
        "eval_steps": options.eval_steps,
        "save_strategy": "steps",
        "save_steps": options.save_steps or NEVER,
        "save_total_limit": options.save_total_limit,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": device == "cpu",
        "ddp_timeout": math.ceil(launch.timeout),
        "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": True,
        "dataloader_pin_memory": device != "cpu",
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
        "include_num_input_tokens_seen": "no",
    }
    if mode is not None and mode.kind == "deepspeed":  # which casts nothing, and autocasts by its own configuration
        arguments |= {
            "deepspeed": deepspeed_config(mode.settings, options, shape, compute),
            "bf16": False,
            "fp16": False,
        }
    if mode is not None and mode.kind == "fsdp":
        arguments |= {"fsdp": True, "fsdp_config": fsdp_config(mode.settings)}
    try:
        return SFTConfig(**{**arguments, **options.extra})
    except (TypeError, ValueError, ImportError) as error:
        place = "training, or training.extra" if options.extra else "training"
        raise RecipeError(f"{place}: refused by the trainer: {error}") from error
