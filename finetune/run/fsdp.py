"""FSDP's values in an accelerate configuration: read, compared with what has an effect here, and passed on.

Of the two versions only the second is supported. What the recipe decides must not be said there, and a value that
nothing would read is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import RecipeError
from finetune.recipe.sections import ModelOptions
from finetune.registry import nearest
from finetune.run.launcher_values import NO, YES, is_yes, one_of, whole

_DECIDED = {
    "activation_checkpointing": "training.activation_checkpointing",
    "activation_checkpointing_offload": "training.activation_checkpointing",
    "mixed_precision_policy": "model.dtype",
}
# What accelerate's launcher takes where a file says nothing; it sets a variable for each of these (accelerate 1.15).
DEFAULTS = {
    "version": "1",
    "sharding_strategy": "FULL_SHARD",
    "reshard_after_forward": "true",
    "offload_params": "false",
    "min_num_params": "100000000",
    "forward_prefetch": "false",
    "use_orig_params": "true",
    "cpu_ram_efficient_loading": "true",
    "sync_module_states": "true",
    "activation_checkpointing": "false",
    "activation_checkpointing_offload": "false",
}
_NAMES = {  # the only words that FSDP2 takes
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "state_dict_type": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
}
_LAYERS = "transformer_layer_cls_to_wrap"
_ALIASES = {"transformer_cls_to_wrap": _LAYERS}  # the launcher's variable is called otherwise than its file's key
# Values that FSDP2 has no use for, or that are not handed on, each with what it may say because that is what happens.
_UNUSED: dict[str, tuple[str, ...]] = {
    "sharding_strategy": ("FULL_SHARD", "1"),
    "backward_prefetch": ("NO_PREFETCH",),
    "forward_prefetch": ("false",),
    "use_orig_params": ("true",),
    "sync_module_states": ("true",),
    "ignored_modules": (),
}
_KNOWN = {*DEFAULTS, *_NAMES, *_UNUSED, *_DECIDED, _LAYERS}
WITHOUT_FSDP = ("cpu",)  # torch device types on which accelerate 1.15 would train with DDP instead, without a word


def read(given: Mapping[str, Any], where: str) -> dict[str, str]:
    """FSDP's values in one form, whether they stood in a file or in variables; "none" is one that is not given.

    Args:
        given: the values by accelerate's names.
        where: the place of all of them, for messages.

    Raises:
        RecipeError: a value is of a kind that accelerate does not take, or two of them contradict each other.
    """
    found: dict[str, str] = {}
    for name, value in given.items():
        plain = str(name).removeprefix("fsdp_")
        plain = _ALIASES.get(plain, plain)
        if str(value).lower() == "none":
            continue
        text = _value(plain, value, f"{where}: {name}")
        if found.setdefault(plain, text) != text:
            raise RecipeError(f"{where}: {name}: is given twice, as {found[plain]} and as {text}; remove one")
    return dict(sorted(found.items()))


def _value(plain: str, value: Any, where: str) -> str:
    if words := _NAMES.get(plain):
        return one_of(value, words, where)
    if plain == "min_num_params":
        return str(whole(value, where))
    if plain == _LAYERS and not isinstance(value, str):
        raise RecipeError(f"{where}: expected the names of classes with commas between them, not {value!r}")
    if DEFAULTS.get(plain) in ("true", "false"):
        if str(value).lower() not in YES + NO:
            raise RecipeError(f"{where}: expected true or false, not {value!r}")
        return "true" if is_yes(value) else "false"
    return str(value)


def from_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """FSDP's values as accelerate's launcher, or a user in its place, has set them.

    Raises:
        RecipeError: as `read` says.
    """
    known = _KNOWN | set(_ALIASES)  # other variables are not accelerate's
    texts = {name.lower(): text for name, text in environment.items() if name.startswith("FSDP_")}
    given = {name: text for name, text in texts.items() if name.removeprefix("fsdp_") in known}
    return read(given, "the launcher's variables")


def faults(settings: Mapping[str, str], source: str, model: ModelOptions, device: str) -> list[str]:
    """What of FSDP's values contradicts the recipe, has no effect, or cannot be had, each with what to do instead.

    Args:
        settings: from `read`.
        source: where they stand, for messages.
        model: the model section.
        device: torch device type.
    """
    found = []
    if device in WITHOUT_FSDP:
        found.append(
            f"{source}: accelerate has FSDP on accelerators only and would train with DDP on a CPU; take "
            "launch.config: zero3, or ddp"
        )
    if settings.get("version", "1") != "2":
        found.append(f"{source}: fsdp_version: only 2 is supported; write fsdp_version: 2")
    for name, key in _DECIDED.items():
        if settings.get(name, "false") not in ("false", "None", "none"):
            found.append(f"{source}: fsdp_{name}: the recipe's {key} decides; remove it")
    for name, value in settings.items():
        if value not in _UNUSED.get(name, (value,)):
            found.append(f"{source}: fsdp_{name}: {value} has no effect on FSDP2 here; remove it")
        if name not in _KNOWN:
            near = nearest(name, sorted(_KNOWN), 1)
            hint = f"write fsdp_{near[0]}, or remove it" if near else "remove it"
            found.append(f"{source}: fsdp_{name}: accelerate's launcher reads no such key; {hint}")
    if model.quantization == "int8":
        found.append(
            "model.quantization: int8 weights cannot be sharded by FSDP2 (bitsandbytes' Int8Params do not survive it); "
            "write nf4, or take launch.config: zero3"
        )
    return found


def note(settings: Mapping[str, str]) -> str:
    """What of these values is not followed, though it does no harm; empty where all is.

    accelerate's launcher also sets it to true for a file that does not say it.
    """
    if settings.get("cpu_ram_efficient_loading") != "true":
        return ""
    return (
        "fsdp_cpu_ram_efficient_loading: true is not followed: every process reads the whole base into the host's "
        "memory, since base and adapter are checked before they are spread"
    )


def fsdp_config(settings: Mapping[str, str]) -> dict[str, Any]:
    """FSDP's configuration by the names of TrainingArguments.

    Args:
        settings: from `read`.
    """
    found = {
        "version": 2,
        "auto_wrap_policy": settings.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        "reshard_after_forward": settings.get("reshard_after_forward", "true"),
        "cpu_offload": is_yes(settings.get("offload_params")),
        "state_dict_type": settings.get("state_dict_type", "SHARDED_STATE_DICT"),
        "cpu_ram_efficient_loading": "false",
        "min_num_params": int(settings.get("min_num_params", DEFAULTS["min_num_params"])),
    }
    if layers := settings.get(_LAYERS):
        found[_LAYERS] = [name.strip() for name in layers.split(",")]
    return found
