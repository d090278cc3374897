"""LoRA on a base in 4 or 8 bits, where PEFT by itself would add it to packed bytes.

PEFT adapts routed experts as parameters, and for many models takes shared experts and dense layers for them because of
their names, so that those are adapted as parameters too (see adapt.py). It does so by adding to the parameter, which
packed weights do not allow. Here PEFT is told, through the door it has for layers it does not know, to put its own
LoRA of linear layers on linear layers, and a LoRA beside the product on packed experts. The adapter that is saved is
the same as that of an unquantised base, and plain PEFT loads it on one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from finetune.compat import adapter_names_kept
from finetune.errors import ModelError
from finetune.model.kinds import is_packed


def _layer_of(module: nn.Module) -> Callable[..., nn.Module]:
    """What makes PEFT's own LoRA layer for a quantised linear layer, also where PEFT means its parameter."""
    from peft.tuners.lora import bnb

    dispatch = bnb.dispatch_bnb_4bit if type(module).__name__ == "Linear4bit" else bnb.dispatch_bnb_8bit

    def made(target: nn.Module, adapter_name: str, config: LoraConfig, **how: Any) -> nn.Module:
        how.pop("parameter_name", None)
        layer: nn.Module = dispatch(target, adapter_name, config=config, **how)
        return layer

    return made


def understand(config: PeftConfig, model: nn.Module) -> None:
    """Tell PEFT how to adapt the quantised layers of a model; what is saved of the config stays as it is.

    Args:
        config: of an adapter that is about to be attached or loaded.
        model: the base.
    """
    if not isinstance(config, LoraConfig):
        return
    layers: dict[type[nn.Module], Any] = {}
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and type(module) not in layers:
            layers[type(module)] = _layer_of(module)
        elif is_packed(module):
            from finetune.model.quantise_experts import ExpertsNF4
            from finetune.model.quantise_wrapper import ParamWrapper

            layers[ExpertsNF4] = ParamWrapper
    if layers:
        config._register_custom_module(layers)


def open_adapter(model: Any, folder: Path) -> PeftModel:
    """A saved adapter on a base, quantised or not.

    Args:
        model: the base, loaded.
        folder: the adapter folder.

    Raises:
        ModelError: PEFT did not take every matrix out of the file, of which it only warns.
    """
    config = PeftConfig.from_pretrained(str(folder))
    understand(config, model)
    with adapter_names_kept():
        opened = PeftModel.from_pretrained(model, str(folder), config=config)
    _refuse_lost(opened, folder)
    return opened


def lost_by_peft(wrapped: PeftModel) -> list[str]:
    """Names of the matrices that plain PEFT would lose when it opens the adapter that this model has.

    Args:
        wrapped: a base with an adapter, also on the meta device.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in saved.items()}
    found = convert_peft_adapter_state_dict_for_transformers(wrapped, wrapped.peft_config["default"], shapes)
    return sorted(name.removeprefix("base_model.model.") for name in saved.keys() - found.keys())


def _refuse_lost(opened: PeftModel, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        held = set(file.keys())
        lost = []
        for name, parameter in opened.named_parameters():
            if name.endswith((".lora_A.default.weight", ".lora_B.default.weight")):
                key = name.replace(".default.", ".")
                if key not in held or not torch.equal(file.get_tensor(key).to(parameter), parameter):
                    lost.append(key.removeprefix("base_model.model."))
    if lost:
        raise ModelError(
            f"{folder}: the installed PEFT loses {len(lost)} matrices of the adapter when it opens it, as {lost[0]}; "
            "train without these layers: name others in adapter.target_modules"
        )
