"""The model that is trained: the base, loaded, with its adapter attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.families.family import Family
from finetune.model.adapt import attach, first_values
from finetune.model.coverage import measure, refuse_unaccepted
from finetune.model.earlier import Earlier
from finetune.model.embeddings import give_rows
from finetune.model.folder import Base
from finetune.model.freeze import freeze, told_frozen
from finetune.model.initial import Originals, is_doubled
from finetune.model.kinds import Place, places
from finetune.model.load import Precision, load_base
from finetune.model.proceed import proceed, refuse_other_rows, refuse_other_targets
from finetune.model.quantise import Quantised, in_bytes, quantised, weights_told
from finetune.model.quantise_lora import lost_by_peft
from finetune.model.stored import stored
from finetune.model.targets import Targets, resolve_targets
from finetune.recipe.sections import AdapterOptions, ModelOptions


@dataclass(frozen=True)
class Built:
    """A model ready to train.

    Attributes:
        model: the base with its adapter, or the base alone for full fine-tuning.
        base: what the base is, in words.
        trains: what is trained, in words.
        note: what was assumed, what plain PEFT loses, and which kinds of blocks stay frozen; empty when none of it.
        targets: leaf names of the adapted modules; empty for full fine-tuning.
        weights: what the weights take, by kind of block, quantised and not, in words; empty without quantisation.
        quantized: what is held in 4 or 8 bits; None when nothing is.
        trained: how many parameters are trained.
        first: the B of adapted layers that do not start at zero, by name.
        lost: how many matrices of the adapter plain PEFT loses when it opens it.
    """

    model: Any
    base: str
    trains: str
    note: str
    targets: tuple[str, ...]
    weights: str
    quantized: Quantised | None
    trained: int
    first: dict[str, torch.Tensor]
    lost: int = 0


def build(
    options: ModelOptions,
    adapter: AdapterOptions,
    base: Base,
    family: Family | None,
    kept: Precision,
    attn: str,
    device: torch.device | None,
    earlier: Earlier | None = None,
    new_ids: Sequence[int] = (),
    sharded: bool = False,
    spread: bool = False,
) -> Built:
    """Load the base and attach an adapter. Seed torch before calling.

    Args:
        options: the model section.
        adapter: the adapter section.
        base: the fetched base.
        family: its family; None when no file knows it.
        kept: the precisions.
        attn: the attention kernel's name.
        device: where the weights go; None leaves them to the trainer.
        earlier: the adapter that is trained further; None for a fresh one.
        new_ids: numbers of the recipe's new tokens, which get rows of their own.
        sharded: whether FSDP will shard the weights.
        spread: whether each process will hold a part of each weight; a base that is trained whole then stays in the
            16 bits of its files until its parts are laid down, which widens them.

    Raises:
        ModelError: weights are missing, or the targets are not what the model has.
    """
    model: Any = load_base(options, base, kept, attn, device, sharded, as_stored=spread and adapter.method == "none")
    give_rows(model, new_ids)
    found = places(model, family)
    held = quantised(model, options.quantization, kept.compute) if options.quantization != "none" else None
    note, lost = "", 0
    leaves: tuple[str, ...] = ()
    if adapter.method == "none":
        note = "; ".join(filter(None, [told_frozen(freeze(model, options.freeze), model), _told_part(base, model)]))
    else:
        originals = Originals(base.weights) if adapter.init_lora_weights == "loftq" else None
        model, targets = adapted(model, adapter, options, family, earlier, originals, new_ids=new_ids)
        coverage = measure(found, model)
        refuse_unaccepted(coverage, adapter)
        leaves, lost = targets.short(), targets.lost
        note = "; ".join(filter(None, [targets.assumed, targets.loses, *coverage.sentences()]))
    numbers = count(sum(place.parameters for place in found))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = _what(adapter, leaves, earlier) if leaves else "what is not frozen" if options.freeze else "every weight"
    held_start = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) // 2 if _doubled(adapter) else 0
    return Built(
        model=model,
        base=f"{options.name_or_path}: {base.model_type}, {numbers} parameters, {kept.base}, attention {attn}",
        trains=f"{what}: {count(trained - held_start)} parameters, {kept.trained}; optimizer state {kept.optimizer}",
        note=note,
        targets=leaves,
        weights=_weights(found, options, adapter, base, kept),
        quantized=held,
        trained=trained,
        first=first_values(model) if leaves else {},
        lost=lost,
    )


def _told_part(base: Base, model: Any) -> str:
    """What a fully trained model will lack of its base; empty where that is nothing."""
    if not isinstance(base.config.get("text_config"), dict) or model.config.model_type == base.model_type:
        return ""
    return (
        f"{base.model_type} also holds what text does not reach; the saved model is its text part alone "
        f"({type(model).__name__}), while an adapter is merged into all of it"
    )


def adapted(
    model: Any,
    adapter: AdapterOptions,
    options: ModelOptions,
    family: Family | None,
    earlier: Earlier | None,
    original: Originals | None = None,
    on_meta: bool = False,
    new_ids: Sequence[int] = (),
) -> tuple[Any, Targets]:
    """The base with its adapter, fresh or earlier, and what that adapts.

    Args:
        model: the base, real or on the meta device.
        adapter: the adapter section.
        options: the model section.
        family: the base's family; None when no file knows it.
        earlier: the adapter that is trained further; None for a fresh one.
        original: the base's unquantised weights, for loftq.
        on_meta: the base is on the meta device.
        new_ids: numbers of the recipe's new tokens, which the model has rows for.

    Raises:
        ModelError: the adapter is not what the model can have.
        RecipeError: the recipe's targets are not those of the earlier adapter.
    """
    if earlier is None:
        targets = resolve_targets(model, adapter, family)
        name, revision = options.name_or_path, options.revision
        wrapped = attach(model, adapter, targets, name, revision, on_meta, original, new_ids)
        return wrapped, _with_lost(targets, wrapped)
    named = adapter.target_modules != "auto" or adapter.layers_to_transform  # auto: whatever the adapter has
    stated = resolve_targets(model, adapter, family) if named else None
    refuse_other_rows(model, earlier, new_ids)
    wrapped, targets = proceed(model, earlier, options.name_or_path, options.revision, on_meta)
    if stated is not None:
        refuse_other_targets(stated, targets, earlier)
    return wrapped, _with_lost(targets, wrapped)


def _with_lost(targets: Targets, wrapped: Any) -> Targets:
    """What is adapted, and in words what plain PEFT will lose of it."""
    lost = lost_by_peft(wrapped)
    if not lost:
        return targets
    told = (
        f"the installed PEFT by itself loses {len(lost)} matrices of this adapter when it opens it, as {lost[0]}; "
        "finetune evaluate and merge read all of them, so serve it merged"
    )
    return replace(targets, lost=len(lost), loses=told)


def _weights(found: list[Place], options: ModelOptions, adapter: AdapterOptions, base: Base, kept: Precision) -> str:
    """What the weights take, where they or their files are quantised; else empty."""
    if options.quantization != "none":
        return weights_told(found, options.quantization, kept.compute)
    as_files = stored(options.name_or_path, base.config, options.quantization, adapter.method)
    total = in_bytes(sum(place.bytes for place in found))
    return f"{total} in memory: {as_files.told(kept.base)}" if as_files is not None else ""


def _what(adapter: AdapterOptions, leaves: tuple[str, ...], earlier: Earlier | None) -> str:
    """What is trained beside a frozen base, in words."""
    begun = f", continued from {earlier}" if earlier is not None else ""
    if adapter.init_lora_weights is not True:
        begun = f", started by {adapter.init_lora_weights}"
    if _doubled(adapter):
        begun += " (as many numbers again hold that start, frozen)"
    return f"{adapter.method} r={adapter.r}{begun} on {', '.join(leaves)}"


def _doubled(adapter: AdapterOptions) -> bool:
    return adapter.method != "none" and is_doubled(adapter.init_lora_weights)


def count(number: int) -> str:
    """A number for a reader: 4.9 million."""
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
