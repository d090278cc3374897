"""Attach the adapter, and prove that exactly the modules meant have one.

PEFT accepts names that match nothing, matches some names in part, and for many mixture-of-experts models moves an
adapter from the layer that was named to another. So the modules are resolved here, on the model that was built, and
compared with what PEFT made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from finetune.errors import ModelError
from finetune.families.family import Family
from finetune.recipe.sections import AdapterOptions
from finetune.registry import nearest


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    Attributes:
        modules: full names, as `model.named_modules` gives them.
        assumed: what was assumed where no family file knows the model; empty otherwise.
    """

    modules: tuple[str, ...]
    assumed: str = ""


def _is_linear(module: torch.nn.Module) -> bool:
    """A layer LoRA can adapt: nn.Linear, bitsandbytes' subclasses of it, and transformers' Conv1D."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers but the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if _is_linear(module) and module is not head]


def _looks_like_router(name: str) -> bool:
    return _leaf(name) in ("gate", "router", "wg", "shared_expert_gate")


def resolve_targets(model: PreTrainedModel, options: AdapterOptions, family: Family | None) -> Targets:
    """Which modules `adapter.target_modules` means on this model.

    Args:
        model: the built base.
        options: the adapter section.
        family: the model's family; None when no file knows it.

    Raises:
        ModelError: a name matches no module, or only names that cannot carry an adapter.
    """
    linear = _linear_names(model)
    wanted = options.target_modules
    if isinstance(wanted, tuple):
        return Targets(_match_names(model, wanted, linear))
    if wanted == "auto" and family is not None:
        return Targets(_match_names(model, family.targets, linear))
    kind = model.config.model_type
    if _has_fused_experts(model):
        raise ModelError(
            f"adapter.target_modules: {wanted} would leave most of this model ({kind}) untrained, because its experts "
            f"are fused weights and no linear layers; list the modules to adapt: {', '.join(_leaves(linear))}"
        )
    never = family.never if family is not None else ()
    if wanted == "all-linear":
        return Targets(tuple(name for name in linear if _leaf(name) not in never))
    modules = tuple(name for name in linear if not _looks_like_router(name))
    return Targets(modules, f"no family file knows model type {kind!r}; adapting every {', '.join(_leaves(modules))}")


def _has_fused_experts(model: PreTrainedModel) -> bool:
    """Whether a layer that is no convolution holds a weight of three dimensions: experts x out x in."""
    return any(
        parameter.dim() == 3
        for module in model.modules()
        if not isinstance(module, torch.nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    )


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({_leaf(name) for name in names})


def _match_names(model: PreTrainedModel, wanted: Iterable[str], linear: list[str]) -> tuple[str, ...]:
    """Modules whose full name is, or ends in, one of `wanted`; every one of `wanted` must match a linear layer."""
    every = {name: module for name, module in model.named_modules() if name}
    head = model.get_output_embeddings()
    found: set[str] = set()
    faults = []
    for target in wanted:
        hits = [name for name in every if name == target or name.endswith(f".{target}")]
        if not hits:
            near = nearest(_leaf(target), _leaves(linear), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (linear layers: {', '.join(_leaves(linear))})"
            faults.append(f"{target!r} matches no module{hint}")
        elif any(every[name] is head for name in hits):
            faults.append(f"{target!r} is the output head, which is not adapted: many models share it with the input")
        elif others := [name for name in hits if name not in linear]:
            kind = type(every[others[0]]).__name__
            faults.append(f"{target!r} matches {others[0]}, a {kind}; only linear layers are adapted")
        else:
            found.update(hits)
    if faults:
        raise ModelError("adapter.target_modules: " + "; ".join(faults))
    return tuple(name for name in linear if name in found)


def attach(
    model: PreTrainedModel, options: AdapterOptions, targets: Targets, base_name: str, revision: str | None = None
) -> PeftModel:
    """Wrap the base with a fresh adapter on exactly `targets`; adapter weights are float32.

    Seed torch before calling: the A matrices are drawn here.

    Args:
        model: the built base.
        options: the adapter section.
        targets: from `resolve_targets`.
        base_name: what adapter_config.json calls the base.
        revision: the base's revision on the hub.

    Raises:
        ModelError: PEFT adapted other modules than those named, or layers that are stored in two ways were named.
    """
    modules = [model.get_submodule(name) for name in targets.modules]
    transposed = [type(module).__name__ == "Conv1D" for module in modules]
    if any(transposed) and not all(transposed):
        raise ModelError(
            "adapter.target_modules: some of these layers are stored transposed (Conv1D) and some are not, which one "
            "adapter cannot hold; name only the one or the other kind"
        )
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=_short_names(model, targets.modules),
        use_rslora=options.use_rslora,
        use_dora=options.method == "dora",
        fan_in_fan_out=any(transposed),
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(f"adapter.target_modules: refused by PEFT for this model: {error}") from error
    # PEFT puts the folder there that the weights were read from, which for a hub model is a cache on this machine.
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    _prove_coverage(wrapped, targets)
    return wrapped


def _short_names(model: PreTrainedModel, modules: tuple[str, ...]) -> list[str]:
    """Leaf names where they say the same as the full names, since every server reads those; else the full names."""
    leaves = _leaves(modules)
    matched = {name for name, _ in model.named_modules() if _leaf(name) in leaves}
    return leaves if matched == set(modules) else sorted(modules)


def adapted_modules(model: PeftModel) -> dict[str, LoraLayer]:
    """The modules that carry an adapter, by their name in the base model."""
    inner = model.get_base_model()
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


def _prove_coverage(model: PeftModel, targets: Targets) -> None:
    got = set(adapted_modules(model))
    missed = sorted(set(targets.modules) - got)
    extra = sorted(got - set(targets.modules))
    if missed or extra:
        lines = [f"  {name}: meant, not adapted" for name in missed[:5]]
        lines += [f"  {name}: adapted, not meant" for name in extra[:5]]
        raise ModelError(
            f"the adapter would not train what the recipe says ({len(missed)} modules missed, {len(extra)} too many):\n"
            + "\n".join(lines)
            + "\nlist the modules to adapt in adapter.target_modules"
        )


def untrained_modules(model: PeftModel) -> list[str]:
    """Adapted modules whose lora_B is still all zero: nothing reached them, so they change nothing.

    A fresh lora_B is zero, and any gradient moves it: a zero after steps with a learning rate above 0 is a defect.
    """
    return [
        name
        for name, module in adapted_modules(model).items()
        for matrix in module.lora_B.values()
        if matrix.weight.numel() and not bool(torch.any(matrix.weight != 0))
    ]
