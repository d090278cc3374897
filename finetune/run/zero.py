"""DeepSpeed's configuration: read from a file or from accelerate's few values, compared with the recipe, filled in.

DeepSpeed's files say "auto" for what the recipe decides; a file that says otherwise than the recipe is a fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import RecipeError
from finetune.recipe.sections import TrainingOptions
from finetune.run.batch import BatchShape
from finetune.run.launcher_keys import deepspeed_faults
from finetune.run.launcher_values import one_of, whole
from finetune.strict_json import loads

# Values of a DeepSpeed configuration that a recipe decides, with the key that does.
_DECIDED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optim and training.learning_rate",
    "scheduler": "training.lr_scheduler_type",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "activation_checkpointing": "training.activation_checkpointing",
}
_USUAL = {"gradient_predivide_factor": 1.0, "prescale_gradients": False}  # ZeRO breaks off over any other value
_DEVICES = ("none", "cpu", "nvme")  # where DeepSpeed can put what it takes off the GPU
_ADAMW = ("adamw_torch", "adamw_torch_fused")  # accelerate 1.15 makes DeepSpeed's AdamW of these, Adam of most others
_VARIABLES = {
    "stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
}
INLINE = (*_VARIABLES.values(), "ACCELERATE_CONFIG_DS_FIELDS")
"""The variables in which accelerate's launcher says what a DeepSpeed file would, and names what it says so."""


def read_file(file: str, named_in: Path, configs: Path) -> dict[str, Any]:
    """A DeepSpeed configuration: from the working folder as accelerate looks for it, or one of those that come along.

    Raises:
        RecipeError: it is not there, is no JSON object, or holds a key that DeepSpeed does not read.
    """
    tried = [Path(file).expanduser(), named_in.parent / file, configs.parent / file]
    if file.startswith("configs/"):
        tried.append(configs / file.removeprefix("configs/"))
    path = next((one for one in tried if one.is_file()), None)
    if path is None:
        raise RecipeError(f"{named_in}: deepspeed_config_file: {file} does not exist; name it by its full path")
    try:
        found = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: is no DeepSpeed configuration: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        raise RecipeError(f"{path}: is no DeepSpeed configuration: it has no zero_optimization")
    zero = found["zero_optimization"]
    whole(zero.get("stage", 0), f"{path}: zero_optimization.stage", 3)
    for name in ("offload_optimizer", "offload_param"):
        where, value = f"{path}: zero_optimization.{name}", zero.get(name) or {}
        if not isinstance(value, dict):
            raise RecipeError(f'{where}: expected keys with values, as {{"device": "cpu"}}, not {value!r}')
        one_of(value.get("device", "none"), _DEVICES, f"{where}.device")
    if faults := deepspeed_faults(found, str(path)):
        raise RecipeError("\n".join(faults))
    return found


def read_inline(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """DeepSpeed's configuration from the few values that accelerate takes without a file.

    Args:
        given: the values; None stands for one that is not given.
        where: the place of all of them, for messages.

    Raises:
        RecipeError: a value is of another kind.
    """
    given = {name: value for name, value in given.items() if value is not None}
    zero: dict[str, Any] = {"stage": whole(given.get("zero_stage", 2), f"{where}: zero_stage", 3)}
    for name in ("offload_optimizer", "offload_param"):
        device = one_of(given.get(f"{name}_device", "none"), _DEVICES, f"{where}: {name}_device")
        if device != "none":
            zero[name] = {"device": device}
    found: dict[str, Any] = {"zero_optimization": zero}
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        text = given.get(name, "auto")
        try:
            found[name] = text if text == "auto" else float(text)
        except (TypeError, ValueError) as error:
            raise RecipeError(f'{where}: {name}: expected a number or "auto", not {text!r}') from error
    return found


def from_variables(environment: Mapping[str, str], configs: Path) -> tuple[str, dict[str, Any]]:
    """What accelerate's launcher, or a user in its place, has said, and where.

    Raises:
        RecipeError: as `read_file` and `read_inline` say.
    """
    value = environment.get
    file = value("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return file, read_file(file, Path(file), configs)
    given = {"zero_stage": value(_VARIABLES["stage"], "2")}
    for name in ("offload_optimizer", "offload_param"):
        given[f"{name}_device"] = value(_VARIABLES[name], "none")
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        given[name] = value(_VARIABLES[name], "auto")
    return _VARIABLES["stage"], read_inline(given, "the launcher's variables")


def faults(settings: Mapping[str, Any], source: str, training: TrainingOptions, shape: BatchShape) -> list[str]:
    """What of a configuration contradicts the recipe, each with what to do instead; of this machine nothing is asked.

    Args:
        settings: from `read_file` or `read_inline`.
        source: where they stand, for messages.
        training: the training section.
        shape: the global batch as it is split.
    """
    found = []
    said = _said(training, shape)
    for name, key in _DECIDED.items():
        value = settings.get(name, "auto")
        if isinstance(value, dict) and set(map(str, value.values())) <= {"auto"}:
            continue
        if value != "auto" and value != said.get(name):
            meant = f" ({said[name]:g} here)" if name in said else ""
            found.append(f'{source}: {name}: the recipe\'s {key} decides{meant}; write "auto" or remove it')
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", 0) == 0:
        found.append(f"{source}: stage 0 shares nothing; remove launch.config, which is DDP")
    for name, usual in _USUAL.items():
        if settings.get(name, usual) != usual:
            found.append(f"{source}: {name}: ZeRO takes no other than {json.dumps(usual)}; remove it")
    if zero.get("round_robin_gradients"):
        found.append(
            f"{source}: round_robin_gradients: DeepSpeed 0.19 then tells of other weights than lie there, and a "
            "checkpoint would hold them in each other's place; remove it"
        )
    if (zero.get("offload_optimizer") or {}).get("ratio", 1) != 1:
        found.append(
            f"{source}: offload_optimizer.ratio: what stays on the GPU has an optimizer of its own, of which no "
            "checkpoint is made; remove it"
        )
    drives = [name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("device") == "nvme"]
    if drives:
        found.append(
            f"{source}: {' and '.join(drives)}: what lies on an NVMe drive cannot be put into a checkpoint; write "
            "device: cpu"
        )
    if own_optimizer(settings) and training.optim not in _ADAMW:
        found.append(
            f"{source}: DeepSpeed's optimizer for the CPU is AdamW, and would take the place of training.optim: "
            f'{training.optim}; write "zero_force_ds_cpu_optimizer": false, or training.optim: adamw_torch'
        )
    return found


def own_optimizer(settings: Mapping[str, Any]) -> bool:
    """Whether accelerate puts DeepSpeed's own optimizer for CPUs in place of torch's; it does unless told not to."""
    return "optimizer" in offloads(settings) and bool(settings.get("zero_force_ds_cpu_optimizer", True))


def offloads(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What lies in the host's memory: "optimizer", "param"."""
    zero = settings.get("zero_optimization", {})
    there = {name: zero.get(f"offload_{name}") or {} for name in ("optimizer", "param")}
    return tuple(name for name, value in there.items() if value.get("device", "none") != "none")


def _said(training: TrainingOptions, shape: BatchShape) -> dict[str, float]:
    """What the recipe says for DeepSpeed's keys of batches and clipping."""
    return {
        "train_batch_size": shape.per_device * shape.accumulation * shape.processes,
        "train_micro_batch_size_per_gpu": shape.per_device,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_clipping": training.max_grad_norm,
    }


def deepspeed_config(
    settings: Mapping[str, Any], training: TrainingOptions, shape: BatchShape, compute: str
) -> dict[str, Any]:
    """DeepSpeed's configuration with nothing left open: what the recipe decides is filled in.

    The matrix products run under torch's autocast, as they do in every other mode, and every weight keeps its own
    dtype: DeepSpeed's bf16 section would make the adapter bfloat16. No layer's gradients travel in a lower precision
    than they have.

    Args:
        settings: from `read_file` or `read_inline`.
        training: the training section.
        shape: the global batch as it is split.
        compute: precision of matrix products, by torch's name.
    """
    found: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    for name in _DECIDED:
        found.pop(name, None)
    found |= _said(training, shape)
    if compute != "float32":
        found["torch_autocast"] = {"enabled": True, "dtype": compute, "lower_precision_safe_modules": []}
    return found
