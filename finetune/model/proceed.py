"""Attach an earlier adapter to its base, to train it further; all of its tensors must have found their place.

PEFT warns where a file and a model do not fit, and goes on with what is left: for many mixtures of experts it drops the
adapters of shared and dense layers that other tools wrote. So what was loaded is compared with the file, both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finetune.compat import adapter_names_kept
from finetune.errors import ModelError, RecipeError
from finetune.model.adapt import adapted_modules
from finetune.model.earlier import WEIGHTS, Earlier
from finetune.model.kinds import ends
from finetune.model.quantise_lora import understand
from finetune.model.targets import Targets


def proceed(
    model: PreTrainedModel, earlier: Earlier, base_name: str, revision: str | None = None, on_meta: bool = False
) -> tuple[PeftModel, Targets]:
    """Wrap the base with the earlier adapter, trainable; its weights are float32.

    Args:
        model: the built base.
        earlier: from `read_earlier`.
        base_name: what adapter_config.json will call the base.
        revision: the base's revision on the hub.
        on_meta: the base is on the meta device.

    Returns:
        The model, and what the adapter adapts.

    Raises:
        ModelError: the adapter does not fit this base, or PEFT would leave a part of it out.
    """
    config = LoraConfig.from_pretrained(str(earlier.folder))
    config.init_lora_weights = True  # the values come from the file
    config.lora_dropout = earlier.options.lora_dropout
    config.revision = revision
    understand(config, model)
    try:
        with warnings.catch_warnings(), adapter_names_kept():  # what they warn of is found and refused below
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(
                model, str(earlier.folder), is_trainable=True, config=config, autocast_adapter_dtype=not on_meta,
                low_cpu_mem_usage=on_meta,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise  # a RuntimeError too, which says nothing of the adapter
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(
            f"adapter.continue_from: the adapter in {earlier.folder} does not fit {base_name}: {reason}; name the base "
            "that it was trained on"
        ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    _refuse_left_out(wrapped, earlier)
    names = tuple(adapted_modules(wrapped))
    modules = dict(model.named_modules())
    plain = tuple(name for name in names if name in modules)
    return wrapped, Targets(plain, tuple(name for name in names if name not in modules))


def _refuse_left_out(wrapped: PeftModel, earlier: Earlier) -> None:
    """Every tensor of the file stands in the model with its values, and the model has no other.

    Raises:
        ModelError: with the tensors that do not.
    """
    loaded = get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # auto might ask the hub
    stored = load_file(earlier.folder / WEIGHTS)
    faults = [f"  {name}: in the file, not in the model" for name in sorted(stored.keys() - loaded.keys())]
    faults += [f"  {name}: in the model, not in the file" for name in sorted(loaded.keys() - stored.keys())]
    for name in sorted(stored.keys() & loaded.keys()):
        found = loaded[name].detach()
        if found.shape != stored[name].shape or not (
            found.is_meta or torch.equal(found.cpu().float(), stored[name].float())
        ):
            faults.append(f"  {name}: other values after loading")
    if faults:
        raise ModelError(
            f"adapter.continue_from: PEFT loads {len(faults)} tensors of the adapter in {earlier.folder} otherwise "
            "than its file has them, so that it would not be continued:\n" + "\n".join(faults[:10]) + "\nit was made "
            "by another release of PEFT, or for another base; save it anew with the installed one"
        )


def refuse_other_targets(stated: Targets, found: Targets, earlier: Earlier) -> None:
    """What the recipe's `target_modules` mean must be what the adapter has.

    Args:
        stated: the recipe's words, resolved on the model.
        found: what the adapter adapts.
        earlier: the adapter.

    Raises:
        RecipeError: they differ.
    """
    missing, extra = set(stated.names) - set(found.names), set(found.names) - set(stated.names)
    if missing or extra:
        lines = [f"  {name}: in the recipe, not in the adapter" for name in sorted(missing)[:5]]
        lines += [f"  {name}: in the adapter, not in the recipe" for name in sorted(extra)[:5]]
        raise RecipeError(
            f"adapter.target_modules: {', '.join(stated.short())} in the recipe, {', '.join(found.short())} in the "
            f"adapter of {earlier.folder}:\n" + "\n".join(lines) + "\nremove target_modules and layers_to_transform: "
            "with adapter.continue_from they are the adapter's"
        )


def refuse_other_rows(model: PreTrainedModel, earlier: Earlier, new_ids: Sequence[int]) -> None:
    """The recipe's new tokens must be those that the adapter has rows for.

    Args:
        model: the base, with rows for the new tokens.
        earlier: the adapter.
        new_ids: numbers of the new tokens.

    Raises:
        RecipeError: they are not.
    """
    embedding = model.get_input_embeddings()
    if any(
        module is embedding for name, module in model.named_modules() if ends(name, earlier.options.modules_to_save)
    ):
        return  # whole, so that a file of another length does not load
    rows = earlier.options.trainable_token_indices
    if beyond := [row for row in rows if row >= embedding.weight.shape[0]]:
        raise RecipeError(
            f"model.new_tokens: the adapter in {earlier.folder} has rows for tokens that the base does not have, as "
            f"number {beyond[0]}; write the new tokens of the recipe that it was trained with"
        )
    if lacking := sorted(set(new_ids) - set(rows)):
        raise RecipeError(
            f"model.new_tokens: the adapter in {earlier.folder} has no row for token {lacking[0]}, and none can be "
            "added to it; leave the token out, or merge the adapter and train a new one on the merged model"
        )
