"""`finetune targets`: what a recipe trains, told before any weight is loaded.

The model is built from its config on the meta device and the adapter is attached to it as in training, so what is told
is what PEFT makes of the recipe, for DeepSeek-V3 as for a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.recipe.load import load_recipe

if TYPE_CHECKING:
    from finetune.model.coverage import Coverage
    from finetune.model.earlier import Earlier
    from finetune.model.folder import Base
    from finetune.recipe.sections import ModelOptions


def run(recipe_path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What each part of the model is, and whether the recipe trains it.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value` each.

    Returns:
        `base`, `model_type`, `family` (None when no file knows it), `method`, `dtype`, `quantization`, `stored`
        (how the checkpoint itself is quantised; None when it is not), `assumed`,
        `loses` (what plain PEFT will not open of the adapter), `refused` (why training would not start; None when it
        would), `unquantised` (with model.quantization: the bytes that each kind of block would take without; else
        empty), `parameters`, `bytes` as loaded, `trainable`,
        `blocks` by kind, and `modules`: `name`, `kind`, `parameters`, `bytes`, `adapted`, `trainable` of each.

    Raises:
        FinetuneError: a name, pattern or layer matches nothing, or the model cannot be built.
    """
    from finetune.plan.hardware import compute_dtype, detect
    from finetune.run.say import quieten

    recipe = load_recipe(recipe_path, list(overrides)).recipe
    hardware = detect(recipe.launch.device)
    quieten(hardware.device)  # before peft is imported

    from finetune.errors import ModelError
    from finetune.families import match
    from finetune.model.coverage import refuse_unaccepted
    from finetune.model.earlier import read_earlier
    from finetune.model.folder import find_config
    from finetune.model.load import precision
    from finetune.model.quantise import refuse_transposed
    from finetune.model.skeleton import skeleton
    from finetune.model.stored import stored

    base = find_config(recipe.model.name_or_path)
    held = stored(base.name, base.config, recipe.model.quantization, recipe.adapter.method)
    compute = compute_dtype(recipe.model.dtype, hardware)
    kept = precision(recipe.model, recipe.adapter.method, compute)
    dtype = kept.base if recipe.model.quantization == "none" else kept.compute
    model: Any = skeleton(recipe.model, base, dtype)
    refuse_transposed(recipe.model.name_or_path, model, held)
    family = match(recipe.model.family, base.model_type or model.config.model_type)
    earlier = read_earlier(recipe.adapter, recipe.model.name_or_path, recipe.model.quantization)
    ids, guess = _new_ids(model, recipe.model, base)
    coverage, assumed, loses, whole = _covered(model, recipe, family, earlier, ids)
    refused = None
    if recipe.adapter.method != "none":
        try:
            refuse_unaccepted(coverage, recipe.adapter)
        except ModelError as error:
            refused = str(error)
    return {
        "base": recipe.model.name_or_path,
        "model_type": model.config.model_type,
        "family": family.name if family is not None else None,
        "method": earlier.options.method if earlier is not None else recipe.adapter.method,
        "dtype": dtype,
        "quantization": recipe.model.quantization,
        "stored": held.method if held is not None else None,
        "assumed": "; ".join(filter(None, [assumed, guess])),
        "loses": loses,
        "refused": refused,
        "unquantised": whole,
        **coverage.facts(),
    }


def _new_ids(model: Any, options: ModelOptions, base: Base) -> tuple[list[int], str]:
    """The numbers of the recipe's new tokens, and what was assumed of them where there is no tokenizer to ask."""
    from finetune.model.folder import has_tokenizer
    from finetune.model.tokenizer import load_tokenizer, new_ids

    wanted = (*options.new_tokens, *options.new_special_tokens)
    if not wanted:
        return [], ""
    if base.folder is not None and has_tokenizer(base.folder):
        return list(new_ids(options, load_tokenizer(options, base)).values()), ""
    rows = model.get_input_embeddings().weight.shape[0]
    return [rows + number for number in range(len(wanted))], "the base keeps no spare rows for the new tokens"


def _covered(
    model: Any, recipe: Any, family: Any, earlier: Earlier | None, new_ids: Sequence[int]
) -> tuple[Coverage, str, str, dict[str, int]]:
    """The coverage of a model on the meta device, what was assumed, what plain PEFT loses, and bytes by kind before."""
    from finetune.model.build import adapted
    from finetune.model.coverage import measure
    from finetune.model.embeddings import give_rows
    from finetune.model.freeze import freeze
    from finetune.model.kinds import places
    from finetune.model.quantise import as_quantised, by_kind, plan

    give_rows(model, new_ids)
    kind = recipe.model.quantization
    planned = plan(model, family, kind) if kind != "none" else None
    bare = places(model, family)
    found = as_quantised(bare, model, planned)
    whole = by_kind(bare) if planned is not None else {}
    if recipe.adapter.method == "none":
        freeze(model, recipe.model.freeze)
        return measure(found, model), "", "", whole
    options = earlier.options if earlier is not None else recipe.adapter
    wrapped, targets = adapted(model, options, recipe.model, family, earlier, on_meta=True, new_ids=new_ids)
    return measure(found, wrapped), targets.assumed, targets.loses, whole
